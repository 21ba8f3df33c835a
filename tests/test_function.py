"""A user's own reward: what it may return and raise, how it is loaded, that a run is trained by it."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import asyncio
import functools
import logging
import re
import sys
import textwrap
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from scoring import outcome_of as outcome_of_term
from scoring import response, scored, scorer_of

from cosmo_rl.cpgd import trainer
from cosmo_rl.cpgd.config import Config, RewardConfig
from cosmo_rl.cpgd.rewards import check, function
from cosmo_rl.cpgd.rewards.base import Failed, NotApplicable, RewardBudgetError, Score, check_budget
from cosmo_rl.cpgd.rewards.function import UserFunction, attempt, load_function, outcome_of
from cosmo_rl.cpgd.run import dryrun
from cosmo_rl.cpgd.run.metrics import read_metrics
from cosmo_rl.cpgd.run.recipes import parse_command_line
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import Row


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """Loading adds a folder to the path."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


def row(task="general", **fields):
    return Row(id="r1", task=task, domain="d", messages=({"role": "user", "content": "q"},), source="test",
               licence="Apache-2.0", **fields)


def said(term, text="<think>a</think> b", task="general"):
    """The outcome of one call, plain or async."""
    return outcome_of_term(term, text, row(task, answer="b"))


def outcome(path, name="score"):
    return said(load_function(f"{path}:{name}"))


# -- what it returns --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("said", "wanted"), [
    (0.25, Score(0.25)), (0, Score(0.0)), (1, Score(1.0)), (1.0, Score(1.0)), (np.float64(0.5), Score(0.5)),
    (None, NotApplicable()), ("no answer", Failed("no answer")), (" two\nlines\x1b ", Failed("two lines\\x1b")),
])
def test_a_value_none_or_a_reason(said, wanted):
    found = outcome_of(said)
    assert found == wanted and (not isinstance(found, Score) or type(found.value) is float)


@pytest.mark.parametrize(("said", "reason"), [
    (1.0000001, r"returned 1\.0000001; map it to \[0, 1\]"), (-0.5, r"returned -0\.5; map it"), (2, r"returned 2\.0;"),
    (float("nan"), "returned nan; map it"), (float("inf"), "returned a number beyond 1e300; map it"),
    (-float("inf"), "beyond 1e300"), (10**400, "beyond 1e300"), (10**5000, "beyond 1e300"), (100, "returned 100"),
    (True, "type bool; return float"), (False, "type bool"), (np.bool_(True), "type numpy.bool"),
    (np.float32(0.5), "type numpy.float32; return float"), (np.int64(1), "type numpy.int64"),
    (np.array(0.5), "type numpy.ndarray"), (torch.tensor(0.5), "type torch.Tensor"), ([0.5], "type list"),
    ((0.5, "why"), "type tuple"), ({"score": 0.5}, "type dict"), (b"0.5", "type bytes"), (0.5j, "type complex"),
    ("", "an empty reason; say what is wrong, or return None"), (" \n", "an empty reason"),
    (type("Odd", (), {"__repr__": lambda self: 1 / 0})(), "type .*Odd"),
], ids=lambda value: value if isinstance(value, str) else type(value).__name__)
def test_anything_else_fails_with_the_mend_and_is_never_clipped(said, reason):
    found = outcome_of(said)
    assert isinstance(found, Failed)
    assert re.search(reason, found.reason), found.reason
    assert "\n" not in found.reason and len(found.reason) < 400


def test_gradients_that_it_switches_off_stay_on_for_the_training(write):
    path = write("""
        import torch
        torch.set_grad_enabled(False)
        def score(row, response):
            torch.set_grad_enabled(False)
            return 0.5
    """)
    score = load_function(f"{path}:score")
    assert torch.is_grad_enabled()
    assert said(score) == Score(0.5) and torch.is_grad_enabled()


def test_a_long_reason_is_cut():
    found = outcome_of("x" * 10_000)
    assert isinstance(found, Failed) and len(found.reason) < 400


