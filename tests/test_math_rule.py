"""Math answers: which are equal, how one is read, and that no expression stops the run or outlives it."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cosmo_rl.cpgd.rewards import math_rule
from cosmo_rl.cpgd.rewards.base import Failed, Score
from cosmo_rl.cpgd.rewards.math_rule import MathRule, Workers
from cosmo_rl.cpgd.rewards.math_text import pair

HANGS = r"\boxed{9^{9^{9^{9}}}}"
TWO = (r"\boxed{2}", r"\boxed{\frac{4}{2}}")
CASES = [  # reference, answer part, value
    ("42", "42", 1), ("42", " 42. ", 1), ("42", "The answer is 42.", 1), ("42", r"\boxed{42}", 1), ("42", "41", 0),
    ("42", "", 0), ("42", "?", 0), ("42", "none", 0), (r"\frac{1}{2}", "0.5", 1), (r"\frac{1}{2}", "1/2", 1),
    ("1/2", r"\frac{2}{4}", 1), ("1/2", r"so $\frac{1}{2}$", 1), ("0.333", "1/3", 0), ("1,234", "1234", 1),
    ("-3", "3", 0), ("50\\%", "50%", 1), ("12 cm", "12", 1), ("12", "12 cm", 1), ("4", "4 apples", 1), ("$5$", "5", 1),
    ("x=5", "5", 1), ("5", "x = 5", 1), ("2xy+3", "3+2yx", 1), ("2xy+3", "3", 0), ("x^2+2x+1", "(x+1)^2", 1),
    (r"x \le 3", r"x\leq 3", 1), (r"x \le 3", "x < 3", 0), (r"\sqrt{8}", r"$2\sqrt{2}$", 1), ("(2,3)", "(3,2)", 0),
    (r"\{1,2\}", r"\{2,1\}", 1), (r"\text{even}", "Even.", 1), (r"\text{even}", r"\boxed{\text{odd}}", 0),
    ("1000", r"\boxed{1\,000}", 1), ("45", "45\u00b0", 1), (r"\infty", "\u221e", 1), ("5", "**5**", 1), ("5", "`5`", 1),
    ("5", "<answer>5</answer>", 1), ("5", r"\boxed{5.}", 1), ("5", "<answer>5 or 6</answer>", 0),
    # One reading only: neither several boxes nor several numbers hedge.
    ("4", r"\boxed{4} \boxed{5}", 0), ("4", r"first \boxed{5}, no, \boxed{4}", 1), ("4", r"\boxed{4, 5}", 0),
    ("4", "4 or 5", 0), ("4", "3, 4", 0), ("4", r"4 \boxed{5}", 0), ("4", "The answer is 4. The answer is 5.", 0),
]


@pytest.fixture(scope="module")
def workers():
    pool = Workers(2, cpu_s=1.0)
    yield pool
    pool.close()


def compare(pool, pairs):
    """Outcomes of all, asked for at once."""
    return [asked.result(timeout=60) for asked in [pool.compare(*one) for one in pairs]]


def outcomes(rule, cases):
    """Of (gold, answer) cases, asked for at once."""
    async def ask():
        return await asyncio.gather(*(rule(gold, answer) for gold, answer in cases))

    return asyncio.run(ask())


def gone(process_id, within_s=10.0):
    """Whether a process ends; a zombie has ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_equal_answers_are_right_and_no_others(workers):
    found = outcomes(MathRule(workers), [(gold, answer) for gold, answer, _ in CASES])
    assert list(zip(CASES, found, strict=True)) == [(case, Score(float(case[2]))) for case in CASES]


@pytest.mark.parametrize(("gold", "reason"), [
    (None, "which is missing; add it"), ("", "which is missing"), ("Paris", "'Paris' is no expression.*task general"),
    ("x=5 or x=-2", "nor a text with one number"), ("between 3 and 5", "nor a text with one number"),
    ("2+", "cannot parse `answer`"), ("{", "cannot parse `answer`"),
])
def test_a_reference_of_no_use_is_told_before_the_run(workers, gold, reason):
    rule = MathRule(workers)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(rule.problem(gold))
    assert rule.problem("7") == rule.problem("about 7 m") == rule.problem(r"\text{even}") == ""
    assert rule.problem("sqrt(2) + sqrt(3)") == rule.problem("1 1/2 meters") == ""


