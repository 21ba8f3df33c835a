"""A user's own reward: `--reward.function FILE:NAME`, called as (row, response), plain or `async def`.

    returns a float in [0, 1]   the term's value; an int is one, a bool or another library's number is not
            None                it says nothing about this row; the other terms' weights are renormalised
            a str               why no value could be had: Failed
    raises  anything            Failed, with the traceback in the log, once for each place that raises

`response` is all of the text, thinking included (`row` is a `cosmo_rl.data.schema.Row`). The same arguments must give
the same value, or a resumed run differs. A plain function is called in the trainer's own thread, one response after the
other as each batch is sampled, without a limit of time. An `async def` one is called while sampling goes on, as judges
are, for IN_FLIGHT responses of each rank at once and LIMIT_S seconds each; it must not block the event loop.

FILE may import the modules beside it, by their plain names; an installed package of the same name comes first. A run
that is resumed with another content of FILE, or of those modules, goes on (they were mended, say) and tells it.
"""

import asyncio
import hashlib
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch

from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import Row
from cosmo_rl.data.terminal import printable, shortened

from ..rollout.values import Response
from .base import Failed, NotApplicable, Outcome, Score

logger = logging.getLogger(__name__)
OPTION = "--reward.function"
IN_FLIGHT = 64
"""Calls of an async function under way at a time, on each rank."""
LIMIT_S = 600.0
"""Longest that one call of an async function may take, in seconds."""
MOST_TOLD = 10
"""Tracebacks that a process logs."""
_MODULE = "_reward_function_"
_REASON, _TRACE = 300, 6000
"""Characters of a reason, and of a traceback."""


class UserFunction:
    """The term of a user's function. A plain one blocks: `Scorer.submit` calls `now` in its caller's thread."""

    def __init__(self, call: Callable[..., Any], *, path: Path, digest: str, tasks: Collection[str] = ()) -> None:
        """
        Args:
            call: takes (row, response).
            path: of its file. digest: of what the file and its siblings hold.
            tasks: of the rows that it scores; none: all.
        """
        self.call, self.path, self.digest, self.tasks = call, path, digest, frozenset(tasks)
        self.waits = inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)
        """It is async."""
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._told: set[tuple[object, ...]] = set()

    def scores(self, row: Row) -> bool:
        """Whether the row's task is one of its tasks."""
        return not self.tasks or row.task in self.tasks

    async def __call__(self, response: Response) -> Outcome:
        return await self.ask(response.row, response.text)

    def now(self, row: Row, response: str) -> Outcome:
        """The outcome for one response, of a plain function."""
        return self._outcome(attempt(lambda: self.call(row, response))) if self.scores(row) else NotApplicable()

    async def ask(self, row: Row, response: str) -> Outcome:
        """The outcome for one response, of a plain function or an async one."""
        if not self.waits or not self.scores(row):
            return self.now(row, response)

        async def guarded() -> object:
            try:
                return await self.call(row, response)
            except SystemExit as error:  # would end the event loop, and with it every judge
                return error

        try:
            async with self._slots, asyncio.timeout(LIMIT_S):
                # What it raises becomes a value; to be cancelled, as when the run ends, goes on as it should.
                [said] = await asyncio.gather(guarded(), return_exceptions=True)
        except TimeoutError:
            return Failed(f"no outcome within {LIMIT_S:g} s; give its calls a shorter limit of their own")
        return self._outcome(said)

    def _outcome(self, said: object) -> Outcome:
        if isinstance(said, BaseException):
            self._log(said)
            return Failed(_cut(f"{_one_line(said)} ({_place(said, self.path)})"))
        return outcome_of(said)

    def _log(self, error: BaseException) -> None:
        trace = _own(error.__traceback__, self.path)
        places = tuple((frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(trace))
        key = (type(error), *places[:1], *places[-1:])  # a recursion differs in its depth
        if key in self._told or len(self._told) > MOST_TOLD:
            return
        self._told.add(key)
        if len(self._told) > MOST_TOLD:
            logger.error("%s raised in more than %d places; further tracebacks are not shown", OPTION, MOST_TOLD)
            return
        frames = "".join(traceback.format_exception(type(error), error, trace)).rstrip()
        logger.error("%s raised, and the response is left out of its group; told once for each place:\n%s", OPTION,
                     printable(shortened(frames, _TRACE), keep="\n"))


def outcome_of(said: object) -> Outcome:
    """What a function's return value means; never clipped or converted but from an int."""
    if said is None:
        return NotApplicable()
    if isinstance(said, str):
        return Failed(_cut(said) or "the function gave an empty reason; say what is wrong, or return None")
    if inspect.isawaitable(said):
        if inspect.iscoroutine(said):
            said.close()  # or Python warns that it was never awaited
        return Failed("the function returned something to await; write it as `async def`")
    if isinstance(said, int | float) and not isinstance(said, bool):
        if 0 <= said <= 1:
            return Score(float(said))
        shown = repr(float(said)) if not abs(said) > 1e300 else "a number beyond 1e300"
        return Failed(f"the function returned {shown}; map it to [0, 1]")
    kind = f"{type(said).__module__}.{type(said).__qualname__}".removeprefix("builtins.")
    return Failed(f"the function returned a value of type {kind}; return float(...) of it, None, or a reason as text")


def attempt(users: Callable[[], object]) -> object:
    """What a user's code returns, or what it raised, as a value. It may have switched gradients off: not for us."""
    try:
        with torch.no_grad():  # restores what was
            return users()
    # The one broad except of the trainer: this code is not ours and may raise anything, which is told with its
    # traceback. sys.exit() in it must not end a rank. KeyboardInterrupt and cancellation go on.
    except (Exception, SystemExit) as error:
        return error


def load_function(option: str, tasks: Collection[str] = ()) -> UserFunction:
    """The function of "FILE:NAME".

    Raises:
        UserError: FILE is missing or cannot be read, does not compile or raises while it is imported; it has no NAME,
            or NAME cannot be called with (row, response).
    """
    file, _, name = option.rpartition(":")
    path = Path(os.path.abspath(os.path.expanduser(file)))
    where = f"{OPTION} {option}"
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: {file} cannot be read ({error.strerror}); give a Python file as "
                        "FILE:NAME") from error
    digest = hashlib.blake2b(source, digest_size=8)
    module = ModuleType(_MODULE + digest.hexdigest())
    module.__file__ = str(path)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: no sibling stands in the way of what others import
    sys.modules[module.__name__] = module  # dataclasses look their module up there

    def run() -> None:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)

    error = attempt(run)
    if isinstance(error, BaseException):
        sys.modules.pop(module.__name__, None)
        raise UserError(_cut(f"{where}: {_place(error, path)}: {_one_line(error)}", 2 * _REASON)
                        + "; mend the file, or install what it imports") from error
    for sibling in _siblings(path):
        digest.update(sibling.name.encode() + b"\0" + hashlib.blake2b(sibling.read_bytes()).digest())
    if not hasattr(module, name):
        near = [key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ ==
                module.__name__]
        raise UserError(f"{where}: {file} has no {name}; " + (
            f"its functions are {', '.join(near[:5])}" if near else "define it there"))
    call = getattr(module, name)
    _check_call(call, where)
    return UserFunction(call, path=path, digest=digest.hexdigest(), tasks=tasks)


