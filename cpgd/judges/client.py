"""Client of OpenAI-compatible servers (vLLM, SGLang): chat completions and /classify, many calls at a time.

A call:     disk cache -> openai, which makes attempts until one succeeds -> disk cache
An attempt: slot (bounded number in flight) -> breaker -> HTTP, within the time that replies usually take -> strict read

An attempt fails by a time-out, a broken connection, 408, 429, 5xx and whatever replies.py refuses. Between attempts
openai waits: as long as `_Tries.wait_s` says. Other statuses are answers, and end the call.

An API key comes from an environment variable only. It is in no message, log line or cache entry, and openai does not
know it: requests are made here of method, URL and body, so that nothing else that openai finds in the environment (a
key for OpenAI's servers, an organization, custom headers) goes to a judge.
"""

import asyncio
import base64
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import ssl
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
from PIL import Image

from cosmo_rl.data import strict_json
from cosmo_rl.data.errors import MissingPackage, UserError
from cosmo_rl.data.schema import ImageSource, encoded, open_image
from cosmo_rl.data.terminal import printable

from . import replies
from .replies import AttemptError, ChatReply, DiskCache, short, without_key
from .spec import BASE, VARIABLE, base_url

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Messages = Sequence[Mapping[str, Any]]
"""OpenAI chat messages; a picture is a part {"type": "image", "image": ImageSource}."""

MAX_PIXELS = 1280 * 28 * 28
"""Larger pictures are sent shrunk to this; what Qwen2.5-VL judges take by default."""
SOURCE_PIXELS = 1 << 26
"""Largest picture that is opened at all."""
KEPT_PICTURES = 32
"""Encoded pictures held in memory: the responses of a group share theirs."""
PACE_REPLIES, PACE_FLOOR_S = 32, 1.0
"""Replies after which their usual time is known; no attempt is cut before the floor."""
BACKOFF_S, DOUBLINGS, MAX_PAUSE_S = 0.25, 6, 120.0
"""Longest wait after a first failure, how often it is doubled at most, and the longest pause that openai keeps."""

for _name in ("openai", "httpx2"):  # at INFO they write a line a call, a thousand a rollout
    logging.getLogger(_name).setLevel(logging.WARNING)


class EndpointError(UserError):
    """A call failed for good; the message names endpoint, cause and mend."""


class EndpointDown(EndpointError):
    """The call was not made: the breaker is open, for the server is taken for dead, or its first check failed."""


class Rejected(EndpointError):
    """The server takes the request for a bad one (400, 413, 422: too long, or its filter's doing); others may pass."""


