"""Task math: does the response's expression equal the reference's? math-verify decides, in processes of its own.

An expression can keep sympy busy for ever or fill the memory, and a policy will write such ones sooner or later. So
each comparison has a limit of processor time and of memory, in a worker that is replaced when it exceeds one. Workers
are started as new programs, never forked: the trainer has CUDA and threads.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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
        self._workers = workers or Workers()
        self._prepared: dict[tuple[str, str], Outcome] = {}
        self._checked: dict[str, str] = {}

    def __call__(self, gold: str | None, answer: str) -> Outcome:
        """
        Args:
            gold: reference answer of the row.
            answer: the response's answer part.
        """
        problem = gold_problem(gold)
        if problem:
            return Failed(problem)
        assert gold
        read = pair(gold, answer)
        return self._prepared[read] if read in self._prepared else self._workers.compare([read])[0]

    def prepare(self, cases: Iterable[tuple[str | None, str]]) -> None:
        """Compare (gold, answer) cases at once, in all workers; their outcomes are kept until the next call."""
        wanted = list(dict.fromkeys(pair(gold, answer) for gold, answer in cases
                                    if gold and not gold_problem(gold)))
        self._prepared = dict(zip(wanted, self._workers.compare(wanted), strict=True))

    def problem(self, gold: str | None) -> str:
        """Why a reference is of no use, as far as it shows quickly, and the mend; "" if it is good.

        To parse 100,000 references would take minutes, so the first CHECKED_GOLDS different ones are: that finds a
        wrong field or notation. A single bad one after them is Failed when a response meets it.
        """
        problem = gold_problem(gold)
        if not problem and gold and gold not in self._checked and len(self._checked) < CHECKED_GOLDS:
            itself = self._workers.compare([pair(gold, gold)])[0]
            if itself != Score(1.0):
                why = itself.reason if isinstance(itself, Failed) else f"it is not equal to itself; {_MEND}"
                problem = f"`answer` {gold[:80]!r}: {why}"
            self._checked[gold] = problem
        return problem or self._checked.get(gold or "", "")


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    index: int = 0
    """Of the pair that it compares."""
    deadline: float = 0.0
    """time.monotonic() at which it is given up."""
    said: bytes = field(default=b"")
    """Its reply so far."""

    @property
    def replies(self) -> int:
        assert self.process.stdout
        return self.process.stdout.fileno()


class Workers:
    """Processes that compare answers, for one thread; started when first needed, ended with this object or its process.

    A comparison starts from a cleared cache and a fixed seed, with sets in one order, so that the outcome depends
    neither on the worker nor on what it did before.
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
        self._idle: list[_Worker] = []
        self._all: set[subprocess.Popen[bytes]] = set()
        self.close = weakref.finalize(self, _end, self._all, os.getpid())
        """Ends the processes; the end of this object or of the interpreter does it too."""

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Outcome]:
        """Outcome of each (gold, answer), both as `math_verify.parse` takes them."""
        outcomes: dict[int, Outcome] = {}
        open_, busy = list(enumerate(pairs))[::-1], set[_Worker]()
        try:
            while open_ or busy:
                while open_ and len(busy) < self.number:
                    index, pair = open_.pop()
                    worker = self._free()
                    worker.index, worker.deadline, worker.said = index, time.monotonic() + self.wall_s, b""
                    busy.add(worker)
                    _send(worker.process, pair)
                first = min(worker.deadline for worker in busy)
                ready = wait([worker.replies for worker in busy], max(first - time.monotonic(), 0))
                for worker in list(busy):
                    outcome = self._hear(worker, worker.replies in ready)
                    if outcome:
                        outcomes[worker.index] = outcome
                        busy.remove(worker)
        finally:
            for worker in busy:  # after an interrupt; its late reply must not be taken for the next one's
                self._end(worker)
        return [outcomes[i] for i in range(len(pairs))]

    def _hear(self, worker: _Worker, ready: bool) -> Outcome | None:
        """The outcome, once there is one; the worker is then idle or ended."""
        if not ready:
            if time.monotonic() < worker.deadline:
                return None
            self._end(worker)
            return Failed(f"math-verify was not done within {self.wall_s:g} s, {self.cpu_s:g} s of processor time not "
                          "yet used; give the machine fewer processes")
        news = os.read(worker.replies, 64)
        worker.said += news
        if not news:
            status = worker.process.wait()
            self._end(worker)
            if status not in _OWN_FAULT:
                return Failed(f"a worker of math-verify ended with status {status}; see its message, or free memory")
            return Score(0.0) if b"p" in worker.said else Failed(f"`answer` takes too long to parse; {_MEND}")
        if worker.said[-1:] not in b"g01":
            return None
        if b"x" in worker.said:
            self._end(worker)
        else:
            self._idle.append(worker)
        said = worker.said[-1:]
        return Failed(f"math-verify cannot parse `answer`; {_MEND}") if said == b"g" else Score(float(said == b"1"))

    def _free(self) -> _Worker:
        """An idle worker that lives, or a new one."""
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                return worker
            self._end(worker)
        # Python orders sets of strings by a random seed of each process, and sympy its terms by them.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "SYMPY_GROUND_TYPES": "python"}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cosmo_rl.cpgd.rewards.math_worker", str(os.getpid()), str(self.cpu_s),
             str(self.memory_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            start_new_session=True)  # else Ctrl-C would reach it
        self._all.add(process)
        return _Worker(process)

    def _end(self, worker: _Worker) -> None:
        self._all.discard(worker.process)
        _end([worker.process], os.getpid())


def _send(process: subprocess.Popen[bytes], pair: tuple[str, str]) -> None:
    assert process.stdin
    try:
        process.stdin.write(json.dumps(pair).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has died, which its reply, an end of file, will tell


def _end(processes: Iterable[subprocess.Popen[bytes]], owner: int) -> None:
    if os.getpid() != owner:  # a forked child of the trainer
        return
    for process in list(processes):
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe:
                    pipe.close()
            except BrokenPipeError:
                pass  # an unsent request
