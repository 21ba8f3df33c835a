"""Client of an OpenAI-compatible server (vLLM, SGLang): chat completions and /classify, many calls at a time.

A call:  disk cache -> slot (bounded number in flight) -> breaker -> HTTP attempt -> check of the reply -> disk cache

Retried, with full-jitter exponential backoff: time-outs, broken connections, 408, 429, 5xx, and replies that are cut
off, no JSON, of another format or by another model. Other statuses are answers, and end the call at once. The breaker
counts failed attempts in a row over all callers: a server that fails now and then never opens it, a dead one soon does.
A 429 comes from a living server: it counts for nothing, and closes the breaker where it is open.

An API key comes from an environment variable only. It is in no repr, message, log line or cache entry.
"""

import asyncio
import hashlib
import json
import logging
import math
import os
import random
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any, TypeVar

import httpx

from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import ImageSource

from .endpoint_parts import (
    MAX_PIXELS,
    Breaker,
    DiskCache,
    EndpointDown,
    EndpointError,
    LoopThread,
    Pace,
    Rejected,
    data_uri,
    picture_parts,
    retry_after,
    with_pictures,
)
from .endpoint_replies import (
    AttemptError,
    ChatReply,
    message_of,
    read_chat,
    read_json,
    read_models,
    read_scores,
    read_text,
    short,
    without_key,
)
from .endpoint_spec import BASE, base_url

__all__ = ["ChatReply", "Endpoint", "EndpointDown", "EndpointError", "LoopThread", "Messages", "Rejected"]

T = TypeVar("T")
Messages = Sequence[Mapping[str, Any]]
"""OpenAI chat messages; a picture is a part {"type": "image", "image": ImageSource}."""

BACKOFF_S, MAX_BACKOFF_S = 0.25, 20.0
"""Longest first backoff, doubled with each failure, and the cap; drawn uniformly from 0 up."""
MAX_RETRY_AFTER_S = 120.0
"""A server that asks for a longer pause has failed the call."""
KEPT_PICTURES = 32
"""Encoded pictures held in memory."""

_KEY = "name the environment variable that holds this server's key"
_MENDS = {401: _KEY, 403: _KEY, 404: f"{BASE}, and a model that it serves", 405: BASE, 413: "send smaller pictures",
          **dict.fromkeys((301, 302, 303, 307, 308), "redirects are not followed: give the URL that it leads to")}

logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it writes a line a call, a thousand a rollout


