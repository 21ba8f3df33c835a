"""What a server's client needs besides HTTP: breaker, pace, disk cache, pictures as URIs, a loop for sync code."""

import asyncio
import atexit
import base64
import io
import json
import math
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from cosmo_rl.data import strict_json
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import ImageSource, encoded, open_image

T = TypeVar("T")

MAX_PIXELS = 1280 * 28 * 28
"""Larger pictures are sent shrunk to this; what Qwen2.5-VL judges take by default."""
SOURCE_PIXELS = 1 << 26
"""Largest picture that is opened at all."""
PACE_REPLIES, PACE_FLOOR_S = 32, 1.0
"""Replies after which their usual time is known; no attempt is cut before the floor."""
CLOSE_S = 10.0
"""Longest wait for a loop to end."""


class EndpointError(UserError):
    """A call failed for good; the message names endpoint, cause and mend."""


class EndpointDown(EndpointError):
    """The call was not made: the breaker is open, for the server is taken for dead, or its first check failed."""


class Rejected(EndpointError):
    """The server takes the request for a bad one (400, 413, 422: too long, or its filter's doing); others may pass."""


class Breaker:
    """Open after `limit` failed attempts in a row, over all callers; then one probe every `probe_every_s` may pass.

    For `patience_s` seconds from its opening the other calls wait, so that a server's short absence costs no sample;
    after that they fail at once. Any success closes it. For one event loop.
    """

    def __init__(self, name: str, limit: int, probe_every_s: float, patience_s: float) -> None:
        self.name, self.limit, self.probe_every_s, self.patience_s = name, limit, probe_every_s, patience_s
        self.opened: float | None = None
        """time.monotonic() of its opening; None: closed."""
        self.failures, self.reason = 0, ""
        self._next_probe, self._closed = 0.0, asyncio.Event()

    async def admit(self) -> None:
        """Return when an attempt may be made.

        Raises:
            EndpointDown: not before the patience is over.
        """
        while self.opened is not None:
            now = time.monotonic()
            if now >= self._next_probe:
                self._next_probe = now + self.probe_every_s
                return
            self.check()
            try:
                async with asyncio.timeout(min(self._next_probe, self.opened + self.patience_s) - now):
                    await self._closed.wait()
            except TimeoutError:
                pass

    def check(self) -> None:
        """Raise EndpointDown when the breaker is open and the patience over."""
        if self.opened is not None and time.monotonic() >= self.opened + self.patience_s:
            raise EndpointDown(
                f"{self.name}: taken for dead after {self.failures} failed attempts in a row, the last: {self.reason}; "
                "start the server again")

    def failed(self, reason: str) -> bool:
        """Whether this opened it."""
        self.failures, self.reason = self.failures + 1, reason
        if self.failures < self.limit or self.opened is not None:
            return False
        self.opened = time.monotonic()
        self._next_probe = self.opened + self.probe_every_s
        self._closed.clear()
        return True

    def succeeded(self) -> None:
        self.failures, self.opened = 0, None
        self._closed.set()


