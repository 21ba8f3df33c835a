"""Task math: does the response's expression equal the reference's? math-verify decides, in processes of its own.

An expression can keep sympy busy for ever or fill the memory, and a policy will write such ones sooner or later. So
each comparison has a limit of processor time and of memory, in a worker that is replaced when it exceeds one. Workers
are started as new programs, never forked: the trainer has CUDA and threads.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import wait

from .base import Failed, Outcome, Score
from .math_text import is_prose, pair

CPU_S, WALL_S = 3.0, 120.0
"""Limits of a comparison, in seconds: processor time, a property of the expressions, so that a loaded machine changes
no reward; and elapsed time, for a machine that stands still."""
MEMORY_BYTES = 1 << 30
"""Limit of a worker's address space; an idle one has 60 MiB."""
MAX_WORKERS = 4
CHECKED_GOLDS = 100
"""Reference answers that are parsed before a run."""

_OWN_FAULT = (-signal.SIGPROF, -signal.SIGSEGV, -signal.SIGABRT)
"""Exit statuses that an expression can cause: out of time; stack or memory exhausted in C."""
_MEND = r"write it as LaTeX (a word as \text{word}), or use task general, which compares texts"
_NUMBER = re.compile(r"\d(?:[\d.,/]*\d)?")


def gold_problem(gold: str | None) -> str:
    """Why a reference answer can be told to be of no use without parsing it, and the mend; "" where it cannot."""
    if not gold:
        return "task math is rewarded against `answer`, which is missing; add it"
    if is_prose(gold) and len(_NUMBER.findall(gold)) != 1:
        return f"`answer` {gold[:80]!r} is no expression, nor a text with one number; {_MEND}"
    return ""


class MathRule:
    """1 when the answer equals the reference, 0 when it does not or takes longer to compare than CPU_S.

    0, not Failed, for that: the expression is the response's own choice, and one that nobody can check within seconds
    is no answer. Were it Failed, a policy could take its bad responses out of their group, or stop the run. A reference
    that cannot be parsed is the data's fault: Failed.

    Expressions are equal by value: to the reference 6, "2 * 3" is right too. 6% is 0.06, and 6 as well: data sets and
    answers to "What percentage" leave the sign out. Units: see `math_text.pair`.
    """

    def __init__(self, workers: "Workers | None" = None) -> None:
        """
        Args:
            workers: None: of its own.
        """
        self.workers = workers or Workers()
        self._open: dict[tuple[str, str], Future[Outcome]] = {}
        self._checked: dict[str, str] = {}

    async def __call__(self, gold: str | None, answer: str) -> Outcome:
        """Outcomes asked for at once come from all workers, equal cases from one comparison.

        Args:
            gold: reference answer of the row.
            answer: the response's answer part.
        """
        problem = gold_problem(gold)
        if problem:
            return Failed(problem)
        assert gold
        read = pair(gold, answer)
        asked = self._open.get(read)
        if asked is None:
            asked = self._open[read] = self.workers.compare(*read)
            asked.add_done_callback(lambda _: self._open.pop(read, None))
        return await asyncio.wrap_future(asked)

    def problem(self, gold: str | None) -> str:
        """Why a reference is of no use, as far as it shows quickly, and the mend; "" if it is good.

        To parse 100,000 references would take minutes, so the first CHECKED_GOLDS different ones are: that finds a
        wrong field or notation. A single bad one after them is Failed when a response meets it.
        """
        problem = gold_problem(gold)
        if not problem and gold and gold not in self._checked and len(self._checked) < CHECKED_GOLDS:
            itself = self.workers.compare(*pair(gold, gold)).result()
            if itself != Score(1.0):
                why = itself.reason if isinstance(itself, Failed) else f"it is not equal to itself; {_MEND}"
                problem = f"`answer` {gold[:80]!r}: {why}"
            self._checked[gold] = problem
        return problem or self._checked.get(gold or "", "")


