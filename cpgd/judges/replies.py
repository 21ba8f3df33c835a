"""What a server's replies must look like, read strictly, and where good ones are kept.

A reply of another format, by another model, compressed or too long is an `AttemptError`: the same request may fare
better. So is one that was given up; one that ended at its limit says so, and an empty one is empty: nothing is guessed.
"""

import json
import math
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx2

from cosmo_rl.data import strict_json
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.terminal import shortened

from .spec import BASE

PATHS = CHAT, CLASSIFY, MODELS = "/v1/chat/completions", "/classify", "/v1/models"
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


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A chat completion."""

    text: str
    top: tuple[tuple[str, float], ...] | None = None
    """Likeliest tokens at the first place that is not blank, and their log-probs, nats; None: the server gave none."""
    cached: bool = False
    cut: bool = False
    """It ended at `max_tokens`, perhaps in the midst of a word."""


async def read_text(response: httpx2.Response) -> str:
    """The text of a streamed reply; raises AttemptError when it is longer than MAX_REPLY_BYTES, or good and compressed.

    It was asked for as it is, and httpx2 would decode what comes compressed whatever its size: 300 bytes of nested gzip
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


def read(path: str, payload: Any, model: str, cached: bool = False) -> Any:
    """What a reply's JSON says, by the path that it was asked from; raises AttemptError.

    Returns:
        CHAT: a ChatReply. CLASSIFY, of vLLM or of SGLang: a tuple of scores. MODELS: a list of names.
    """
    try:
        if path == CHAT:
            return _chat(payload, model, cached)
        return _scores(payload, model) if path == CLASSIFY else [str(served["id"]) for served in payload["data"]]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        wanted, mend = _WANTED[path]
        raise AttemptError("other_format", f"the reply is no {wanted}: {short(json.dumps(payload))!r}", mend) from None


_WANTED = {CHAT: ("chat completion", BASE), MODELS: ("list of models", BASE), CLASSIFY: (
    "list of scores", "serve a pooling model (vllm serve --runner pooling, sglang --is-embedding)")}


def _chat(payload: Any, model: str, cached: bool) -> ChatReply:
    _check_model(payload["model"], model)
    choice = payload["choices"][0]
    if choice.get("finish_reason") in ("abort", "error"):  # with status 200, under load or at a restart
        raise AttemptError("given_up", "the server gave the reply up", "see the server's log")
    text = choice["message"]["content"]
    text = "" if text is None else text  # null: the server's reasoning parser found no answer
    if not isinstance(text, str):
        raise TypeError
    text.encode()  # half a character, as "\\ud800", can be neither written nor asked about: a UnicodeEncodeError
    places = (choice.get("logprobs") or {}).get("content") or []
    first = next((place for place in places if place["token"].strip()), None)
    top = tuple((str(t["token"]), _number(t["logprob"])) for t in first["top_logprobs"] or ()) if first else ()
    if not all(logprob <= 1e-3 for _, logprob in top):
        raise ValueError
    return ChatReply(text, top or None, cached, choice.get("finish_reason") == "length")


def _scores(payload: Any, model: str) -> tuple[float, ...]:
    native: Any = payload[0] if isinstance(payload, list) and payload else payload
    if "embedding" in native:  # SGLang, which names no model here
        scores = tuple(map(_number, native["embedding"]))
    else:
        _check_model(native["model"], model)
        scores = tuple(map(_number, native["data"][0]["probs"]))
    if not scores or not all(map(math.isfinite, scores)):
        raise ValueError
    return scores


def _number(found: Any) -> float:
    if isinstance(found, bool) or not isinstance(found, int | float):  # float("nan") would pass
        raise TypeError
    return float(found)


def _check_model(name: Any, model: str) -> None:
    if name != model:
        raise AttemptError("other_model", f"the reply is by model {short(str(name))!r}, not {model!r}",
                           "ask for that name, or serve the model under this one (--served-model-name)")


def message_of(text: str) -> str:
    """What an error reply says: {"error": {"message"}}, {"message"} or {"detail"}, else its text."""
    try:
        found = strict_json.loads(text)
    except ValueError:
        return text
    found = found.get("error", found) if isinstance(found, dict) else found
    return str(found.get("message", found.get("detail", text)) if isinstance(found, dict) else found)


def mend_of(status: int) -> str:
    """What mends a call that was answered so."""
    if status in (401, 403):
        return "name the environment variable that holds this server's key"
    if status in (301, 302, 303, 307, 308):
        return "redirects are not followed: give the URL that it leads to"
    known = {404: f"{BASE}, and a model that it serves", 405: BASE, 413: "send smaller pictures"}
    return known.get(status, BASE if status < 300 else "see its message")


def pause_of(headers: httpx2.Headers) -> tuple[str, float]:
    """(the mend, the seconds of Retry-After) of a call that is to be made later.

    A date is read by the server's own clock, where it tells that: it need not be ours.
    """
    told = headers.get("retry-after", "")
    with suppress(KeyError, TypeError, ValueError, OverflowError):
        told = str((parsedate_to_datetime(told) - parsedate_to_datetime(headers["date"])).total_seconds())
    if not re.fullmatch(r"\d+(\.\d*)?", told, re.ASCII) or not (seconds := float(told)):
        return "see the server's log", 0.0
    return f"it asks for a pause of {short(told)} s: try again later", min(seconds, 1e9)  # openai takes inf for none


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


class DiskCache:
    """Server replies by key, one JSON file each under two-hex folders; several processes may share it.

    Raises:
        UserError: it cannot be read or written (disk full, permissions).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        with self._told():
            self.folder.mkdir(parents=True, exist_ok=True)

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
        if isinstance(entry, dict) and entry.get("key") == key:
            return entry.get("reply")
        self.drop(key)
        return None

    def put(self, key: str, reply: Any) -> None:
        path = self.path(key)
        beside = path.with_name(f".{key}.{os.getpid()}.{secrets.token_hex(4)}")
        with self._told():
            path.parent.mkdir(exist_ok=True)
            try:
                beside.write_text(json.dumps({"key": key, "reply": reply}), encoding="utf-8")
                os.replace(beside, path)
            finally:
                beside.unlink(missing_ok=True)

    def drop(self, key: str) -> None:
        with self._told():
            self.path(key).unlink(missing_ok=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"the cache {self.folder} cannot be written ({error.strerror}); free space, or give a "
                            "folder that this user may write") from error
