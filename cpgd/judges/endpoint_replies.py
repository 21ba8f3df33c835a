"""What a server's replies must look like, read strictly, and what their messages may say.

A reply of another format, by another model, compressed or too long is an `AttemptError`: the same request may fare
better.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import httpx

from cosmo_rl.data import strict_json
from cosmo_rl.data.terminal import shortened

from .endpoint_spec import BASE

MAX_REPLY_BYTES = 1 << 22
"""Longer replies are cut off; a verdict with its log-probs takes a few thousand."""
REDACT_LENGTH = 8
"""Shorter keys (EMPTY, none) are no secrets, and hiding them would garble replies."""


class AttemptError(Exception):
    """An attempt failed, and another one may succeed."""

    def __init__(self, kind: str, reason: str, mend: str, wait_s: float = 0.0) -> None:
        """
        Args:
            kind: for counting: timeout, cut, connection, http_STATUS, compressed, too_long, no_json, other_format,
                other_model, given_up.
            wait_s: pause that the server asks for, in seconds.
        """
        super().__init__(reason)
        self.kind, self.mend, self.wait_s = kind, mend, wait_s

    @property
    def alive(self) -> bool:
        """It is no sign of a dead server."""
        return self.kind in ("cut", "http_429")


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A chat completion."""

    text: str
    top: tuple[tuple[str, float], ...] | None = None
    """Likeliest tokens at the first place that is not blank, and their log-probs, nats; None: the server gave none."""
    cached: bool = False
    cut: bool = False
    """It ended at `max_tokens`, perhaps in the midst of a word."""


async def read_text(response: httpx.Response) -> str:
    """The text of a streamed reply; raises AttemptError when it is longer than MAX_REPLY_BYTES, or good and compressed.

    It was asked for as it is, and httpx would decode what comes compressed whatever its size: 300 bytes of nested gzip
    are gigabytes.
    """
    coding = response.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        if response.status_code != 200:  # the status says enough
            return f"(in Content-Encoding {short(coding)})"
        raise AttemptError("compressed", f"the reply is in Content-Encoding {short(coding)!r}, and not as it was asked "
                           "for", "switch compression off in the server, or in the proxy before it")
    text = bytearray()
    async for part in response.aiter_raw():
        text += part
        if len(text) > MAX_REPLY_BYTES:
            raise AttemptError("too_long", f"the reply is longer than {MAX_REPLY_BYTES} bytes", BASE)
    return text.decode("utf-8", "replace")  # JSON is UTF-8, whatever the header says


def read_json(text: str, key: str) -> Any:
    """The JSON of a reply, `without_key`; raises AttemptError when it is none."""
    try:
        return without_key(strict_json.loads(text, parse_constant=int), key)  # int("NaN") raises: it is no JSON
    except ValueError:
        raise AttemptError("no_json", f"the reply is no JSON: {short(without_key(text, key))!r}", BASE) from None


def read_chat(payload: Any, model: str, cached: bool = False) -> ChatReply:
    """The reply of /v1/chat/completions; raises AttemptError."""
    try:
        _check_model(payload["model"], model)
        choice = payload["choices"][0]
        if choice.get("finish_reason") in ("abort", "error"):  # with status 200, under load or at a restart
            raise AttemptError("given_up", "the server gave the reply up", "see the server's log")
        text = choice["message"]["content"] or ""  # null: the server's reasoning parser found no answer
        if not isinstance(text, str):
            raise TypeError
        text.encode()  # half a character, as "\\ud800", can be neither written nor asked about: a UnicodeEncodeError
        places = (choice.get("logprobs") or {}).get("content") or []
        first = next((place for place in places if place["token"].strip()), None)
        top = tuple((str(t["token"]), _number(t["logprob"])) for t in first["top_logprobs"] or ()) if first else ()
        if not all(logprob <= 1e-3 for _, logprob in top):
            raise ValueError
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        raise _other_format("chat completion", payload, BASE) from None
    return ChatReply(text, top or None, cached, choice.get("finish_reason") == "length")


def read_scores(payload: Any, model: str, cached: bool = False) -> tuple[float, ...]:
    """The reply of /classify, of vLLM or of SGLang; raises AttemptError."""
    native: Any = payload[0] if isinstance(payload, list) and payload else payload
    try:
        if "embedding" in native:  # SGLang, which names no model here
            scores = tuple(map(_number, native["embedding"]))
        else:
            _check_model(native["model"], model)
            scores = tuple(map(_number, native["data"][0]["probs"]))
        if not scores or not all(map(math.isfinite, scores)):
            raise ValueError
        return scores
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        raise _other_format("list of scores", payload, "serve a pooling model (vllm serve --runner pooling, sglang "
                            "--is-embedding)") from None


def read_models(payload: Any) -> list[str]:
    """The reply of /v1/models; raises AttemptError."""
    try:
        return [str(model["id"]) for model in payload["data"]]
    except (KeyError, TypeError):
        raise _other_format("list of models", payload, BASE) from None


def message_of(text: str) -> str:
    """What an error reply says: {"error": {"message"}}, {"message"} or {"detail"}, else its text."""
    try:
        found = strict_json.loads(text)
    except ValueError:
        return text
    found = found.get("error", found) if isinstance(found, dict) else found
    return str(found.get("message", found.get("detail", text)) if isinstance(found, dict) else found)


def without_key(found: Any, key: str) -> Any:
    """A text, or the JSON of a reply, without the key, which some servers repeat."""
    if isinstance(found, str):
        return found.replace(key, "[key]") if len(key) >= REDACT_LENGTH else found
    if isinstance(found, dict):
        return {without_key(name, key): without_key(inner, key) for name, inner in found.items()}
    return [without_key(inner, key) for inner in found] if isinstance(found, list) else found


def short(text: str) -> str:
    """As much of what a server says as a message holds."""
    return shortened(text, 200)


def _number(found: Any) -> float:
    if isinstance(found, bool) or not isinstance(found, int | float):  # float("nan") would pass
        raise TypeError
    return float(found)


def _check_model(name: Any, model: str) -> None:
    if name != model:
        raise AttemptError("other_model", f"the reply is by model {short(str(name))!r}, not {model!r}",
                           "ask for that name, or serve the model under this one (--served-model-name)")


def _other_format(wanted: str, payload: Any, mend: str) -> AttemptError:
    return AttemptError("other_format", f"the reply is no {wanted}: {short(json.dumps(payload))!r}", mend)
