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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from PIL import Image

from ..schema import ImageSource, Row, open_image
from . import image as _image  # noqa: F401  its attacks join the registry
from .carriers import Carriers
from .registry import ATTACKS, Aids, Attack, Params, Reader, Turn, Unfit, ordered, seed_of
from .text import attack as attack_text
from .text import last_text

MAX_IMAGE_PIXELS = 2**24


@dataclass(frozen=True, slots=True)
class Unit:
    """All rows of one key, and an attack that they meet."""

    key: str
    attack: Attack
    rows: tuple[int, ...]
    """Places in the list of rows."""


@dataclass(frozen=True, slots=True)
class Done:
    """A unit, and what became of it."""

    unit: Unit
    rows: tuple[Row, ...]
    """One for each of the unit's rows; none if it was dropped."""
    reason: str = ""
    """Why it was dropped."""


def attack_row(row: Row, name: str, *, params: Params | None = None, seed: int = 0, carriers: Carriers | None = None,
               key: str | None = None, read: Reader | None = None, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Row:
    """`row` under one attack of any family; id, attack and source_id say so.

    Args:
        row: keeps its label, tags, answer, key elements, category and task; earlier turns keep their pictures.
        name, params, seed: as in text.attack.
        carriers: pool of harmless pictures; None: made ones. The note's params name those used, as `carriers`.
        key: of the row's twins; None: its id.
        read: OCR that must read drawn text back.
        max_image_pixels: largest picture opened, in pixels.
    Raises:
        ValueError: no such attack or parameter.
        Unfit: no text in the last user turn, or text that cannot be read once drawn.
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
    turn = Turn(last_text(row), tuple(open_image(source, max_image_pixels, f"row {row.id}") for source in sources))
    names, pictures = (carriers or Carriers()).draw(chosen.carriers(resolved, bool(sources)), seed,
                                                    row.id if key is None else key)
    try:
        out: Turn = chosen.function(turn, resolved, random.Random(seed), Aids(pictures, read))
    except Unfit as error:
        raise error.at(f"row {row.id}, attack {name}") from error
    if out.text != turn.text or len(out.images) != len(turn.images):
        parts = [*({"type": "image"} for _ in out.images), {"type": "text", "text": out.text}]
    messages = (*row.messages[:-1], {"role": "user", "content": parts})
    note: dict[str, Any] = {"name": name, "params": {**resolved, **({"carriers": names} if names else {})},
                            "seed": seed, "source_id": row.id}
    images = (*row.images[:first], *(_source(image, turn.images, sources) for image in out.images))
    return replace(row, id=f"{row.id}+{name}", messages=messages, images=images, attack=note)


def twin_keys(rows: Sequence[Row], twin_by: str = "") -> list[str]:
    """The key of each row: what `twin_by` (a regular expression; its first group, if it has one) finds in its id.

    Raises:
        ValueError: not a regular expression, or no two rows share a key.
    """
    if not twin_by:
        return [row.id for row in rows]
    try:
        pattern = re.compile(twin_by)
    except re.error as error:
        raise ValueError(f"--twin-by {twin_by!r} is no regular expression ({error}); an example: '^(.*)-[abc]$'"
                         ) from error
    found = [pattern.search(row.id) for row in rows]
    # "\0" keeps what was found apart from ids that did not match.
    keys = [f"\0{match.group(1 if pattern.groups else 0) or ''}" if match else row.id
            for match, row in zip(found, rows, strict=True)]
    if len(set(keys)) == len(keys):
        raise ValueError(f"--twin-by {twin_by!r} finds no twins: no two ids share what it matches (an id is "
                         f"{rows[0].id!r}); correct it, or leave it out")
    return keys


def is_unsafe(row: Row) -> bool:
    """The row, image and text together, asks for harm."""
    return row.tags is not None and row.tags.get("combined") == "unsafe"


def deal(rows: Sequence[Row], keys: Sequence[str], attacks: Sequence[Attack], *, per_row: int, seed: int) -> list[Unit]:
    """The units of a run, in the rows' order.

    Args:
        keys: of each row, by `twin_keys`.
        per_row: attacks of each row, all different.
        seed: another one deals otherwise.
    Raises:
        ValueError: fewer attacks than `per_row`.
    """
    if not 1 <= per_row <= len(attacks):
        raise ValueError(f"--per-row is {per_row}, of {len(attacks)} attacks; give 1 to {len(attacks)}, or all")
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
            params: dict[str, dict[str, Any]] | None = None, drop: bool = False, read: Reader | None = None,
            max_image_pixels: int = MAX_IMAGE_PIXELS) -> Iterator[Done]:
    """The attacked rows, unit by unit.

    Args:
        seed: of the run; a unit's seed is `seed_of(seed, attack, key)`.
        params: attack -> parameters that differ from its defaults.
        drop: a unit with a row that its attack cannot take is dropped whole; else it is an error.
        carriers, read, max_image_pixels: as in `attack_row`.
    Raises:
        ValueError: a row that is attacked already.
        Unfit: see `attack_row`; only without `drop`.
    """
    for unit in units:
        name, out = unit.attack.name, []
        try:
            for row in (rows[place] for place in unit.rows):
                if row.attack is not None:
                    raise ValueError(f"row {row.id} is already the work of attack {row.attack['name']!r}; give plain "
                                     "rows, or remove it")
                out.append(attack_row(row, name, params=(params or {}).get(name), carriers=carriers, key=unit.key,
                                      seed=seed_of(seed, name, unit.key.removeprefix("\0")), read=read,
                                      max_image_pixels=max_image_pixels))
        except Unfit as error:
            if not drop:
                raise
            yield Done(unit, (), str(error))
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