class Workers:
    """Processes that compare answers; started when first needed, ended with this object or its process.

    A comparison starts from a cleared cache and a fixed seed, with sets in one order, so that the outcome depends
    neither on the worker nor on what it did before. Each worker has a thread that waits for it.
    """

    def __init__(self, number: int | None = None, *, cpu_s: float = CPU_S, wall_s: float = WALL_S,
                 memory_bytes: int = MEMORY_BYTES) -> None:
        """
        Args:
            number: of processes; None: this rank's share of the CPU cores, at most MAX_WORKERS.
            cpu_s, wall_s, memory_bytes: limits, see CPU_S, WALL_S and MEMORY_BYTES.
        """
        if number is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            number = min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), MAX_WORKERS)
        self.number, self.cpu_s, self.wall_s, self.memory_bytes = number, cpu_s, wall_s, memory_bytes
        self._threads = ThreadPoolExecutor(number, "math")
        self._idle: list[subprocess.Popen[bytes]] = []
        self._all: set[subprocess.Popen[bytes]] = set()
        self._finalize = weakref.finalize(self, _kill, self._all, os.getpid())

    def compare(self, gold: str, answer: str) -> "Future[Outcome]":
        """The outcome of one comparison, to come; both as `math_verify.parse` takes them. Of any thread."""
        return self._threads.submit(self._compare, gold, answer)

    def close(self) -> None:
        """End the processes, the comparisons that are not done included; the end of the interpreter does it too."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._finalize()

    def _compare(self, gold: str, answer: str) -> Outcome:
        worker = self._free()
        assert worker.stdin and worker.stdout
        deadline, said = time.monotonic() + self.wall_s, b""
        with suppress(BrokenPipeError):  # it has died, which its reply, an end of file, will tell
            worker.stdin.write(json.dumps((gold, answer)).encode() + b"\n")
            worker.stdin.flush()
        while said[-1:] not in (b"g", b"0", b"1"):
            if not wait([worker.stdout.fileno()], max(deadline - time.monotonic(), 0)):
                self._end(worker)
                return Failed(f"math-verify was not done within {self.wall_s:g} s, {self.cpu_s:g} s of processor time "
                              "not yet used; give the machine fewer processes")
            news = os.read(worker.stdout.fileno(), 64)
            said += news
            if not news:
                status = worker.wait()
                self._end(worker)
                if status not in _OWN_FAULT:
                    return Failed(f"a worker of math-verify ended with status {status}; see its message, or free "
                                  "memory")
                return Score(0.0) if b"p" in said else Failed(f"`answer` takes too long to parse; {_MEND}")
        if b"x" in said:
            self._end(worker)
        else:
            self._idle.append(worker)
        if said[-1:] == b"g":
            return Failed(f"math-verify cannot parse `answer`; {_MEND}")
        return Score(float(said[-1:] == b"1"))

    def _free(self) -> subprocess.Popen[bytes]:
        """An idle worker that lives, or a new one."""
        with suppress(IndexError):  # not asked before: another thread may take the last one in between
            while True:
                worker = self._idle.pop()
                if worker.poll() is None:
                    return worker
                self._end(worker)
        # Python orders sets of strings by a random seed of each process, and sympy its terms by them.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "SYMPY_GROUND_TYPES": "python"}
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "cosmo_rl.cpgd.rewards.math_worker", str(os.getpid()), str(self.cpu_s),
             str(self.memory_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            start_new_session=True)  # else Ctrl-C would reach it
        self._all.add(worker)
        return worker

    def _end(self, worker: subprocess.Popen[bytes]) -> None:
        self._all.discard(worker)
        _kill([worker], os.getpid())
        assert worker.stdin and worker.stdout
        worker.stdout.close()
        with suppress(BrokenPipeError):  # an unsent request
            worker.stdin.close()


def _kill(processes: Iterable[subprocess.Popen[bytes]], owner: int) -> None:
    """The threads that wait for them then hear of their ends."""
    if os.getpid() != owner:  # a forked child of the trainer
        return
    for process in list(processes):
        process.kill()
        process.wait()