class Endpoint:
    """One model of one server. All calls must come from one event loop."""

    def __init__(
        self, url: str, model: str, *, api_key_env: str = "", max_in_flight: int = 32, timeout_s: float = 60.0,
        attempts: int = 8, cache_dir: str | Path | None = None, breaker_failures: int = 20, probe_every_s: float = 5.0,
        patience_s: float = 30.0, max_pixels: int = MAX_PIXELS, extra_body: Mapping[str, Any] | None = None,
        seed: int = 0, verify_first: bool = False,
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
            seed: of the backoff's jitter.
            verify_first: `verify` before the first call that the cache does not answer.
        Raises:
            UserError: a URL that is none or holds a password, a key variable without a key, a number below 1.
        """
        if max_in_flight < 1 or attempts < 1 or timeout_s <= 0:
            raise UserError(f"max_in_flight {max_in_flight}, attempts {attempts}, timeout_s {timeout_s}: give at "
                            "least 1, at least 1, more than 0")
        self.url, self.model = base_url(url), model
        self._key = _read_key(api_key_env, self.url)
        self.max_in_flight, self.attempts, self.pace = max_in_flight, attempts, Pace(timeout_s)
        self.max_pixels, self.seed, self.extra_body = max_pixels, seed, dict(extra_body or {})
        self.cache = None if cache_dir is None else DiskCache(cache_dir)
        self.breaker = Breaker(str(self), breaker_failures, probe_every_s, patience_s)
        self.counts: Counter[str] = Counter()
        """Calls, and of these cached, answered, failed; retried, the attempts that failed, and each `AttemptError.kind`
        of them; opened, how often the breaker did."""
        self.seconds = 0.0
        """Of the attempts that succeeded."""
        self._slots = asyncio.Semaphore(max_in_flight)
        # Of calls, those between two attempts included: so few that a retry does not queue behind the whole rollout,
        # and that few pictures are in memory.
        self._calls = asyncio.Semaphore(2 * max_in_flight)
        self._pictures: OrderedDict[Any, tuple[Any, str, str]] = OrderedDict()
        self._encoding, self._verifying, self._unverified = asyncio.Lock(), asyncio.Lock(), verify_first
        self._http: httpx.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.model!r})"

    def __str__(self) -> str:
        return f"{self.url} (model {self.model})"

    async def aclose(self) -> None:
        if self._http is not None:
            await self._http.aclose()
            self._http = self._loop = None

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
        return await self._call("/v1/chat/completions", body, partial(read_chat, model=self.model), prompt_hash, keep)

    async def classify(self, text: str, *, prompt_hash: str = "") -> tuple[float, ...]:
        """Outputs of a pooling model: after its activation (vLLM; raw with extra_body={"use_activation": False}), or
        the raw head (SGLang).

        Raises:
            EndpointError: as `chat`.
        """
        body = {"input": text, "text": text}  # vLLM reads `input`, SGLang's native route `text`
        return await self._call("/classify", body, partial(read_scores, model=self.model), prompt_hash,
                                lambda scores: True)

    async def verify(self) -> None:
        """Ask the server which models it serves. SGLang answers to any name, so no reply of its would show a wrong one.

        Raises:
            EndpointError: the model is not among them, or the server cannot be reached.
        """
        served = read_models(await self._retry("GET", "/v1/models", None, read_models, "verify"))
        if self.model not in served:
            names = short(", ".join(name if name.isprintable() else repr(name) for name in served)) or "none"
            raise EndpointError(f"{self}: the server does not serve this model but {names}; "
                                "ask for one of these, or serve it under this name (--served-model-name)")

    async def _verify_first(self) -> None:
        try:
            await self.verify()
        except EndpointError as error:
            raise EndpointDown(str(error)) from error
        self._unverified = False

    # -- one call -----------------------------------------------------------------------------------------------------

    async def _call(self, path: str, body: dict[str, Any], read: Callable[..., T], prompt_hash: str,
                    keep: Callable[[T], bool]) -> T:
        async with self._calls:
            self.counts["calls"] += 1
            body = {"model": self.model, **body, **self.extra_body}
            pictures = [await self._picture(part["image"]) for part in picture_parts(body)]
            named = with_pictures(body, [digest for _, digest in pictures])
            text = json.dumps([1, path, named, prompt_hash], sort_keys=True)
            key = hashlib.blake2b(text.encode(), digest_size=20).hexdigest()
            found = self.cache.get(key) if self.cache else None
            if found is not None and self.cache:
                try:
                    reply = read(found, cached=True)
                    if keep(reply):
                        self.counts["cached"] += 1
                        return reply
                except AttemptError:
                    pass  # by another version, or by hand
                self.cache.drop(key)
            wire = json.dumps(with_pictures(body, [uri for uri, _ in pictures])).encode()
            try:
                async with self._verifying:
                    if self._unverified:
                        await self._verify_first()
                payload = await self._retry("POST", path, wire, read, key)
            except EndpointError:
                self.counts["failed"] += 1
                raise
            self.counts["answered"] += 1
            reply = read(payload)
            if self.cache and keep(reply):
                self.cache.put(key, payload)
            return reply

    async def _retry(self, method: str, path: str, body: bytes | None, read: Callable[..., object], key: str) -> Any:
        """JSON of the first reply that `read` takes."""
        failed = cuts = 0
        while True:
            async with self._slots:
                await self.breaker.admit()
                try:
                    started = time.monotonic()
                    # A probe has all the time there is: a server that comes back may be slow at first.
                    payload = await self._attempt(method, path, body, cuts if self.breaker.opened is None else math.inf)
                    read(payload)
                except AttemptError as error:
                    problem = error
                else:
                    self.breaker.succeeded()
                    self.pace.replied(time.monotonic() - started)
                    self.seconds += time.monotonic() - started
                    return payload
            self.counts["retried"] += 1
            self.counts[problem.kind] += 1
            cuts += problem.kind == "cut"
            if not problem.alive:
                self.counts["opened"] += self.breaker.failed(str(problem))
            elif problem.kind == "http_429" and self.breaker.opened is not None:
                self.breaker.succeeded()  # it is back, and busy
            self.breaker.check()
            if self.breaker.opened is None:
                failed += 1  # a server's absence is no call's fault; the breaker's patience bounds it
            if failed >= self.attempts:
                raise EndpointError(f"{self}: {failed} attempts failed, the last: {problem}; {problem.mend}")
            jitter = random.Random(f"{self.seed}/{key}/{failed}").random()
            await asyncio.sleep(problem.wait_s + jitter * min(MAX_BACKOFF_S, BACKOFF_S * 2 ** max(failed - 1, 0)))

    async def _attempt(self, method: str, path: str, body: bytes | None, cuts: float) -> Any:
        """JSON of one reply; `cuts` as in `Pace.timed`."""
        http, started = self._client(), time.monotonic()
        try:
            # httpx's own time-outs start again with each byte. No redirect is followed: the key is for this server.
            async with self.pace.timed(cuts), http.stream(method, self.url + path, content=body) as response:
                text = await read_text(response)
        except TimeoutError:
            seconds = min(time.monotonic() - started, self.pace.timeout_s)
            raise AttemptError("cut" if seconds < 0.99 * self.pace.timeout_s else "timeout",
                               f"no reply within {seconds:.3g} s", "allow more time, or start more servers") from None
        except httpx.RequestError as error:
            raise AttemptError("connection", short(without_key(f"{type(error).__name__} {error}", self._key)),
                               "see that the server runs and that the URL is right") from None
        status, headers = response.status_code, response.headers
        if status == 200:
            return read_json(text, self._key)
        said = f"HTTP {status} {short(without_key(message_of(text), self._key))!r}"
        if status in (408, 429) or status >= 500:
            wait_s = retry_after(headers.get("retry-after", ""), headers.get("date", ""))
            if wait_s > MAX_RETRY_AFTER_S:
                raise EndpointError(f"{self}: {said} with a pause of {wait_s:.0f} s; try again later")
            raise AttemptError(f"http_{status}", said, "see the server's log", wait_s)
        self.breaker.succeeded()  # it lives
        self.counts[f"http_{status}"] += 1
        kind = Rejected if status in (400, 413, 422) else EndpointError
        raise kind(f"{self}: {path} {said}; {_MENDS.get(status, BASE if status < 300 else 'see its message')}")

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        assert self._loop in (None, loop), "an Endpoint is used from one event loop, until aclose"
        if self._http is None:
            self._loop = loop
            headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            # Below the 5 s of vLLM's uvicorn: no connection is used while the server is closing it.
            limits = httpx.Limits(max_connections=self.max_in_flight, keepalive_expiry=2.0)
            # Without https no certificates are needed, and loading them takes long.
            no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))  # httpx keeps them all, and sends them back
            self._http = httpx.AsyncClient(headers=headers, limits=limits, timeout=None, cookies=no_cookies,
                                           verify=self.url.startswith("https"))
        return self._http

    async def _picture(self, source: ImageSource) -> tuple[str, str]:
        """(data URI, digest); the last few are kept, since the responses of a group share their pictures."""
        at = source if isinstance(source, str) else id(source)  # `source` is kept with it, so the id stays its own
        async with self._encoding:
            if at not in self._pictures:
                uri = await asyncio.to_thread(data_uri, source, self.max_pixels)
                self._pictures[at] = source, uri, hashlib.blake2b(uri.encode(), digest_size=20).hexdigest()
                if len(self._pictures) > KEPT_PICTURES:
                    self._pictures.popitem(last=False)
            self._pictures.move_to_end(at)
            return self._pictures[at][1:]


def _read_key(name: str, url: str) -> str:
    if not name:
        return ""
    if not re.fullmatch("[A-Z_][A-Z0-9_]*", name):  # perhaps the key itself: not repeated
        raise UserError(f"the key of {url} is given by the NAME of an environment variable, in capitals, as JUDGE_KEY")
    key = os.environ.get(name, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the environment variable {name} holds no key for {url}; export it, without spaces")
    return key