@pytest.mark.filterwarnings("error")
def test_something_to_await_is_told():
    async def score():
        return 1.0

    assert outcome_of(score()) == Failed("the function returned something to await; write it as `async def`")


# -- what it raises ---------------------------------------------------------------------------------------------------

RAISING = """
    import asyncio, sys
    class Odd(Exception):
        def __str__(self):
            raise RuntimeError("str")
    def deep(n):
        return deep(n + 1)
    def zero(row, response):
        return 1 / 0
    def key(row, response):
        return {}[response]
    def leave(row, response):
        sys.exit(0)
    def odd(row, response):
        raise Odd
    def depth(row, response):
        return deep(0)
    def ours(row, response):
        raise ValueError("of his own")
    async def late(row, response):
        await asyncio.sleep(0)
        return 1 / 0
    async def gone(row, response):
        sys.exit(3)
    async def cancelled(row, response):
        raise asyncio.CancelledError
    async def slow(row, response):
        raise TimeoutError("of his own")
"""


@pytest.mark.parametrize(("name", "reason"), [
    ("zero", "ZeroDivisionError: division by zero"), ("key", "KeyError: "), ("leave", "SystemExit: 0"),
    ("odd", "Odd: <exception str"), ("depth", "RecursionError: "), ("ours", "ValueError: of his own"),
    ("late", "ZeroDivisionError"), ("gone", "SystemExit: 3"), ("slow", "TimeoutError: of his own"),
])
def test_what_it_raises_is_failed_with_its_place_and_traceback(write, caplog, name, reason):
    path = write(RAISING)
    found = outcome(path, name)
    assert isinstance(found, Failed) and reason in found.reason and f"({path}:" in found.reason
    [record] = caplog.records
    assert "Traceback (most recent call last)" in record.message and f'File "{path}", line' in record.message
    assert "function.py" not in record.message, "none of our frames"
    assert record.levelno == logging.ERROR  # ranks above 0 show these alone


def test_a_cancellation_of_its_own_is_no_end_of_the_run(write):
    found = outcome(write(RAISING), "cancelled")
    assert isinstance(found, Failed) and "CancelledError" in found.reason


def test_a_traceback_is_told_once_for_each_place(write, caplog):
    path = write("""
        def score(row, response):
            if response == "a":
                raise KeyError(response)
            raise KeyError(response)
    """)
    term = load_function(f"{path}:score")
    found = [said(term, text) for text in ("a", "b", "c", "a", "\x1b[2J")]
    assert all(isinstance(one, Failed) for one in found) and len(caplog.records) == 2
    assert {one.reason.rpartition(":")[2] for one in found} == {"4)", "5)"}, "each tells its line"
    assert "\x1b" not in caplog.text and "\x1b" not in str(found)


def test_a_flood_of_places_ends(write, caplog):
    lines = "\n".join(f"            if response == '{i}': raise KeyError" for i in range(30))
    path = write("        def score(row, response):\n" + lines)
    term = load_function(f"{path}:score")
    for i in range(30):
        assert isinstance(said(term, str(i)), Failed)
    assert len(caplog.records) == function.MOST_TOLD + 1 and "are not shown" in caplog.records[-1].message


def test_an_interrupt_and_a_cancellation_go_on():
    for kind in (KeyboardInterrupt, asyncio.CancelledError, GeneratorExit):
        def stop(kind=kind):
            raise kind

        with pytest.raises(kind):
            attempt(stop)

    async def cancelled():
        async def wait(row, response):
            await asyncio.sleep(60)

        task = asyncio.ensure_future(UserFunction(wait, path=runs.MODEL, digest="")(response("", row())))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(cancelled())


def test_an_async_call_has_a_limit(monkeypatch):
    monkeypatch.setattr(function, "LIMIT_S", 0.01)

    async def score(row, response):
        await asyncio.sleep(60)

    found = said(UserFunction(score, path=runs.MODEL, digest=""))
    assert found == Failed("no outcome within 0.01 s; give its calls a shorter limit of their own")


# -- how it is loaded -------------------------------------------------------------------------------------------------