def test_a_reference_that_cannot_be_parsed_fails_and_is_no_zero(workers):
    rule = MathRule(workers)
    cases = [(gold, answer) for gold in ("2+", "Paris", None) for answer in ("2", "", r"\boxed{2+}")]
    assert all(isinstance(found, Failed) for found in outcomes(rule, cases))


def test_a_reference_that_takes_too_long_to_compare_is_told(workers, monkeypatch):
    monkeypatch.setattr(workers, "compare", lambda gold, answer: SimpleNamespace(result=lambda: Score(0.0)))
    assert MathRule(workers).problem("7").startswith("`answer` '7': it is not equal to itself; write it as LaTeX")


def test_only_the_first_references_are_parsed(workers, monkeypatch):
    monkeypatch.setattr(math_rule, "CHECKED_GOLDS", 2)
    rule = MathRule(workers)
    assert [bool(rule.problem(gold)) for gold in ("1", "2+", "1", "2+", "3+", "")] == [False, True, False, True, False,
                                                                                      True]


@pytest.mark.parametrize("answer", [
    HANGS, r"\boxed{((10^9)!)!}", "(" * 3000 + "1" + ")" * 3000, "9**9**9**9",
], ids=lambda answer: answer[:20])
def test_no_expression_stops_the_run(workers, answer):
    """Powers, factorials, deep nesting: more than 1 s of processor time, or too much recursion."""
    assert outcomes(MathRule(workers), [("7", answer)]) == [Score(0.0)]
    assert compare(workers, [TWO, (TWO[0], "3")]) == [Score(1.0), Score(0.0)]


def test_a_hanging_comparison_ends_its_worker_alone(workers):
    compare(workers, [TWO, TWO])
    before = {process.pid for process in workers._all}
    assert compare(workers, [TWO, (TWO[0], HANGS), TWO, TWO]) == [Score(1.0), Score(0.0), Score(1.0), Score(1.0)]
    compare(workers, [TWO, TWO])
    after = {process.pid for process in workers._all}
    assert len(before & after) == 1 and len(after) <= 2, (before, after)
    assert all(gone(process_id) for process_id in before - after)


def test_a_hanging_reference_is_the_datas_fault():
    pool = Workers(1, cpu_s=0.02)  # a new worker's first LaTeX takes longer
    failed = compare(pool, [(r"\boxed{\frac{x^2+2x+1}{\sqrt{x}} + \int x dx}", "2")])[0]
    assert isinstance(failed, Failed) and "takes too long to parse" in failed.reason


def test_workers_are_limited_in_memory():
    pool = Workers(1, memory_bytes=300 << 20)
    assert compare(pool, [TWO]) == [Score(1.0)]
    (process,) = pool._all
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    assert [line.split()[3:5] for line in limits.splitlines() if line.startswith("Max address space")
            ] == [[str(300 << 20)] * 2]
    assert [line.split()[4] for line in limits.splitlines() if line.startswith("Max core file size")] == ["0"]


def test_a_grown_worker_is_replaced():
    pool = Workers(1, memory_bytes=180 << 20)  # which it always is, then
    pids = set()
    for _ in range(2):
        if not pool._idle:
            pool._idle.append(pool._free())
        pids |= {process.pid for process in pool._all}
        assert compare(pool, [TWO]) == [Score(1.0)] and not pool._all and not pool._idle
    assert len(pids) == 2 and all(map(gone, pids))


def test_the_outcome_depends_on_no_worker_and_no_order(workers):
    pairs = [pair(gold, answer) for gold, answer, _ in CASES if gold]
    here = compare(workers, pairs)
    pool = Workers(1)
    assert compare(pool, pairs[::-1])[::-1] == here
    (process,) = pool._all
    environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    assert b"PYTHONHASHSEED=0" in environment and b"SYMPY_GROUND_TYPES=python" in environment


