"""A model's server as a command line names it: URL,MODEL[,OPTION=VALUE...]. Needs the standard library only."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any
from urllib.parse import urlsplit

from cosmo_rl.data.errors import UserError

BASE = "give the base URL of an OpenAI-compatible server (vLLM, SGLang), as http://HOST:PORT"
VARIABLE = "[A-Z_][A-Z0-9_]*"
"""The name of an environment variable, as a pattern; few keys are of this form."""


@dataclass(frozen=True, slots=True)
class Option:
    """What may follow a model's name."""

    argument: str
    """Of Endpoint, or of whoever asks for it."""
    read: Callable[[str], Any]
    """Raises ValueError."""
    wanted: str
    """In words, for messages."""
    example: str


@dataclass(frozen=True, slots=True)
class Server:
    """A model's place."""

    url: str
    """As `base_url` gives it."""
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of Endpoint, of those that were given."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What was given of the caller's own options, by argument."""

    @property
    def place(self) -> tuple[str, str, str]:
        """URL, model and key variable; servers for which it is the same share an Endpoint."""
        return self.url, self.model, self.options.get("api_key_env", "")


def parse_server(text: str, what: str, own: Mapping[str, Option] | None = None) -> Server:
    """The Server of "URL,MODEL[,key=VARIABLE][,in-flight=N][,timeout=SECONDS][,attempts=N]".

    Args:
        what: named in messages, as "--endpoint".
        own: further options that the caller takes, by name.
    Raises:
        UserError: it is none. What may be a key or a password is not repeated.
    """
    url, *rest = (part.strip() for part in text.split(","))
    known = {**SERVER_OPTIONS, **(own or {})}
    usage = f"write URL,MODEL, and after them {', '.join(f'{name}={x.example}' for name, x in known.items())}"
    if not url or not rest or not rest[0] or "=" in rest[0]:
        raise UserError(f"{what} has no model after its URL; {usage}")
    try:
        url = base_url(url)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    given: dict[str, Any] = {}
    for number, part in enumerate(rest[1:], start=3):
        name, equals, value = part.partition("=")
        if not equals or not value:
            raise UserError(f"{what}: part {number} is no NAME=VALUE; {usage}")
        if name not in known:
            raise UserError(f"{what}: there is no option {name[:40]!r}; {usage}")
        if name in given:
            raise UserError(f"{what}: {name} is given twice; give it once")
        try:
            given[name] = known[name].read(value)
        except ValueError:
            said = "" if name == "key" else f", and not {value[:40]!r}"
            raise UserError(f"{what}: {name} is {known[name].wanted}{said}; "
                            f"give it as {name}={known[name].example}") from None
    part = lambda table: {known[name].argument: value for name, value in given.items() if name in table}
    return Server(url, rest[0], part(SERVER_OPTIONS), part(own or {}))


def check_shared(servers: Mapping[str, Server]) -> None:
    """Raise UserError when two that share an endpoint (one URL, model and key) ask it in different ways.

    Args:
        servers: by what messages call it.
    """
    for (name, one), (other, two) in combinations(servers.items(), 2):
        for option, known in SERVER_OPTIONS.items() if one.place == two.place else ():
            a, b = (server.options.get(known.argument, "the default") for server in (one, two))
            if a != b:
                raise UserError(f"{name} and {other} share {one.url} (model {one.model}), but {option} is {a} for one "
                                f"and {b} for the other; give both the same")


def score_range(text: str) -> tuple[float, float]:
    """(low, high) of a scalar head's activation "LOW:HIGH".

    Raises:
        UserError: it is no such range.
    """
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise UserError(f"the activation is {text!r}; give none, sigmoid or LOW:HIGH, as -10:10")
    return low, high


def base_url(url: str) -> str:
    """`url` without /v1, a last slash and a fragment.

    Raises:
        UserError: it is no URL of a server, or holds a password or a query, which are not repeated.
    """
    if "@" in url or "?" in url:
        raise UserError("the URL holds a password or a query; name the environment variable that holds this server's "
                        "key instead")
    try:
        parts = urlsplit(url)
        host = parts.hostname if parts.port != 0 else None
    except ValueError:  # brackets without an address, a port that is no number
        raise UserError(f"{url!r} is no URL; {BASE}") from None
    if parts.scheme not in ("http", "https") or not re.fullmatch(r"[\w.:-]+", host or "") or re.search(r"\s", url):
        raise UserError(f"{url!r} is no URL of a server; {BASE}")
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/").removesuffix("/v1")


def _matching(pattern: str, convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError
        return convert(text)

    return read


def _seconds(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


def _activation(text: str) -> str:
    if text not in ("none", "sigmoid"):
        score_range(text)
    return text


_COUNT = _matching("0*[1-9][0-9]{0,8}", int), "a whole number of at least 1", "8"
SERVER_OPTIONS = {
    "key": Option("api_key_env", _matching(VARIABLE), "the NAME of an environment variable, in capitals", "JUDGE_KEY"),
    "in-flight": Option("max_in_flight", *_COUNT),
    "timeout": Option("timeout_s", _seconds, "a number of seconds above 0", "60"),
    "attempts": Option("attempts", *_COUNT),
}
"""Those of every server."""
GRADED = {"graded": Option("graded", lambda text: bool(("no", "yes").index(text)), "yes or no", "no")}
"""Of a chat judge whose label has a probability."""
ACTIVATION = {"activation": Option("activation", _activation, "none, sigmoid or LOW:HIGH", "-10:10")}
"""Of a scalar head; see `Endpoint.classify`."""