CALLED = """
    import functools
    def plain(row, response): return 0.5
    def more(row, response, scale=0.5): return scale
    def any_(*args, **kwargs): return 0.5
    def other(scale, row, response): return scale
    bound = functools.partial(other, 0.5)
    class Reward:
        def __init__(self, value=0.5): self.value = value
        def __call__(self, row, response): return self.value
        def method(self, row, response): return self.value
        @staticmethod
        def static(row, response): return 0.5
    instance = Reward()
    method = instance.method
    class Waits:
        async def __call__(self, row, response): return 0.5
    waits = Waits()
    async def later(row, response): return 0.5
    async def scaled(scale, row, response): return scale
    partial = functools.partial(scaled, 0.5)
    lambda_ = lambda row, response: 0.5
    def none(): return 0.5
    def one(row): return 0.5
    def three(row, response, image): return 0.5
    def keyword(row, response, *, image): return 0.5
    def generator(row, response): yield 0.5
    async def agenerator(row, response): yield 0.5
    value = 3
"""


@pytest.mark.parametrize("name", ["plain", "more", "any_", "bound", "instance", "method", "waits", "later", "partial",
                                  "lambda_"])
def test_whatever_can_be_called_with_row_and_response(write, name):
    path = write(CALLED)
    assert outcome(path, name) == Score(0.5)
    assert load_function(f"{path}:{name}").waits == (name in ("waits", "later", "partial"))


@pytest.mark.parametrize(("name", "message"), [
    ("none", r"takes \(\), and is called as \(row, response\)"), ("one", r"takes \(row\)"),
    ("three", r"takes \(row, response, image\)"), ("keyword", r"takes \(row, response, \*, image\)"),
    ("other", r"takes \(scale, row, response\)"), ("generator", "is a generator"), ("agenerator", "is a generator"),
    ("Reward", r"is a class; give an instance of it, as NAME = Reward\(\)"),
    ("value", "is a value of type int, which cannot be called; give a function"),
    ("functools", "is a value of type module"), ("scor", "has no scor; its functions are plain, more, any_, other, "),
])
def test_what_cannot_be_called_so_is_told(write, name, message):
    path = write(CALLED)
    with pytest.raises(UserError, match=f"--reward.function .*mine.py:{name}.*{message}") as error:
        load_function(f"{path}:{name}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [
    ("def score(row, response)\n    return 1\n", r"mine\.py:1: SyntaxError: expected ':'; mend the file"),
    ("x = 1\n\n  y = 2\n", r"mine\.py:3: IndentationError: unexpected indent"),
    ("import no_such_package_at_all\n", r"mine\.py:1: ModuleNotFoundError: No module named 'no_such_package_at_all'; "
     "mend the file, or install what it imports"),
    ("from . import other\n", r"mine\.py:1: ImportError: attempted relative import"),
    ("from os import no_such_name\n", r"mine\.py:1: ImportError: cannot import name"),
    ("\n\nx = 1 / 0\n", r"mine\.py:3: ZeroDivisionError: division by zero"),
    ("import sys\nsys.exit()\n", r"mine\.py:2: SystemExit"), ("raise KeyError('a\\nb')\n", r"mine\.py:1: KeyError"),
    ("import broken_sibling\n", r"broken_sibling\.py:2: SyntaxError"),
    ("x = '\0'\n", "mine.py.*null bytes"), ("# coding: nonsense\n", "mine.py.*unknown encoding"),
    ("", "has no score; define it there"), ("def other(row, response): pass\n", "its functions are other"),
    ("from os.path import join\n", "has no score; define it there"),
])
def test_a_file_that_cannot_be_imported_is_told_in_one_line(write, text, message):
    write("x = 1\ny = (\n", "broken_sibling.py")
    path = write(text)
    with pytest.raises(UserError, match=f"--reward.function .*{message}") as error:
        load_function(f"{path}:score")
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_and_files_that_are_not_there(tmp_path):
    (tmp_path / "latin.py").write_bytes(b"x = 'caf\xe9'\n")
    with pytest.raises(UserError, match=r"latin\.py.*SyntaxError"):
        load_function(f"{tmp_path / 'latin.py'}:score")
    for name, problem in (("none.py", "No such file"), (".", "Is a directory")):
        with pytest.raises(UserError, match=rf"cannot be read \({problem}.*give a Python file as FILE:NAME"):
            load_function(f"{tmp_path / name}:score")


