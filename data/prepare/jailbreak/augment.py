"""From rows to attacked rows: which row meets which attack, twins together, labels in the same shares.

    key       rows with one key are twins: the part of the id that `twin_by` matches, else the id itself
    deal      all rows of a key meet the same attacks, with the same parameters and the same seed
    shares    keys are dealt within their kind (which labels, with or without pictures, which domains), so that each
              attack meets unsafe rows in the share of the input, up to one key of each kind; then no attack tells the
              label. A text that cannot be drawn drops its whole key from that attack.

Nothing depends on the rows' order. A row's attack depends on the other rows; its bytes, given the attack, do not
(carrier pictures aside).
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from PIL import Image

from ...errors import UserError
from ...schema import ImageSource, Row, RowError, open_image
from . import endpoint_attacks as _endpoint_attacks  # noqa: F401  its attacks join the registry
from . import image as _image  # noqa: F401  and these
from .carriers import Carriers
from .registry import ATTACKS, Aids, Asker, Attack, Params, Question, Reader, Turn, Unfit, ordered, seed_of
from .text import attack as attack_text
from .text import last_text

MAX_IMAGE_PIXELS = 2**24
MAX_TWINS = 16
"""Rows of which all may be twins."""


@dataclass(frozen=True, slots=True)
class Unit:
    """All rows of one key, and an attack that they meet."""

    key: str
    attack: Attack
    rows: tuple[int, ...]
    """Places in the list of rows."""

    def seed(self, seed: int) -> int:
        """The attack's seed in a run of `seed`: one for all twins."""
        return seed_of(seed, self.attack.name, self.key.removeprefix("\0"))


@dataclass(frozen=True, slots=True)
class Done:
    """A unit, and what became of it."""

    unit: Unit
    rows: tuple[Row, ...]
    """One for each of the unit's rows; none if it was dropped."""
    reason: str = ""
    """Why it was dropped, in full."""
    problem: str = ""
    """The same without row and numbers, where it is counted."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What a model said about a unit, by asking.settle: enough to make its rows without the model."""

    model: str
    params: Params = field(default_factory=dict)
    """In place of the run's."""
    replies: tuple[tuple[str, ...], ...] = ()
    """All that were had for each row, in order."""
    dropped: Unfit | None = None


@dataclass(slots=True)
class Replay:
    """Asks nobody: gives the `replies` that were had."""

    model: str
    replies: Iterator[str]

    def __call__(self, question: Question) -> str:
        return next(self.replies)


def attack_row(row: Row, name: str, *, params: Params | None = None, seed: int = 0, carriers: Carriers | None = None,
               key: str | None = None, read: Reader | None = None, max_image_pixels: int = MAX_IMAGE_PIXELS,
               ask: Asker | None = None) -> Row:
    """`row` under one attack of any family; id, attack and source_id say so.

    Args:
        row: keeps its label, tags, answer, category, task, and key elements if it has any; earlier turns keep their
            pictures.
        name, params, seed: as in text.attack.
        carriers: pool of harmless pictures; None: made ones. The note's params name those used, as `carriers`.
        key: of the row's twins; None: its id.
        read: OCR that must read drawn text back.
        max_image_pixels: largest picture opened, in pixels.
        ask: the model of an endpoint attack; the note's params name it.
    Raises:
        UserError: no such attack or parameter, or no model for an endpoint attack.
        Unfit: no text in the last user turn, text that cannot be read once drawn, or no reply that will do.
        RowError: a picture that cannot be opened.
    """
    chosen = ATTACKS.get(name)
    if chosen is None or chosen.family == "text":
        return attack_text(row, name, params=params, seed=seed)
    resolved = chosen.resolve(params)
    content = row.messages[-1]["content"]
    parts: list[dict[str, str]] = content if isinstance(content, list) else [{"type": "text", "text": content}]
    first = len(row.images) - sum(part["type"] == "image" for part in parts)
    sources = row.images[first:]
    turn = Turn(last_text(row), sources if chosen.family == "endpoint" else
                tuple(open_image(source, max_image_pixels, f"row {row.id}") for source in sources))
    names, pictures = (carriers or Carriers()).draw(chosen.carriers(resolved, bool(sources)), seed,
                                                    row.id if key is None else key)
    try:
        out: Turn = chosen.function(turn, resolved, random.Random(seed), Aids(pictures, read, ask))
    except Unfit as error:
        raise error.at(f"row {row.id}, attack {name}") from error
    except RowError as error:  # a picture that the model was to see
        raise RowError(f"row {row.id}", *error.args[1:]) from error
    if out.text != turn.text or len(out.images) != len(turn.images):
        parts = [*({"type": "image"} for _ in out.images), {"type": "text", "text": out.text}]
    messages = (*row.messages[:-1], {"role": "user", "content": parts if out.images else out.text})
    note: dict[str, Any] = {"name": name, "params": {**resolved, **({"carriers": names} if names else {}), **out.note},
                            "seed": seed, "source_id": row.id}
    images = (*row.images[:first], *(_source(image, turn.images, sources) for image in out.images))
    return replace(row, id=f"{row.id}+{name}", messages=messages, images=images, attack=note,
                   key_elements=row.key_elements or out.key_elements)