def _check_call(call: object, where: str) -> None:
    if inspect.isclass(call):
        raise UserError(f"{where} is a class; give an instance of it, as NAME = {call.__name__}()")
    if not callable(call):
        raise UserError(f"{where} is a value of type {type(call).__name__}, which cannot be called; give a function")
    own = [call, type(call).__call__]
    if any(inspect.isgeneratorfunction(one) or inspect.isasyncgenfunction(one) for one in own):
        raise UserError(f"{where} is a generator (it holds `yield`); return the value")
    try:
        signature = inspect.signature(call)
    except ValueError:  # some builtins have none that could be looked at; a call will tell
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise UserError(f"{where} takes {signature}, and is called as (row, response); give it these two "
                        "parameters") from error


def _siblings(path: Path) -> list[Path]:
    """Files of the modules that lie beside `path` and are imported, but for the program itself."""
    files = [getattr(module, "__file__", None) for name, module in list(sys.modules.items())
             if name != "__main__" and not name.startswith(_MODULE)]
    found = {Path(os.path.abspath(file)) for file in files if isinstance(file, str)}
    return sorted(one for one in found if one.parent == path.parent and one.is_file())


def _own(trace: TracebackType | None, path: Path) -> TracebackType | None:
    """The traceback from the first frame in the user's file on; all of it where none is."""
    inner = trace
    while inner is not None and inner.tb_frame.f_code.co_filename != str(path):
        inner = inner.tb_next
    return inner or trace


def _place(error: BaseException, path: Path) -> str:
    """FILE:LINE of the last frame in the user's file, or of a syntax error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__)
             if frame.f_code.co_filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _one_line(error: BaseException) -> str:
    """TYPE: MESSAGE; safe where the exception's own str() raises."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    return traceback.format_exception_only(type(error), error)[-1].strip()


def _cut(text: str, length: int = _REASON) -> str:
    text = printable(" ".join(text.split()))
    return text if len(text) <= length else text[:length] + "..."