def test_a_worker_that_died_while_idle_is_replaced(workers):
    compare(workers, [TWO, TWO])
    for process in list(workers._all):
        process.kill()
        process.wait()
    assert compare(workers, [TWO, TWO, TWO]) == [Score(1.0)] * 3


def test_a_thread_that_finds_the_last_idle_worker_taken_starts_one():
    """Between its look and its pop: the list says that there is one, and has none."""
    class Taken(list):
        def __bool__(self):
            return True

    pool = Workers(1)
    pool._idle = Taken()
    assert compare(pool, [TWO]) == [Score(1.0)] and len(pool._all) == 1
    pool.close()


def test_a_worker_killed_at_work_is_no_zero():
    pool = Workers(1, cpu_s=30.0)
    compare(pool, [TWO])
    (process,) = pool._all
    threading.Timer(0.5, process.kill).start()
    failed, after = compare(pool, [(TWO[0], HANGS), TWO])
    assert isinstance(failed, Failed) and "ended with status -9" in failed.reason, "another process took the memory"
    assert after == Score(1.0)


def test_a_machine_that_stands_still_is_no_zero():
    pool = Workers(1)
    compare(pool, [TWO])
    (process,) = pool._all
    os.kill(process.pid, signal.SIGSTOP)
    pool.wall_s = 0.5
    failed = compare(pool, [TWO])[0]
    assert isinstance(failed, Failed) and "not done within 0.5 s" in failed.reason and gone(process.pid)


def test_equal_cases_that_are_asked_for_at_once_are_compared_once():
    class Counted(Workers):
        asked: list = []  # noqa: RUF012

        def compare(self, gold, answer):
            self.asked.append((gold, answer))
            return self._threads.submit(lambda: time.sleep(0.1) or Score(float(gold == answer)))

    rule = MathRule(Counted(2))
    cases = [("1", "1"), ("1", "2"), ("1", " 1."), ("Paris", "1"), (None, "1"), ("1", "1")]
    found = outcomes(rule, cases)
    assert found[:3] == [Score(1.0), Score(0.0), Score(1.0)] and found[5] == Score(1.0)
    assert Counted.asked == [(r"\boxed{1}", r"\boxed{1}"), (r"\boxed{1}", r"\boxed{2}")] and not rule._open


def test_what_is_not_compared_yet_is_given_up_when_they_close():
    pool = Workers(1, cpu_s=300.0)
    asked = [pool.compare(TWO[0], HANGS), pool.compare(*TWO)]
    while not pool._all:
        time.sleep(0.01)
    (process,) = pool._all
    pool.close()
    assert asked[1].cancelled() and gone(process.pid) and isinstance(asked[0].result(timeout=10), Failed)


def test_the_number_of_workers_is_the_ranks_share(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for ranks, number in (("1", 4), ("8", 2), ("32", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert Workers().number == number


def test_they_end_with_the_object():
    pool = Workers(2)
    compare(pool, [TWO, TWO])
    pids = [process.pid for process in pool._all]
    del pool
    assert len(pids) == 2 and all(map(gone, pids))


@pytest.mark.parametrize("end", ["return", "kill at work"])
def test_they_end_with_their_process(end):
    """Also with one that is killed, and at once, not after the comparison in progress."""
    code = f"""
        from cosmo_rl.cpgd.rewards.math_rule import Workers
        pool = Workers(1, cpu_s=300.0)
        assert pool.compare(*{TWO!r}).result()
        print(*(process.pid for process in pool._all), flush=True)
        if {end!r} == "kill at work":
            pool.compare({TWO[0]!r}, {HANGS!r}).result()
    """
    parent = subprocess.Popen([sys.executable, "-P", "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    worker = int(parent.stdout.readline())
    if end != "return":
        time.sleep(0.5)
        assert not gone(worker, 0.1)
        parent.kill()
    parent.wait(30)
    assert gone(worker, 5.0)