class Endpoint:
    """One model of one server. All calls must come from one event loop."""

    def __init__(
        self, url: str, model: str, *, api_key_env: str = "", max_in_flight: int = 32, timeout_s: float = 60.0,
        attempts: int = 8, cache_dir: str | Path | None = None, breaker_failures: int = 20, probe_every_s: float = 5.0,
        patience_s: float = 30.0, max_pixels: int = MAX_PIXELS, extra_body: Mapping[str, Any] | None = None,
        verify_first: bool = False,
    ) -> None:
        """
        Args:
            url: http://HOST:PORT, with or without /v1.
            model: name under which the server serves it.
            api_key_env: name of the environment variable with the key; empty: none is sent.
            max_in_flight: most HTTP requests at a time, of this process.
            timeout_s: longest wait for one whole reply, in seconds; see `Pace`.
            attempts: most failed attempts of a call while the server is taken for alive.
            cache_dir: folder of the disk cache; None: none.
            breaker_failures, probe_every_s, patience_s: see `Breaker`.
            max_pixels: larger pictures are shrunk to this.
            extra_body: added to each request, as {"chat_template_kwargs": {"enable_thinking": False}}.
            verify_first: `verify` before the first call that the cache does not answer.
        Raises:
            UserError: a URL that is none or holds a password, a key variable without a key, a number below 1.
            MissingPackage: openai is not installed.
        """
        if max_in_flight < 1 or attempts < 1 or timeout_s <= 0:
            raise UserError(f"max_in_flight {max_in_flight}, attempts {attempts}, timeout_s {timeout_s}: give at "
                            "least 1, at least 1, more than 0")
        self.url, self.model = base_url(url), model
        self.key = _read_key(api_key_env, self.url)
        try:
            import openai  # takes a second, for which runs without judges need not wait
        except ImportError as error:
            raise MissingPackage("judges and endpoints are asked through openai: pip install openai") from error
        self._openai = openai
        self.max_in_flight, self.attempts, self.pace = max_in_flight, attempts, Pace(timeout_s)
        self.max_pixels, self.extra_body = max_pixels, dict(extra_body or {})
        self.cache = None if cache_dir is None else DiskCache(cache_dir)
        self.breaker = Breaker(str(self), breaker_failures, probe_every_s, patience_s)
        self.counts: Counter[str] = Counter()
        """Calls, and of these cached, answered, failed; retried, the attempts that failed, and each `AttemptError.kind`
        of them; opened, how often the breaker did."""
        self.seconds = 0.0
        """Of the attempts that succeeded."""
        self.slots = asyncio.Semaphore(max_in_flight)
        # Of calls, those between two attempts included: so few that a retry does not queue behind the whole rollout,
        # and that few pictures are in memory.
        self._calls = asyncio.Semaphore(2 * max_in_flight)
        self._pictures: dict[Any, tuple[ImageSource, str]] = {}
        self._encoding, self._verifying, self._unverified = asyncio.Lock(), asyncio.Lock(), verify_first
        self._client: AsyncOpenAI | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __str__(self) -> str:
        return f"{self.url} (model {self.model})"

    async def aclose(self) -> None:
        """Close the connections; a later call, from any one loop, opens others."""
        client, self._client, self._loop = self._client, None, None
        if client is not None:
            await client.close()

    async def chat(self, messages: Messages, *, max_tokens: int, temperature: float = 0.0, top_logprobs: int = 0,
                   prompt_hash: str = "", keep: Callable[[ChatReply], bool] = lambda reply: True,
                   seed: int | None = None) -> ChatReply:
        """One chat completion.

        Args:
            messages: see Messages.
            top_logprobs: how many of the likeliest tokens to ask for; 0: none.
            prompt_hash: further part of the cache key, for the prompt that `messages` was made from.
            keep: which replies to cache; a cached one for which it does not hold is asked for again.
            seed: of the server's sampling, where `temperature` is above 0.
        Raises:
            EndpointError: refused, or failed `attempts` times; EndpointDown: not made, the server is dead.
            RowError: a picture cannot be opened.
        """
        body: dict[str, Any] = {"messages": messages, "max_tokens": max_tokens, "temperature": temperature}
        if seed is not None:
            body["seed"] = seed
        if top_logprobs:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        return await self._call(replies.CHAT, body, prompt_hash, keep)

    async def classify(self, text: str, *, prompt_hash: str = "") -> tuple[float, ...]:
        """Outputs of a pooling model: after its activation (vLLM; raw with extra_body={"use_activation": False}), or
        the raw head (SGLang).

        Raises:
            EndpointError: as `chat`.
        """
        body = {"input": text, "text": text}  # vLLM reads `input`, SGLang's native route `text`
        return await self._call(replies.CLASSIFY, body, prompt_hash)

    async def verify(self) -> None:
        """Ask the server which models it serves. SGLang answers to any name, so no reply of its would show a wrong one.

        Raises:
            EndpointError: the model is not among them, or the server cannot be reached.
        """
        _, served = await self._ask(replies.MODELS)
        if self.model not in served:
            raise EndpointError(f"{self}: the server does not serve this model but "
                                f"{short(', '.join(map(printable, served))) or 'none'}; ask for one of these, or serve "
                                "it under this name (--served-model-name)")

    async def _call(self, path: str, body: dict[str, Any], prompt_hash: str,
                    keep: Callable[[Any], bool] = lambda reply: True) -> Any:
        """What the reply says, from the cache or from the server."""
        async with self._calls:
            self.counts["calls"] += 1
            if path == replies.CHAT:
                body["messages"] = [await self._shown(message) for message in body["messages"]]
            wire = json.dumps({"model": self.model, **body, **self.extra_body}, sort_keys=True).encode()
            key = hashlib.blake2b(b"\0".join((path.encode(), prompt_hash.encode(), wire)), digest_size=20).hexdigest()
            found = self.cache.get(key) if self.cache else None
            if found is not None and self.cache:
                with suppress(AttemptError):  # by another version, or by hand
                    reply = replies.read(path, found, self.model, cached=True)
                    if keep(reply):
                        self.counts["cached"] += 1
                        return reply
                self.cache.drop(key)
            try:
                await self._verify_first()
                payload, reply = await self._ask(path, wire)
            except EndpointError:
                self.counts["failed"] += 1
                raise
            self.counts["answered"] += 1
            if self.cache and keep(reply):
                self.cache.put(key, payload)
            return reply

    async def _verify_first(self) -> None:
        async with self._verifying:
            try:
                if self._unverified:
                    await self.verify()
            except EndpointError as error:
                raise EndpointDown(str(error)) from error
            self._unverified = False

    async def _shown(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A chat message with its pictures as OpenAI writes them."""
        if isinstance(message["content"], str):
            return message
        return {**message, "content": [
            {"type": "image_url", "image_url": {"url": await self._picture(part["image"])}}
            if part["type"] == "image" else part for part in message["content"]]}

    async def _picture(self, source: ImageSource) -> str:
        """Its data URI; the last few are kept."""
        at = source if isinstance(source, str) else id(source)  # `source` is kept with it, so the id stays its own
        async with self._encoding:
            if at not in self._pictures:
                self._pictures[at] = source, await asyncio.to_thread(data_uri, source, self.max_pixels)
                if len(self._pictures) > KEPT_PICTURES:
                    del self._pictures[next(iter(self._pictures))]
            return self._pictures[at][1]

    async def _ask(self, path: str, wire: bytes | None = None) -> tuple[Any, Any]:
        """JSON of the first good reply to `wire` (None: to a GET), and what it says."""
        self.breaker.check()  # a dead server's calls are many: each ends at once
        loop = asyncio.get_running_loop()
        assert self._loop in (None, loop), "an Endpoint is used from one event loop, until aclose"
        if self._client is None:
            try:
                http = _Http(self)
            except (ValueError, ImportError, OSError):  # their texts may hold the proxy's password
                raise EndpointError(f"{self}: a proxy (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) or SSL_CERT_FILE in the "
                                    "environment cannot be used; correct it, or name the host in NO_PROXY") from None
            self._loop, self._client = loop, self._openai.AsyncOpenAI(
                api_key="none", base_url=self.url, max_retries=self.attempts - 1, timeout=None, http_client=http)
        _TRIES.set(tries := _Tries())
        try:
            response = await (self._client.get(path, cast_to=httpx2.Response) if wire is None else
                              self._client.post(path, cast_to=httpx2.Response, content=wire))
        except self._openai.APIStatusError:
            raise EndpointError(f"{self}: {tries.failed} attempts failed, the last: {tries.last}; "
                                f"{tries.last.mend}") from None
        return response.extensions["reply"]


class _Tries:
    """The attempts of one call that failed; `cuts` as in `Pace.limit`."""

    last: AttemptError

    def __init__(self) -> None:
        self.failed = self.cuts = 0

    def failing(self, problem: AttemptError) -> None:
        self.failed, self.cuts, self.last = self.failed + 1, self.cuts + (problem.kind == "cut"), problem

    @property
    def wait_s(self) -> float:
        """The server's pause and a backoff, drawn from 0 up so that calls which failed at once do not return at once.

        openai's own begins at half a second, and the last calls of a rollout wait for nothing else.
        """
        backoff_s = _JITTER.uniform(0.0, BACKOFF_S * 2 ** min(self.failed - 1, DOUBLINGS))
        return min(self.last.wait_s + backoff_s, max(self.last.wait_s, MAX_PAUSE_S))


_JITTER = random.Random()  # not the process's own, on whose state a run may depend
_TRIES: ContextVar[_Tries] = ContextVar("tries")  # openai tells one call from another to nobody


class _Http(httpx2.AsyncClient):
    """What openai sends through: each of its requests is an attempt."""

    def __init__(self, endpoint: Endpoint) -> None:
        # Below the 5 s of vLLM's uvicorn: no connection is used while the server is closing it. Without https no
        # certificates are needed, and loading them takes long.
        super().__init__(limits=httpx2.Limits(max_connections=endpoint.max_in_flight, keepalive_expiry=2.0),
                         timeout=None, verify=endpoint.url.startswith("https"))
        self.endpoint = endpoint
        self.allowed = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "cosmo-rl"}
        if endpoint.key:
            self.allowed["Authorization"] = f"Bearer {endpoint.key}"

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """200 with the `_exchange` as extension where the attempt succeeded; else 503, so that openai makes another.

        While the server is taken for dead it does not end: a server's absence is no call's fault, and the breaker's
        patience bounds it.
        """
        end, tries = self.endpoint, _TRIES.get()
        bare = httpx2.Request(request.method, request.url, headers=self.allowed, content=request.content)
        while True:
            async with end.slots:
                await end.breaker.admit()
                started = time.monotonic()
                try:
                    # A probe has all the time there is: a server that comes back may be slow at first.
                    async with end.pace.timed(tries.cuts if end.breaker.opened is None else math.inf):
                        reply = await self._exchange(bare)
                except AttemptError as error:
                    problem = error
                else:
                    end.breaker.succeeded()
                    end.seconds += time.monotonic() - started
                    return httpx2.Response(200, request=request, extensions={"reply": reply})
            end.counts.update(("retried", problem.kind))
            if problem.kind == "http_429":  # by a living server: it counts for nothing, but closes the breaker
                if end.breaker.opened is not None:
                    end.breaker.succeeded()
            elif problem.kind != "cut":
                end.counts["opened"] += end.breaker.failed(str(problem))
            if end.breaker.opened is None:
                tries.failing(problem)
                return httpx2.Response(503, request=request, headers={"Retry-After": f"{tries.wait_s:.9f}"})

    async def _exchange(self, request: httpx2.Request) -> tuple[Any, Any]:
        """(JSON of the reply, what it says)

        Raises:
            AttemptError: another attempt may succeed; EndpointError: none will.
        """
        end = self.endpoint
        said = lambda text: short(without_key(text, end.key))
        self.cookies.clear()  # none is sent; they would pile up
        try:
            response = await super().send(request, stream=True, follow_redirects=False)  # the key is for this server
            async with aclosing(response):
                text = await replies.read_text(response)
        except (httpx2.RequestError, ssl.SSLError, anyio.EndOfStream) as error:  # as openai has them
            raise AttemptError("connection", said(f"{type(error).__name__} {error}"),
                               "see that the server runs and that the URL is right") from None
        path = next(path for path in replies.PATHS if request.url.path.endswith(path))
        status = response.status_code
        if status == 200:
            try:
                payload = without_key(strict_json.loads(text, parse_constant=int), end.key)  # int("NaN") raises
            except ValueError:
                raise AttemptError("no_json", f"the reply is no JSON: {said(text)!r}", BASE) from None
            return payload, replies.read(path, payload, end.model)
        problem = f"HTTP {status} {said(replies.message_of(text))!r}"
        if status in (408, 429) or status >= 500:
            raise AttemptError(f"http_{status}", problem, *replies.pause_of(response.headers))
        end.breaker.succeeded()  # it lives
        end.counts[f"http_{status}"] += 1
        kind = Rejected if status in (400, 413, 422) else EndpointError
        raise kind(f"{end}: {path} {problem}; {replies.mend_of(status)}")


class Breaker:
    """Open after `limit` failed attempts in a row, over all callers; then one probe every `probe_every_s` may pass.

    A server that fails now and then never opens it. For `patience_s` seconds from its opening the other calls wait, so
    that a server's short absence costs no sample; after that they fail at once. Any success closes it.
    """

    def __init__(self, name: str, limit: int, probe_every_s: float, patience_s: float) -> None:
        self.name, self.limit, self.probe_every_s, self.patience_s = name, limit, probe_every_s, patience_s
        self.opened: float | None = None
        """time.monotonic() of its opening; None: closed."""
        self.failures, self.reason, self._next_probe = 0, "", 0.0

    def check(self) -> None:
        """Raise EndpointDown when the patience is over, and no probe is due."""
        if self.opened is not None and self.opened + self.patience_s <= time.monotonic() < self._next_probe:
            raise EndpointDown(f"{self.name}: taken for dead after {self.failures} failed attempts in a row, the last: "
                               f"{self.reason}; start the server again")

    async def admit(self) -> None:
        """Return when an attempt may be made; raises as `check`."""
        while self.opened is not None and time.monotonic() < self._next_probe:
            self.check()
            await asyncio.sleep(0.05)
        self._next_probe = time.monotonic() + self.probe_every_s

    def failed(self, reason: str) -> bool:
        """Whether this opened it."""
        self.failures, self.reason = self.failures + 1, reason
        self._next_probe = time.monotonic() + self.probe_every_s
        if self.failures < self.limit or self.opened is not None:
            return False
        self.opened = time.monotonic()
        return True

    def succeeded(self) -> None:
        self.failures, self.opened = 0, None


class Pace:
    """How long a reply may take: `timeout_s`, and less once it is known how long replies take.

    A call that hangs holds a slot for nothing. So an attempt is cut at twice the 99th percentile of the latest replies,
    doubled with each cut of its call, and at `timeout_s` in any case. Attempts that are under way when this becomes
    known are cut too. A cut is no sign of a dead server: it may have slowed down. The percentile is a high one since
    some requests, as those with pictures, always take longer. (httpx2's own time-outs start again with each byte.)
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
        """Around an attempt; raises AttemptError when it is cut, and learns from one that ends well."""
        now = asyncio.get_running_loop().time
        started = now()
        try:
            async with asyncio.timeout(self.limit(cuts)) as timeout:
                self._running[timeout] = started, cuts
                try:
                    yield
                finally:
                    del self._running[timeout]
        except TimeoutError:
            seconds = min(now() - started, self.timeout_s)
            raise AttemptError("cut" if seconds < 0.99 * self.timeout_s else "timeout",
                               f"no reply within {seconds:.3g} s", "allow more time, or start more servers") from None
        self.replied(now() - started)

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


def _read_key(name: str, url: str) -> str:
    if not name:
        return ""
    if not re.fullmatch(VARIABLE, name):  # perhaps the key itself: not repeated
        raise UserError(f"the key of {url} is given by the NAME of an environment variable, in capitals, as JUDGE_KEY")
    key = os.environ.get(name, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the environment variable {name} holds no key for {url}; export it, without spaces")
    return key
