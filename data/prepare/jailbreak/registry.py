"""The registry of attacks, and what every attack shares: parameters, seeds, errors.

An attack is a pure function of its input, its parameters and a seeded generator: nothing else, so that a row's note
{name, params, seed, source_id} is enough to make it again. A text attack is str -> str and rewrites every user text.
An image attack is Turn -> Turn and rewrites the last user turn: its text, its pictures, or both. An endpoint attack is
one too, and may ask a model: then the model's replies are part of its input. Others join with `register`.
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

from PIL import Image

from ...errors import UserError
from ...schema import ImageSource

Params = Mapping[str, Any]
TextFunction = Callable[[str, Params, random.Random], str]
ImageFunction = Callable[["Turn", Params, random.Random, "Aids"], "Turn"]
Family = Literal["text", "image", "endpoint"]
FAMILIES: tuple[Family, ...] = ("text", "image", "endpoint")
OFFLINE: tuple[Family, ...] = ("text", "image")
TEMPLATES = ("instruction", "hint", "seen", "written")
"""Parameters that are sentences for the user turn, or parts of one; {name} in them is filled in."""
Reader = Callable[[Image.Image], str]
"""OCR: an upright image to the text in it."""


class Unfit(UserError):
    """A row that an attack cannot take, most often for illegible text: `WHERE: PROBLEM; MEND`."""

    def __init__(self, problem: str, mend: str, where: str = "") -> None:
        super().__init__(problem, mend, where)

    def __str__(self) -> str:
        problem, mend, where = self.args
        return f"{where}: {problem}; {mend}" if where else f"{problem}; {mend}"

    def at(self, where: str) -> "Unfit":
        """The same, naming row and attack."""
        problem, mend, _ = self.args
        return Unfit(problem, mend, where)


class Turn(NamedTuple):
    """The last user turn of a row."""

    text: str
    """Its text parts, joined by newlines; empty if it has none."""
    images: tuple[Any, ...]
    """Its pictures, RGB, in reading order; an endpoint attack gets them unopened (ImageSource)."""
    note: Params = MappingProxyType({})
    """Of a result: what the row's note has to say beside the parameters, or in place of one."""
    key_elements: tuple[str, ...] = ()
    """Of a result: key elements for a row that has none."""


class Question(NamedTuple):
    """What an endpoint attack asks."""

    prompt: str
    pictures: tuple[ImageSource, ...]
    version: str
    """Of the prompt's wording."""
    max_tokens: int
    temperature: float
    seed: int


class AttackerModel(Protocol):
    """A model that an endpoint attack asks (an attacker model, as PAIR and PyRIT say)."""

    @property
    def model(self) -> str:
        """Its name, for the row's note."""
        ...

    def __call__(self, question: Question) -> str:
        """The reply; raises Unfit when the server takes this request for a bad one."""
        ...