class Pace:
    """How long a reply may take: `timeout_s`, and less once it is known how long replies take.

    A call that hangs holds a slot for nothing. So an attempt is cut at twice the 99th percentile of the latest replies,
    doubled with each cut of its call, and at `timeout_s` in any case. Attempts that are under way when this becomes
    known are cut too. A cut is no sign of a dead server: it may have slowed down. The percentile is a high one since
    some requests, as those with pictures, always take longer.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._seconds: deque[float] = deque(maxlen=256)
        self._usual = math.inf
        self._running: dict[asyncio.Timeout, tuple[float, float]] = {}

    def limit(self, cuts: float) -> float:
        """Seconds for an attempt of a call that was cut so often; with infinity `timeout_s`."""
        return min(max(2 * self._usual, PACE_FLOOR_S) * 2 ** cuts, self.timeout_s)

    @asynccontextmanager
    async def timed(self, cuts: float) -> AsyncIterator[None]:
        """Run an attempt; raises TimeoutError."""
        now = asyncio.get_running_loop().time
        started = now()
        async with asyncio.timeout(self.limit(cuts)) as timeout:
            self._running[timeout] = started, cuts
            try:
                yield
            finally:
                del self._running[timeout]

    def replied(self, seconds: float) -> None:
        """A good reply took so long."""
        self._seconds.append(seconds)
        if len(self._seconds) < PACE_REPLIES:
            return
        self._usual = sorted(self._seconds)[int(0.99 * len(self._seconds))]
        for timeout, (started, cuts) in self._running.items():
            when = timeout.when()
            if when is not None and not timeout.expired():
                timeout.reschedule(min(when, started + self.limit(cuts)))


class DiskCache:
    """Server replies by key, one JSON file each under two-hex folders; several processes may share it.

    Raises:
        UserError: it cannot be read or written (disk full, permissions).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Any | None:
        """The reply; None when there is none, or a corrupt one, which is deleted."""
        try:
            entry = strict_json.loads(self.path(key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"the cache {self.folder} cannot be read ({error.strerror}); give a folder that this user "
                            "may read") from error
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or entry.get("key") != key:
            self.drop(key)
            return None
        return entry.get("reply")

    def put(self, key: str, reply: Any) -> None:
        path = self.path(key)
        beside = path.with_name(f".{key}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(exist_ok=True)
            beside.write_text(json.dumps({"key": key, "reply": reply}), encoding="utf-8")
            os.replace(beside, path)
        except OSError as error:
            with suppress(OSError):  # told of already
                beside.unlink(missing_ok=True)
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"the cache {self.folder} cannot be written ({error.strerror}); free space, or give a folder "
                         "that this user may write")

    def drop(self, key: str) -> None:
        try:
            self.path(key).unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error


class LoopThread:
    """An event loop in a daemon thread: synchronous code submits calls, goes on, and collects the results later.

    Nobody waits for ever: should the thread end before its time (a SystemExit in a task does it), every call that is
    under way and every later one fails.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._open: set[Future[Any]] = set()
        self._ended, self._failing = False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="endpoint-loop", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Start `coroutine`; its result or its error comes through the future."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        if self._ended:  # or the thread, which sets it first, sees this future
            self._fail_open()
        return future

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Cancel what still runs, run `last`, end the thread; a second time it does nothing."""
        if self._loop.is_closed():
            return
        if not self._ended:
            ending = self.submit(_finish(last))
            wait([ending], timeout=CLOSE_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            if ending.done():
                ending.result()  # what it raised
        self._thread.join(timeout=CLOSE_S)
        if not self._thread.is_alive():  # else it ends with the process
            self._loop.close()
        atexit.unregister(self.close)

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._ended = True
            self._fail_open()

    def _fail_open(self) -> None:
        with self._failing:
            for future in list(self._open):
                if not future.done():
                    future.set_exception(EndpointError("the thread that makes the calls has ended; repeat the command"))


async def _finish(last: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
    await cancel_others()  # first, or they would connect again
    if last:
        await last()


async def cancel_others() -> None:
    """Cancel every other task of this loop, and wait until they have ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def data_uri(source: ImageSource, max_pixels: int = MAX_PIXELS) -> str:
    """A picture for `image_url`: a JPEG's or PNG's own bytes where every server shows them alike, else a new PNG.

    Raises:
        RowError: it cannot be opened.
    """
    image = open_image(source, SOURCE_PIXELS, "a judged row")
    if not isinstance(source, Image.Image):
        raw = encoded(source)
        with Image.open(io.BytesIO(raw)) as header:
            plain = header.mode in ("RGB", "L") and not header.has_transparency_data
            upright = header.getexif().get(0x0112, 1) == 1  # not every server turns a picture as its EXIF tag says
            if plain and upright and header.format in ("JPEG", "PNG") and image.width * image.height <= max_pixels:
                return f"data:image/{header.format.lower()};base64,{base64.b64encode(raw).decode()}"
    scale = (max_pixels / (image.width * image.height)) ** 0.5
    if scale < 1:
        size = (max(int(image.width * scale), 1), max(int(image.height * scale), 1))
        image = image.resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def retry_after(value: str, date: str = "") -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 when it is neither.

    Args:
        date: the reply's Date header: the time by the clock that set the date, which need not be ours.
    """
    try:
        if value.strip().isdecimal():
            return float(value)
        return max((parsedate_to_datetime(value) - _time_of(date)).total_seconds(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _time_of(date: str) -> datetime:
    try:
        return parsedate_to_datetime(date).astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        return datetime.now(UTC)


def picture_parts(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part for message in body.get("messages", ()) if isinstance(message["content"], list)
            for part in message["content"] if part["type"] == "image"]


def with_pictures(body: Mapping[str, Any], urls: Sequence[str]) -> dict[str, Any]:
    """`body` with its pictures, in order, as OpenAI writes them."""
    left = iter(urls)

    def shown(part: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"type": "image_url", "image_url": {"url": next(left)}} if part["type"] == "image" else part

    out = dict(body)
    if "messages" in body:
        out["messages"] = [{**m, "content": [shown(part) for part in m["content"]]}
                           if isinstance(m["content"], list) else m for m in body["messages"]]
    return out