def twin_keys(rows: Sequence[Row], twin_by: str = "") -> list[str]:
    """The key of each row: what `twin_by` (a regular expression; its first group, if it has one) finds in its id.

    Raises:
        UserError: not a regular expression, it finds an empty text, no two rows share a key, or all do.
    """
    if not twin_by:
        return [row.id for row in rows]
    try:
        pattern = re.compile(twin_by)
    except re.error as error:
        raise UserError(f"--twin-by {twin_by!r} is no regular expression ({error}); an example: '^(.*)-[abc]$'"
                        ) from error
    keys = []
    for row in rows:
        match = pattern.search(row.id)
        found = match.group(1 if pattern.groups else 0) if match else row.id
        if not found:  # all such rows would be twins
            raise UserError(f"--twin-by {twin_by!r} finds an empty text in the id {row.id!r}; let it find what only "
                            "twins share, or nothing")
        keys.append(f"\0{found}" if match else found)  # "\0" keeps what was found apart from ids that did not match
    if len(set(keys)) == len(keys):
        raise UserError(f"--twin-by {twin_by!r} finds no twins: no two ids share what it matches (an id is "
                        f"{rows[0].id!r}); correct it, or leave it out")
    if len(set(keys)) == 1 and len(keys) > MAX_TWINS:
        raise UserError(f"--twin-by {twin_by!r} makes twins of all {len(keys)} rows, which would meet one attack; let "
                        "it find what only twins share")
    return keys


def is_unsafe(row: Row) -> bool:
    """The row, image and text together, asks for harm."""
    return row.is_unsafe


def deal(rows: Sequence[Row], keys: Sequence[str], attacks: Sequence[Attack], *, per_row: int, seed: int) -> list[Unit]:
    """The units of a run, in the rows' order.

    Args:
        keys: of each row, by `twin_keys`.
        per_row: attacks of each row, all different.
        seed: another one deals otherwise.
    Raises:
        UserError: fewer attacks than `per_row`.
    """
    if not 1 <= per_row <= len(attacks):
        raise UserError(f"--per-row is {per_row}, of {len(attacks)} attacks; give 1 to {len(attacks)}, or all")
    members: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        members.setdefault(key, []).append(place)

    def kind(key: str) -> tuple:
        own = [rows[place] for place in members[key]]
        return (sorted(map(is_unsafe, own)), sorted(bool(row.images) for row in own), sorted(row.domain for row in own))

    rank = lambda key: blake2b(f"{seed}\0deal\0{key}".encode(), digest_size=8).digest()
    units = []
    # Dealt in turn along this order: any stretch of it, and so any kind, meets each attack equally often but for one.
    for position, key in enumerate(sorted(members, key=lambda key: (kind(key), rank(key)))):
        chosen = [attacks[(position * per_row + i) % len(attacks)] for i in range(per_row)]
        units += [Unit(key, attack, tuple(members[key])) for attack in chosen]
    order = {attack.name: i for i, attack in enumerate(ordered())}
    units.sort(key=lambda unit: (unit.rows[0], order[unit.attack.name]))
    _assert_same_shares(rows, units, members, kind)
    return units


def augment(rows: Sequence[Row], units: Iterable[Unit], *, seed: int, carriers: Carriers | None = None,
            params: Mapping[str, Params] | None = None, drop: bool = False, read: Reader | None = None,
            max_image_pixels: int = MAX_IMAGE_PIXELS,
            settled: Mapping[tuple[str, str], Settled] | None = None) -> Iterator[Done]:
    """The attacked rows, unit by unit.

    Args:
        seed: of the run; a unit's seed is `seed_of(seed, attack, key)`.
        params: attack -> parameters that differ from its defaults.
        drop: a unit with a row that its attack cannot take is dropped whole; else it is an error.
        carriers, read, max_image_pixels: as in `attack_row`.
        settled: (key, attack) -> what the model said, for the units of endpoint attacks; these are dropped, where they
            must be, without `drop` too.
    Raises:
        UserError: a row that is attacked already.
        Unfit: see `attack_row`; only without `drop`.
    """
    for unit in units:
        name, out = unit.attack.name, []
        said = (settled or {}).get((unit.key, name))
        try:
            if said and said.dropped:
                raise said.dropped
            for number, row in enumerate(rows[place] for place in unit.rows):
                if row.attack is not None:
                    raise UserError(f"row {row.id} is already the work of attack {row.attack['name']!r}; give plain "
                                    "rows, or remove it")
                out.append(attack_row(
                    row, name, params={**(params or {}).get(name, {}), **(said.params if said else {})},
                    carriers=carriers, key=unit.key, seed=unit.seed(seed), read=read, max_image_pixels=max_image_pixels,
                    ask=Replay(said.model, iter(said.replies[number])) if said else None))
        except Unfit as error:
            if not (drop or said):
                raise
            yield Done(unit, (), str(error), error.args[0])
        else:
            yield Done(unit, tuple(out))


def _source(image: Image.Image, opened: Sequence[Image.Image], sources: Sequence[ImageSource]) -> ImageSource:
    """An untouched picture stays what it was, a path or bytes."""
    return next((source for old, source in zip(opened, sources, strict=True) if old is image), image)


def _assert_same_shares(rows: Sequence[Row], units: Sequence[Unit], members: dict[str, list[int]], kind: Any) -> None:
    counts = Counter((str(kind(unit.key)[0]), unit.attack.name) for unit in units)
    labels = {str(kind(key)[0]) for key in members}
    for label in labels:
        of_label = [counts[label, name] for name in {unit.attack.name for unit in units}]
        assert max(of_label) - min(of_label) <= 1, (label, counts)
