"""Client of an OpenAI-compatible server (vLLM, SGLang): chat completions and /classify, many calls at a time.

A call:  disk cache -> slot (bounded number in flight) -> breaker -> HTTP attempt -> check of the reply -> disk cache

Retried, with full-jitter exponential backoff: time-outs, broken connections, 408, 429, 5xx, and replies that are cut
off, no JSON, of another format or by another model. Other statuses are answers, and end the call at once. The breaker
counts failed attempts in a row over all callers: a server that fails now and then never opens it, a dead one soon does.
A 429 comes from a living server and leaves it as it is.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from .endpoint_parts import (
    MAX_PIXELS,
    Breaker,
    DiskCache,
    EndpointDown,
    EndpointError,
    LoopThread,
    Pace,
    data_uri,
    retry_after,
)
from .schema import ImageSource

__all__ = ["ChatReply", "Endpoint", "EndpointDown", "EndpointError", "LoopThread", "Messages"]

T = TypeVar("T")
Messages = Sequence[Mapping[str, Any]]
"""OpenAI chat messages; a picture is a part {"type": "image", "image": ImageSource}."""

BACKOFF_S, MAX_BACKOFF_S = 0.25, 20.0
"""Longest first backoff, doubled with each failure, and the cap; drawn uniformly from 0 up."""
MAX_RETRY_AFTER_S = 120.0
"""A server that asks for a longer pause has failed the call."""
KEPT_PICTURES = 32
"""Encoded pictures held in memory."""
REDACT_LENGTH = 8
"""Shorter keys (EMPTY, none) are no secrets, and hiding them would garble replies."""

_BASE = "give the base URL of an OpenAI-compatible server (vLLM, SGLang), as http://HOST:PORT"
_KEY = "name the environment variable that holds this server's key"
_MENDS = {401: _KEY, 403: _KEY, 404: f"{_BASE}, and a model that it serves", 405: _BASE, 413: "send smaller pictures"}

logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it writes a line a call, a thousand a rollout


class _AttemptError(Exception):
    """An attempt failed, and another one may succeed."""

    def __init__(self, reason: str, mend: str, *, alive: bool = False, cut: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.mend, self.cut, self.wait_s = mend, cut, wait_s
        self.alive = alive or cut  # no sign of a dead server


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A chat completion."""

    text: str
    top: tuple[tuple[str, float], ...] | None = None
    """Likeliest tokens at the first place that is not blank, and their log-probs, nats; None: the server gave none."""
    cached: bool = False