@pytest.mark.parametrize(("settings", "message"), [
    *(({"function": value}, "--reward.function is .*; write FILE:NAME, as my_reward.py:score")
      for value in ("mine.py", "mine.py:", ":score", "mine.py:a.b", "mine.py:3", "mine.py:score()", "a b", ":")),
    ({"function_tasks": ("math",)}, "--reward.function-tasks is given without --reward.function"),
    ({"function": "a:b", "function_tasks": ("maths",)}, "--reward.function-tasks holds 'maths'; give some of safety"),
])
def test_settings_that_are_wrong_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        RewardConfig(**settings)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_is_a_number_of_at_least_0(weight):
    with pytest.raises(UserError, match=f"finite and must not be negative: .*function {weight}"):
        Config(reward=RewardConfig(function="a:b", function_weight=weight))


def test_siblings_are_imported_and_installed_packages_come_first(write, monkeypatch):
    """Also from within a function, and dataclasses find their module."""
    write("VALUE = 0.25\n", "sibling_one.py")
    write("VALUE = 0.5\n", "sibling_two.py")
    write("raise RuntimeError('shadowed')\n", "colorsys.py")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    path = write("""
        from __future__ import annotations
        import colorsys
        from dataclasses import dataclass
        from sibling_one import VALUE

        @dataclass
        class Part:
            value: float = colorsys.rgb_to_hsv(0.125, 0.125, 0.125)[2]

        def score(row, response):
            import sibling_two
            return VALUE + sibling_two.VALUE + Part().value
    """)
    assert outcome(path) == Score(0.875)


def test_what_runs_is_the_file_as_it_is(write):
    """No byte code of an earlier version, of one length and one second; its digest is that of what ran."""
    path = write("def score(row, response): return 0.1\n")
    one = load_function(f"{path}:score")
    write("def score(row, response): return 0.9\n")
    two = load_function(f"{path}:score")
    assert (said(one), said(two)) == (Score(0.1), Score(0.9)) and one.digest != two.digest
    write("def score(row, response): return 0.1\n", "moved.py")
    assert load_function(f"{path.parent / 'moved.py'}:score").digest == one.digest


def test_the_digest_knows_the_siblings(write, monkeypatch):
    write("VALUE = 0.25\n", "sibling_three.py")
    path = write("import sibling_three\ndef score(row, response): return sibling_three.VALUE\n")
    first = load_function(f"{path}:score").digest
    assert load_function(f"{path}:score").digest == first
    monkeypatch.delitem(sys.modules, "sibling_three")
    write("VALUE = 0.75\n", "sibling_three.py")
    assert load_function(f"{path}:score").digest != first


def test_a_resume_compares_the_name_and_not_the_place():
    of = lambda value: parse_command_line(["--reward.function", value]).hash()
    assert of("a.py:score") == of("/elsewhere/b.py:score") != of("a.py:other")
    assert of("a.py:score") != parse_command_line([]).hash()
    assert parse_command_line(["--reward.function", "a.py:f", "--reward.function-weight", "2",
                               "--reward.function-tasks", "math", "mcq"]).reward.function_tasks == ("math", "mcq")


# -- among the terms --------------------------------------------------------------------------------------------------

def built(path, name="score", rows=None, **more):
    settings = {"format": 0.0, "visual_focus": 0.0, "helpful": 0.0, "task_aware": 0.0, **more}
    return scorer_of(RewardConfig(function=f"{path}:{name}", **settings), rows or [row(answer="b")])


def responses(count=24):
    return [sample.response for sample in runs.rollout().samples[:count]]


