"""The worker's side: what it replies, within which limits, and when it ends."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cosmo_rl.cpgd.rewards.math_worker import compare

COMMAND = [sys.executable, "-P", "-m", "cosmo_rl.cpgd.rewards.math_worker"]


def worker(cpu_s=5.0, memory=1 << 30, parent=None):
    return subprocess.Popen([*COMMAND, str(parent or os.getpid()), str(cpu_s), str(memory)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ask(process, *pairs):
    replies, _ = process.communicate("".join(json.dumps(pair) + "\n" for pair in pairs).encode(), timeout=60)
    return replies


@pytest.mark.parametrize(("gold", "answer", "said"), [
    (r"\boxed{2}", r"\boxed{\frac{4}{2}}", "1"), (r"\boxed{2}", r"\boxed{3}", "0"), (r"\boxed{2}", "", "0"),
    (r"\boxed{2}", "no number", "0"), ("no number", r"\boxed{2}", "g"), (r"\boxed{2+}", r"\boxed{2+}", "g"),
    (r"\boxed{12.5\%}", r"\boxed{12.5}", "1"), (r"\boxed{12.5}", r"\boxed{12.5\%}", "1"),
    (r"\boxed{12.5\%}", r"\boxed{12.6}", "0"), (r"\boxed{0.5\%}", r"\boxed{0.5}", "0"),
    (r"\boxed{12.5\%}", r"\boxed{0.125}", "1"), (r"\boxed{\frac{100}{3}\%}", r"\boxed{33.333333}", "1"),
    (r"\boxed{[1,2)}", r"\boxed{1 \leq x < 2}", "1"), (r"\boxed{[1,2)}", r"\boxed{1 < x < 2}", "0"),
])
def test_the_reply(gold, answer, said):
    parsed = []
    assert compare(gold, answer, lambda: parsed.append(gold)) == said
    assert parsed == [gold] * (said != "g"), "p tells a bad reference from a bad response"


def test_one_reply_a_line_until_stdin_ends():
    process = worker()
    assert ask(process, ["$2$", r"\boxed{2}"], ["oh", "$2$"], ["$2$", "$3$"]) == b"p1gp0"
    assert process.returncode == 0


def test_too_much_processor_time_ends_it_with_sigprof():
    process = worker(cpu_s=1.0)
    started = time.monotonic()
    assert ask(process, ["$2$", "$2$"], ["$2$", "$9^{9^{9^{9}}}$"]) == b"p1p"
    assert process.returncode == -signal.SIGPROF and time.monotonic() - started < 30


def test_a_grown_worker_asks_to_be_replaced():
    assert ask(worker(memory=180 << 20), ["$2$", "$2$"]) == b"px1", "sympy alone takes a quarter of that"


def test_too_little_memory_is_an_error_to_see():
    process = worker(memory=50 << 20)
    _, message = process.communicate(b'["$2$", "$2$"]\n', timeout=60)
    assert process.returncode == 1 and b"MemoryError" in message


def test_it_does_not_start_without_its_parent():
    process = worker(parent=1 << 22)
    assert ask(process, ["$2$", "$2$"]) == b"" and process.returncode == -signal.SIGKILL


def test_it_imports_nothing_heavy():
    code = "import sys, cosmo_rl.cpgd.rewards.math_worker, math_verify; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