class Endpoint:
    """One model of one server. All calls must come from one event loop."""

    def __init__(
        self, url: str, model: str, *, api_key_env: str = "", max_in_flight: int = 32, timeout_s: float = 60.0,
        attempts: int = 8, cache_dir: str | Path | None = None, breaker_failures: int = 20, probe_every_s: float = 5.0,
        patience_s: float = 30.0, max_pixels: int = MAX_PIXELS, extra_body: Mapping[str, Any] | None = None,
        seed: int = 0,
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
        Raises:
            ValueError: a URL that is none or holds a password, a key variable without a key, a number below 1.
        """
        if max_in_flight < 1 or attempts < 1 or timeout_s <= 0:
            raise ValueError(f"max_in_flight {max_in_flight}, attempts {attempts}, timeout_s {timeout_s}: give at "
                             "least 1, at least 1, more than 0")
        self.url, self.model = _base_url(url), model
        self._key = _read_key(api_key_env, self.url)
        self.max_in_flight, self.attempts, self.pace = max_in_flight, attempts, Pace(timeout_s)
        self.max_pixels, self.seed, self.extra_body = max_pixels, seed, dict(extra_body or {})
        self.cache = None if cache_dir is None else DiskCache(cache_dir)
        self.breaker = Breaker(str(self), breaker_failures, probe_every_s, patience_s)
        self.counts: Counter[str] = Counter()
        """Calls that were cached, answered, failed; and failed attempts, retried."""
        self._slots = asyncio.Semaphore(max_in_flight)
        # Of calls, those between two attempts included: so few that a retry does not queue behind the whole rollout,
        # and that few pictures are in memory.
        self._calls = asyncio.Semaphore(2 * max_in_flight)
        self._pictures: OrderedDict[Any, tuple[Any, str, str]] = OrderedDict()
        self._encoding = asyncio.Lock()
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
                   prompt_hash: str = "", keep: Callable[[ChatReply], bool] = lambda reply: True) -> ChatReply:
        """One chat completion.

        Args:
            messages: see Messages.
            top_logprobs: how many of the likeliest tokens to ask for; 0: none.
            prompt_hash: further part of the cache key, for the prompt that `messages` was made from.
            keep: which replies to cache; a cached one for which it does not hold is asked for again.
        Raises:
            EndpointError: refused, or failed `attempts` times; EndpointDown: not made, the server is dead.
            RowError: a picture cannot be opened.
        """
        body: dict[str, Any] = {"messages": messages, "max_tokens": max_tokens, "temperature": temperature}
        if top_logprobs:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        return await self._call("/v1/chat/completions", body, self._read_chat, prompt_hash, keep)

    async def classify(self, text: str, *, prompt_hash: str = "") -> tuple[float, ...]:
        """Outputs of a pooling model: after its activation (vLLM; raw with extra_body={"use_activation": False}), or
        the raw head (SGLang).

        Raises:
            EndpointError: as `chat`.
        """
        body = {"input": text, "text": text}  # vLLM reads `input`, SGLang's native route `text`
        return await self._call("/classify", body, self._read_scores, prompt_hash, lambda scores: True)

    async def verify(self) -> None:
        """Ask the server which models it serves. SGLang answers to any name, so no reply of its would show a wrong one.

        Raises:
            EndpointError: the model is not among them, or the server cannot be reached.
        """
        served = self._read_models(await self._retry("GET", "/v1/models", None, self._read_models, "verify"))
        if self.model not in served:
            raise EndpointError(f"{self}: the server does not serve this model but {', '.join(served) or 'none'}; "
                                "ask for one of these, or serve it under this name (--served-model-name)")

    # -- one call -----------------------------------------------------------------------------------------------------

    async def _call(self, path: str, body: dict[str, Any], read: Callable[..., T], prompt_hash: str,
                    keep: Callable[[T], bool]) -> T:
        async with self._calls:
            body = {"model": self.model, **body, **self.extra_body}
            pictures = [await self._picture(part["image"]) for part in _picture_parts(body)]
            named = _with_pictures(body, [digest for _, digest in pictures])
            text = json.dumps([1, path, named, prompt_hash], sort_keys=True)
            key = hashlib.blake2b(text.encode(), digest_size=20).hexdigest()
            found = self.cache.get(key) if self.cache else None
            if found is not None and self.cache:
                try:
                    reply = read(found, cached=True)
                    if keep(reply):
                        self.counts["cached"] += 1
                        return reply
                except _AttemptError:
                    pass  # by another version, or by hand
                self.cache.drop(key)
            wire = json.dumps(_with_pictures(body, [uri for uri, _ in pictures])).encode()
            try:
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
                    payload = await self._attempt(method, path, body, cuts)
                    read(payload)
                except _AttemptError as error:
                    problem = error
                else:
                    self.breaker.succeeded()
                    self.pace.replied(time.monotonic() - started)
                    return payload
            self.counts["retried"] += 1
            cuts += problem.cut
            if not problem.alive:
                self.breaker.failed(str(problem))
            self.breaker.check()
            if self.breaker.opened is None:
                failed += 1  # a server's absence is no call's fault; the breaker's patience bounds it
            if failed >= self.attempts:
                raise EndpointError(f"{self}: {failed} attempts failed, the last: {problem}; {problem.mend}")
            jitter = random.Random(f"{self.seed}/{key}/{failed}").random()
            await asyncio.sleep(problem.wait_s + jitter * min(MAX_BACKOFF_S, BACKOFF_S * 2 ** max(failed - 1, 0)))

    async def _attempt(self, method: str, path: str, body: bytes | None, cuts: int) -> Any:
        """JSON of one reply; `cuts` as in `Pace.timed`."""
        loop = asyncio.get_running_loop()
        assert self._loop in (None, loop), "an Endpoint is used from one event loop, until aclose"
        if self._http is None:
            self._loop = loop
            headers = {"Content-Type": "application/json"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            # Below the 5 s of vLLM's uvicorn: no connection is used while the server is closing it.
            limits = httpx.Limits(max_connections=self.max_in_flight, keepalive_expiry=2.0)
            # Without https no certificates are needed, and loading them takes long.
            self._http = httpx.AsyncClient(headers=headers, limits=limits, timeout=None,
                                           verify=self.url.startswith("https"))
        started = time.monotonic()
        try:
            async with self.pace.timed(cuts):  # httpx's own time-outs start again with each byte
                response = await self._http.request(method, self.url + path, content=body)
        except TimeoutError:
            seconds = min(time.monotonic() - started, self.pace.timeout_s)
            raise _AttemptError(f"no reply within {seconds:.3g} s", "allow more time, or start more servers",
                                cut=seconds < 0.99 * self.pace.timeout_s) from None
        except httpx.RequestError as error:
            raise _AttemptError(self._short(f"{type(error).__name__} {error}"),
                                "see that the server runs and that the URL is right") from None
        text = self._without_key(response.text)
        if response.status_code == 200:
            try:
                return json.loads(text, parse_constant=int)  # int("NaN") raises: neither NaN nor Infinity is JSON
            except ValueError:
                raise _AttemptError(f"the reply is no JSON: {self._short(text)!r}", _BASE) from None
        said = f"HTTP {response.status_code} {self._short(_message(text))!r}"
        if response.status_code in (408, 429) or response.status_code >= 500:
            wait_s = retry_after(response.headers.get("retry-after", ""))
            if wait_s > MAX_RETRY_AFTER_S:
                raise EndpointError(f"{self}: {said} with a pause of {wait_s:.0f} s; try again later")
            raise _AttemptError(said, "see the server's log", alive=response.status_code == 429, wait_s=wait_s)
        self.breaker.succeeded()  # it lives
        raise EndpointError(f"{self}: {path} {said}; {_MENDS.get(response.status_code, 'see its message')}")

    # -- reading replies ----------------------------------------------------------------------------------------------

    def _read_chat(self, payload: Any, cached: bool = False) -> ChatReply:
        try:
            self._check_model(payload["model"])
            choice = payload["choices"][0]
            if choice.get("finish_reason") in ("abort", "error"):  # with status 200, under load or at a restart
                raise _AttemptError("the server gave the reply up", "see the server's log")
            text = choice["message"]["content"] or ""  # null: the server's reasoning parser found no answer
            if not isinstance(text, str):
                raise TypeError
            places = (choice.get("logprobs") or {}).get("content") or []
            first = next((place for place in places if place["token"].strip()), None)
            top = tuple((str(t["token"]), float(t["logprob"])) for t in first["top_logprobs"] or ()) if first else ()
            if any(logprob > 1e-3 for _, logprob in top):
                raise ValueError
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise self._other_format("chat completion", payload, _BASE) from None
        return ChatReply(text, top or None, cached)

    def _read_scores(self, payload: Any, cached: bool = False) -> tuple[float, ...]:
        native: Any = payload[0] if isinstance(payload, list) and payload else payload
        try:
            if "embedding" in native:  # SGLang, which names no model here
                scores = tuple(float(x) for x in native["embedding"])
            else:
                self._check_model(native["model"])
                scores = tuple(float(x) for x in native["data"][0]["probs"])
            if not scores or not all(map(math.isfinite, scores)):
                raise ValueError
            return scores
        except (KeyError, IndexError, TypeError, ValueError):
            raise self._other_format("list of scores", payload, "serve a pooling model (vllm serve --runner pooling, "
                                     "sglang --is-embedding)") from None

    def _read_models(self, payload: Any, cached: bool = False) -> list[str]:
        try:
            return [str(model["id"]) for model in payload["data"]]
        except (KeyError, TypeError):
            raise self._other_format("list of models", payload, _BASE) from None

    def _check_model(self, name: str) -> None:
        if name != self.model:
            raise _AttemptError(f"the reply is by model {self._short(str(name))!r}, not {self.model!r}",
                                "ask for that name, or serve the model under this one (--served-model-name)")

    def _other_format(self, wanted: str, payload: Any, mend: str) -> _AttemptError:
        return _AttemptError(f"the reply is no {wanted}: {self._short(json.dumps(payload))!r}", mend)

    def _without_key(self, text: str) -> str:
        """Some servers repeat the key in their messages."""
        return text.replace(self._key, "[key]") if len(self._key) >= REDACT_LENGTH else text

    def _short(self, text: str) -> str:
        text = self._without_key(text)
        return text if len(text) <= 200 else text[:200] + "..."

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


def _base_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{url!r} is no URL ({error}); {_BASE}") from None
    if parsed.userinfo or parsed.query:
        raise ValueError(f"the URL of {parsed.host} holds a password or a query; {_KEY}")  # and is not repeated here
    if parsed.scheme not in ("http", "https") or not re.fullmatch(r"[\w.:-]+", parsed.host):
        raise ValueError(f"{url!r} is no URL of a server; {_BASE}")
    return str(parsed.copy_with(fragment=None)).rstrip("/").removesuffix("/v1")


def _read_key(name: str, url: str) -> str:
    if not name:
        return ""
    if not re.fullmatch("[A-Z_][A-Z0-9_]*", name):  # perhaps the key itself: not repeated
        raise ValueError(f"the key of {url} is given by the NAME of an environment variable, in capitals, as JUDGE_KEY")
    key = os.environ.get(name, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"the environment variable {name} holds no key for {url}; export it, without spaces")
    return key


def _message(text: str) -> str:
    """What an error reply says: {"error": {"message"}}, {"message"} or {"detail"}, else its text."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    found = found.get("error", found) if isinstance(found, dict) else found
    return str(found.get("message", found.get("detail", text)) if isinstance(found, dict) else found)


def _picture_parts(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part for message in body.get("messages", ()) if isinstance(message["content"], list)
            for part in message["content"] if part["type"] == "image"]


def _with_pictures(body: Mapping[str, Any], urls: Sequence[str]) -> dict[str, Any]:
    """`body` with its pictures, in order, as OpenAI writes them."""
    left = iter(urls)

    def shown(part: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"type": "image_url", "image_url": {"url": next(left)}} if part["type"] == "image" else part

    out = dict(body)
    if "messages" in body:
        out["messages"] = [{**m, "content": [shown(part) for part in m["content"]]}
                           if isinstance(m["content"], list) else m for m in body["messages"]]
    return out