def test_it_is_a_term_like_the_others(write):
    path = write("def score(row, response): return 0.25 if response else None\n")
    scorer = built(path, format=1.0, function_weight=3.0)
    assert scorer.weights == {"format": 1.0, "function": 3.0}
    samples = scored(scorer, responses(8))
    for one in samples:
        assert one.terms["function"] == 0.25
        assert one.reward == pytest.approx((one.terms["format"] + 3 * 0.25) / 4)
    assert scorer_of(RewardConfig(), [row(answer="b")]).function is None
    assert built(write("syntax error", "b.py"), format=1.0, function_weight=0.0).function is None, "not even loaded"
    with pytest.raises(UserError, match=r"every reward weight is 0; .* or name a --reward.function"):
        built(path, function_weight=0.0)


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_it_scores_rows_of_its_tasks_alone(write, kind):
    path = write(f"{kind} score(row, response): return 1.0\n")
    term = built(path, function_tasks=("general", "math")).function
    assert said(term, task="helpful") == NotApplicable() and said(term, task="general") == Score(1.0)
    with pytest.raises(UserError, match=r"--reward\.function-tasks names math, and the rows have general, helpful; n"):
        built(path, function_tasks=("math",), rows=[row(answer="b"), row("helpful")])


def test_failures_count_against_the_budget(write):
    path = write("def score(row, response): raise KeyError(row.id)\n")
    samples = scored(built(path), responses(8))
    assert all(one.reward is None for one in samples)
    with pytest.raises(RewardBudgetError, match=r"8 of 8 responses .*function: KeyError: .*mine\.py:1"):
        check_budget([f"{one.id}: {one.failure}" for one in samples], 8, 0.1)


ASYNC = """
    import asyncio
    calls, most, seen = 0, 0, []
    async def score(row, response):
        global calls, most
        calls += 1
        most = max(most, calls)
        for _ in range(len(response) * 7 % 5):
            await asyncio.sleep(0)
        seen.append(response)
        calls -= 1
        return len(response) % 10 / 10
"""


def test_async_calls_run_at_once_within_a_bound_and_in_no_order(write, monkeypatch):
    monkeypatch.setattr(function, "IN_FLIGHT", 3)
    path = write(ASYNC)
    scorer, texts = built(path), [one.text for one in responses()]
    try:
        parts = [scorer.submit(responses()[start:start + 8]) for start in range(0, len(texts), 8)]
        outcomes = [found for part in parts for found in part.result(timeout=60)]
        scorer.verify()
        assert scorer.taken() == {}, "no server was asked"
    finally:
        scorer.close()
    module = sys.modules[scorer.function.call.__module__]
    assert module.most == 3 and len(module.seen) == len(texts)
    assert module.seen != texts, "they overtake each other"
    assert outcomes == [{"function": Score(len(text) % 10 / 10)} for text in texts]


def test_a_plain_function_runs_in_the_trainers_thread(write):
    """Graders set signal handlers, which only this thread may, or call asyncio.run."""
    path = write("""
        import asyncio, signal, threading
        async def inner():
            return 0.5
        def score(row, response):
            assert threading.current_thread() is threading.main_thread()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            return asyncio.run(inner())
    """)
    assert threading.current_thread() is threading.main_thread()
    scorer = built(path, format=1.0)
    found = scorer.submit([response("<think>a</think> b", row(answer="b"))]).result(timeout=60)
    assert found == [{"format": Score(1.0), "function": Score(0.5)}]


# -- in a run ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def rows(tmp_path):
    return runs.write_rows(tmp_path / "data" / "rows.jsonl", runs.small_rows())


def test_the_dry_run_tries_it_on_one_row(write, rows, capsys):
    path = write("""
        import numpy as np
        def good(row, response): return 0.5 if row.task == "general" and "<think>" in response else None
        async def later(row, response): return 0.25
        def bad(row, response): return np.float32(0.5)
        def skips(row, response): return None
    """)
    dry = lambda name, *more: dryrun.dry_run(parse_command_line([
        *map(str, runs.from_file(rows)), "--reward.function", f"{path}:{name}", *more]))
    general = ("--reward.function-tasks", "general")
    assert dry("good", *general) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "note: --reward.function gives 0.5 on row general-" in out and "<think>This is a dry run.</think>" in out
    assert dry("later") == 0 and "gives 0.25 on row" in capsys.readouterr().out
    assert dry("skips") == 0 and "gives None on row" in capsys.readouterr().out
    assert dry("bad") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "problem: --reward.function failed on row " in out and "type numpy.float32; return float" in out
    assert dry("none") == 1
    assert "has no none; its functions are good, later" in " ".join(capsys.readouterr().out.split())