@dataclass(frozen=True, slots=True)
class Aids:
    """What an image or endpoint attack may draw on beside the row."""

    carriers: Sequence[Image.Image] = ()
    """As many pictures as `Attack.carriers` asks for, RGB."""
    read: Reader | None = None
    """OCR that must read rendered text back; None: the checks of render.py alone."""
    ask: AttackerModel | None = None
    """Of an endpoint attack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One attack of the registry."""

    name: str
    family: Family
    kind: str
    """Class of like attacks, held out together: a policy that has seen figstep has seen much of figstep_split."""
    params: Params
    """Defaults; their keys are the parameters there are."""
    limits: Params
    """Parameter -> (lowest, highest) of a number, or the set of allowed values."""
    function: Callable[..., Any]
    carriers: Callable[[Params, bool], int]
    """How many carrier pictures it takes, given its parameters and whether the turn has a picture."""
    fills: Params
    """What its sentences may name beside its parameters, with an example of each."""

    def resolve(self, overrides: Params | None) -> dict[str, Any]:
        """All parameters, defaults included.

        Raises:
            UserError: no such parameter, a wrong type, or a value beyond the limits.
        """
        out = dict(self.params)
        for key, value in (overrides or {}).items():
            if key not in out:
                raise UserError(f"attack {self.name!r} has no parameter {key!r}; {_mend(key, out, 'it has none')}")
            default = out[key]
            if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if type(value) is not type(default) or (isinstance(value, float) and not math.isfinite(value)):
                raise UserError(f"{self.name}.{key} is {value!r}; give a {type(default).__name__}, as {default!r}")
            limit = self.limits.get(key)
            if isinstance(limit, tuple) and not limit[0] <= value <= limit[1]:
                raise UserError(f"{self.name}.{key} is {value!r}; give {limit[0]} to {limit[1]}")
            if isinstance(limit, frozenset) and value not in limit:
                raise UserError(f"{self.name}.{key} is {value!r}; give one of {', '.join(sorted(limit - {''}))}"
                                + (", or nothing" if "" in limit else ""))
            if key in TEMPLATES:
                self._check_template(key, value)
            out[key] = value
        return out

    def _check_template(self, key: str, value: Any) -> None:
        try:
            value.format(**self.params, **self.fills)
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{self.name}.{key} is {value!r}, which cannot be filled in ({error!r}); name only its "
                            f"parameters in braces, and write a plain brace as {{{{") from error


ATTACKS: dict[str, Attack] = {}
"""Name -> attack. Importing text.py, image.py and endpoint_attacks.py fills it."""


def register(name: str, family: Family, kind: str, *, params: Params | None = None,
             limits: Params | None = None, carriers: Callable[[Params, bool], int] = lambda params, has_picture: 0,
             fills: Params | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function becomes attack `name`; the arguments as in `Attack`, the name goes into ids.

    A text attack is function(text, params, rng) -> str, an image or endpoint attack function(turn, params, rng, aids)
    -> Turn. Parameters are JSON values; strings among them may name other parameters in braces.

    Raises:
        UserError: the name is taken, or is also a kind or a family.
    """
    kinds = {attack.kind for attack in ATTACKS.values()} | {kind}
    if name in ATTACKS or name in kinds | {*FAMILIES} or kind in ATTACKS or kind in FAMILIES:
        raise UserError(f"attack {name!r} of kind {kind!r}: a name, kind or family of this name is there already; "
                        "choose another")

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        ATTACKS[name] = Attack(name=name, family=family, kind=kind, params=MappingProxyType(dict(params or {})),
                               limits=MappingProxyType(dict(limits or {})), function=function, carriers=carriers,
                               fills=MappingProxyType(dict(fills or {})))
        return function

    return add


def ordered() -> list[Attack]:
    """All attacks, by family, kind and name: the same whatever was imported first."""
    return sorted(ATTACKS.values(), key=lambda attack: (FAMILIES.index(attack.family), attack.kind, attack.name))


def find(names: Iterable[str]) -> list[Attack]:
    """The attacks that `names` name (each an attack, a kind or a family), each once, in the order of `ordered`.

    Raises:
        UserError: no such attack, kind or family; the message holds the nearest.
    """
    groups: dict[str, list[str]] = {}
    for attack in ordered():
        for group in (attack.name, attack.kind, attack.family):
            groups.setdefault(group, []).append(attack.name)
    wanted: set[str] = set()
    for name in names:
        if name not in groups:
            raise UserError(f"unknown attack {name!r}; {_mend(name, groups, '')}")
        wanted.update(groups[name])
    return [attack for attack in ordered() if attack.name in wanted]


def seed_of(seed: int, attack: str, key: str) -> int:
    """Seed of one transform: 53 bits (exact in JSON anywhere) of blake2b(run's seed, attack, twins' key or row id)."""
    digest = blake2b("\0".join((str(seed), attack, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 11


def _mend(name: str, known: Iterable[str], otherwise: str) -> str:
    known = list(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"choose from {', '.join(known)}" if known else otherwise
