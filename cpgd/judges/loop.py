"""A thread for asynchronous calls, beside a program that is none."""

import asyncio
import atexit
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

CLOSE_S = 10.0
"""Longest wait for a loop to end."""


class LoopThread:
    """An event loop in a daemon thread: synchronous code submits calls, goes on, and collects the results later."""

    def __init__(self) -> None:
        self._loop, self._closing = asyncio.new_event_loop(), False
        self._thread = threading.Thread(target=self._run, name="endpoint-loop", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Start `coroutine`; its result or its error comes through the future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Cancel what still runs, then run `last`, and end the thread; a second time it does nothing."""
        if self._closing:
            return
        atexit.unregister(self.close)
        ending = self.submit(_finish(last))
        wait([ending], timeout=CLOSE_S)
        self._closing = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=CLOSE_S)
        if not self._thread.is_alive():  # else it ends with the process
            self._loop.close()
        if ending.done():
            ending.result()  # what it raised

    def _run(self) -> None:
        while not self._closing:
            with suppress(SystemExit, KeyboardInterrupt):  # by a task: its own call fails of it, and no other
                self._loop.run_forever()


async def _finish(last: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:  # before `last`, or they would connect again
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    if last:
        await last()