def test_the_check_of_judges_says_where_it_is_tried(capsys, monkeypatch):
    monkeypatch.setattr(check, "Console", functools.partial(check.Console, width=200))
    assert check.main(RewardConfig(function="a.py:score")) == 1
    assert "train.py --dry-run tries --reward.function" in capsys.readouterr().out


def test_a_run_is_trained_by_it_on_one_and_two_ranks(tmp_path, write, rows):
    """Async and plain give one run; a changed reward is told when it is resumed, and the file may move."""
    path = write("""
        def score(row, response): return len(response) % 10 / 10
        async def later(row, response): return score(row, response)
    """)
    command = lambda name, run, file=path: runs.small(
        *runs.from_file(rows), "--reward.function", f"{file}:{name}", "--reward.function-weight", 2, "--run-dir",
        tmp_path / run)
    both = [runs.start(command(*one), tmp_path / "logs", ranks=ranks)
            for one, ranks in ((("score", "one"), 1), (("later", "two"), 2))]
    for running in both:
        running.wait().check()
    one, two = (runs.lines_of(tmp_path / run) for run in ("one", "two"))
    assert one[0]["rewards"] == two[0]["rewards"] and "judging" not in two[0]
    assert all(by["function"]["std"] > 0 for by in one[0]["rewards"].values())
    (tmp_path / "one" / "stage2" / "report.json").unlink()  # as after a kill before the end
    moved = write(path.read_text(), "moved.py")
    runs.train(command("score", "one", moved), tmp_path / "logs").check()
    (tmp_path / "one" / "stage2" / "report.json").unlink()
    changed = write(path.read_text().replace("% 10", "% 9"), "changed.py")
    more = len(one) + 2
    done = runs.train([*command("score", "one", changed), "--steps", more], tmp_path / "logs").check()
    assert f"step {more - 1}: {changed}:score, or a module beside it, is not what it was" in done.err[0], done.err[0]
    told = read_metrics(tmp_path / "one" / "stage2" / "warnings.jsonl")
    assert ["is not what it was" in line["warning"] for line in told].count(True) == 1 and len(
        runs.lines_of(tmp_path / "one")) == more


def test_a_run_with_a_bad_one_stops_before_sampling(tmp_path, write, rows):
    path = write("def score(row): return 1.0\n")
    done = runs.train(runs.small(*runs.from_file(rows), "--reward.function", f"{path}:score", "--run-dir",
                                 tmp_path / "run"), tmp_path / "logs", ranks=2)
    assert done.codes == [1, 1] and "Traceback" not in done.err[0], done.err[0]
    assert "takes (row), and is called as (row, response)" in done.err[0]
    assert not (tmp_path / "run" / "stage2" / "metrics.jsonl").exists()


def test_ranks_with_different_files_stop(monkeypatch):
    def agree(value, complaint):
        if value == "a digest":
            raise UserError(complaint)

    for name in ("start_path", "load_processor", "together"):
        monkeypatch.setattr(trainer, name, lambda *args: None)
    monkeypatch.setattr(trainer, "plan", lambda *args: SimpleNamespace(needs="some"))
    monkeypatch.setattr(trainer, "agree", agree)
    scorer = SimpleNamespace(function_digest="a digest")
    monkeypatch.setattr(trainer.Trainer, "_open_scorer", lambda self, needs: scorer)
    with pytest.raises(UserError, match=r"the file of --reward\.function, or a module beside it, is not the same"):
        trainer.Trainer(runs.config(), SimpleNamespace(stage_dir=None), torch.device("cpu"))
