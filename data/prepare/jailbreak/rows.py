"""From rows to attacked rows: which row meets which attack, twins together, labels in the same shares.

    key       rows with one key are twins: the part of the id that `twin_by` matches, else the id itself
    assign    all rows of a key meet the same attacks, with the same parameters and the same seed
    shares    keys are dealt within their kind (which labels, with or without pictures, which domains), so that each
              attack meets unsafe rows in the share of the input, up to one key of each kind; then no attack tells the
              label. A text that cannot be drawn drops its whole key from that attack.

Nothing depends on the rows' order. A row's attack depends on the other rows; its bytes, given the attack, do not
(carrier pictures aside).
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from PIL import Image

from ...errors import UserError
from ...schema import Row, RowError, open_image
from . import endpoint_attacks as _endpoint_attacks  # noqa: F401  its attacks join the registry
from . import text as _text  # noqa: F401  and these
from .image import Carriers
from .registry import ATTACKS, Aids, Attack, AttackerModel, Params, Question, Reader, Turn, Unfit, ordered, seed_of

MAX_IMAGE_PIXELS = 2**24
MAX_TWINS = 16
"""Rows of which all may be twins."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """An attack, and all rows of one key, which meet it."""

    key: str
    attack: Attack
    rows: tuple[int, ...]
    """Indices in the list of rows."""

    def seed(self, seed: int) -> int:
        """The attack's seed in a run of `seed`: one for all twins."""
        return seed_of(seed, self.attack.name, self.key.removeprefix("\0"))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an assignment."""

    assignment: Assignment
    rows: tuple[Row, ...]
    """One for each of its rows; none if it was dropped."""
    reason: str = ""
    """Why it was dropped, in full."""
    problem: str = ""
    """The same without row and numbers, where it is counted."""


@dataclass(frozen=True, slots=True)
class AttackerReplies:
    """What an attacker model said about an assignment, by asking.settle: enough to make its rows without the model."""

    model: str
    params: Params = field(default_factory=dict)
    """In place of the run's."""
    replies: tuple[tuple[str, ...], ...] = ()
    """All that were had for each row, in order."""
    dropped: Unfit | None = None


@dataclass(slots=True)
class Replay:
    """An attacker model that asks nobody: it gives the `replies` that were had."""

    model: str
    replies: Iterator[str]

    def __call__(self, question: Question) -> str:
        return next(self.replies)


def attack_row(row: Row, name: str, *, params: Params | None = None, seed: int = 0, carriers: Carriers | None = None,
               key: str | None = None, read: Reader | None = None, max_image_pixels: int = MAX_IMAGE_PIXELS,
               ask: AttackerModel | None = None) -> Row:
    """`row` under one attack: every user text rewritten, or by an image or endpoint attack the last user turn.

    Args:
        row: keeps its label, tags, answer, category, task, and key elements if it has any; other turns of an image or
            endpoint attack keep text and pictures. id, attack and source_id tell of the attack.
        name: of an attack of any family.
        params: differing from the attack's defaults.
        seed: of the attack's generator; `seed_of` makes one for each row.
        carriers: pool of harmless pictures; None: made ones. The note's params name those used, as `carriers`.
        key: of the row's twins; None: its id.
        read: OCR that must read drawn text back.
        max_image_pixels: largest picture opened, in pixels.
        ask: the model of an endpoint attack; the note's params name it.
    Raises:
        UserError: no such attack or parameter, or no model for an endpoint attack.
        Unfit: no text in the last user turn, a text attack that leaves it as it is (one word, or no letter that it
            knows), text that cannot be read once drawn, or no reply that will do.
        RowError: a picture that cannot be opened.
    """
    if name not in ATTACKS:
        raise UserError(f"unknown attack {name!r}; choose one of {sorted(ATTACKS)}")
    attack, rng = ATTACKS[name], random.Random(seed)
    resolved = attack.resolve(params)
    try:
        if attack.family == "text":
            out, note = _rewritten(row, lambda text: attack.function(text, resolved, rng)), {}
        else:
            draw = lambda number: (carriers or Carriers()).draw(number, seed, row.id if key is None else key)
            out, note = _turned(row, attack, resolved, rng, draw, Aids(read=read, ask=ask), max_image_pixels)
    except Unfit as error:
        raise error.at(f"row {row.id}, attack {name}") from error
    return replace(out, id=f"{row.id}+{name}", attack={"name": name, "params": {**resolved, **note}, "seed": seed,
                                                       "source_id": row.id})


def last_text(row: Row) -> str:
    """The text parts of the last user turn, joined by newlines."""
    content = row.messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def _rewritten(row: Row, rewrite: Callable[[str], str]) -> Row:
    """`row` with all its user texts rewritten."""
    def content(old: Any) -> Any:
        if isinstance(old, str):
            return rewrite(old)
        return [{**part, "text": rewrite(part["text"])} if part["type"] == "text" else part for part in old]

    before = last_text(row)
    if not before.strip():
        raise Unfit("the last user turn has no text to rewrite", "leave the row out, or give it a text")
    out = replace(row, messages=tuple({**message, "content": content(message["content"])}
                                      if message["role"] == "user" else message for message in row.messages))
    after = last_text(out)
    if after.split() == before.split() or after.endswith(f"\n{before}"):  # but for white space, and an instruction
        raise Unfit("the attack leaves the text as it is", "use other attacks for this row, or drop such rows with "
                    "--drop-illegible")
    return out


def _turned(row: Row, attack: Attack, params: Params, rng: random.Random,
            draw: Callable[[int], tuple[list[str], list[Image.Image]]], aids: Aids, max_image_pixels: int,
            ) -> tuple[Row, dict[str, Any]]:
    """`row` with its last user turn under an image or endpoint attack, and what its note has to say beside `params`.

    `draw`: names and pictures of so many carriers.
    """
    content = row.messages[-1]["content"]
    parts: list[dict[str, str]] = content if isinstance(content, list) else [{"type": "text", "text": content}]
    first = len(row.images) - sum(part["type"] == "image" for part in parts)
    sources = row.images[first:]
    turn = Turn(last_text(row), sources if attack.family == "endpoint" else
                tuple(open_image(source, max_image_pixels, f"row {row.id}") for source in sources))
    names, pictures = draw(attack.carriers(params, bool(sources)))
    try:
        out: Turn = attack.function(turn, params, rng, replace(aids, carriers=pictures))
    except RowError as error:  # a picture that the model was to see
        raise RowError(f"row {row.id}", *error.args[1:]) from error
    if out.text != turn.text or len(out.images) != len(turn.images):
        parts = [*({"type": "image"} for _ in out.images), {"type": "text", "text": out.text}]
    untouched = {id(opened): source for opened, source in zip(turn.images, sources, strict=True)}
    return replace(
        row, messages=(*row.messages[:-1], {"role": "user", "content": parts if out.images else out.text}),
        images=(*row.images[:first], *(untouched.get(id(image), image) for image in out.images)),
        key_elements=row.key_elements or out.key_elements,
    ), {**({"carriers": names} if names else {}), **out.note}


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


def assign(rows: Sequence[Row], keys: Sequence[str], attacks: Sequence[Attack], *, per_row: int, seed: int,
           ) -> list[Assignment]:
    """The assignments of a run, in the rows' order.

    Args:
        keys: of each row, by `twin_keys`.
        per_row: attacks of each row, all different.
        seed: another one assigns otherwise.
    Raises:
        UserError: a row that is attacked already, or fewer attacks than `per_row`.
    """
    for row in rows:
        if row.attack is not None:
            raise UserError(f"row {row.id} is already the work of attack {row.attack['name']!r}; give plain rows only")
    if not 1 <= per_row <= len(attacks):
        raise UserError(f"--per-row is {per_row}, of {len(attacks)} attacks; give 1 to {len(attacks)}, or all")
    members: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)

    def kind(key: str) -> tuple[list[bool], list[bool], list[str]]:
        own = [rows[index] for index in members[key]]
        return (sorted(row.is_unsafe for row in own), sorted(bool(row.images) for row in own),
                sorted(row.domain for row in own))

    rank = lambda key: blake2b(f"{seed}\0deal\0{key}".encode(), digest_size=8).digest()
    assignments = []
    # Dealt in turn along this order: any stretch of it, and so any kind, meets each attack equally often but for one.
    for position, key in enumerate(sorted(members, key=lambda key: (kind(key), rank(key)))):
        chosen = [attacks[(position * per_row + i) % len(attacks)] for i in range(per_row)]
        assignments += [Assignment(key, attack, tuple(members[key])) for attack in chosen]
    order = {attack.name: i for i, attack in enumerate(ordered())}
    assignments.sort(key=lambda one: (one.rows[0], order[one.attack.name]))
    counts = Counter((str(kind(one.key)[0]), one.attack.name) for one in assignments)
    for labels in {labels for labels, _ in counts}:
        met = [counts[labels, name] for name in {one.attack.name for one in assignments}]
        assert max(met) - min(met) <= 1, (labels, counts)
    return assignments


def augment(rows: Sequence[Row], assignments: Iterable[Assignment], *, seed: int, carriers: Carriers | None = None,
            params: Mapping[str, Params] | None = None, drop: bool = False, read: Reader | None = None,
            max_image_pixels: int = MAX_IMAGE_PIXELS,
            settled: Mapping[tuple[str, str], AttackerReplies] | None = None) -> Iterator[Outcome]:
    """The attacked rows, assignment by assignment.

    Args:
        seed: of the run; an assignment's seed is `seed_of(seed, attack, key)`.
        params: attack -> parameters that differ from its defaults.
        drop: an assignment with a row that its attack cannot take is dropped whole; else it is an error.
        carriers, read, max_image_pixels: as in `attack_row`.
        settled: (key, attack) -> what the model said, for endpoint attacks; these are dropped, where they must be,
            without `drop` too.
    Raises:
        Unfit: see `attack_row`; only without `drop`.
    """
    for one in assignments:
        name, out = one.attack.name, []
        said = (settled or {}).get((one.key, name))
        try:
            if said and said.dropped:
                raise said.dropped
            for number, row in enumerate(rows[index] for index in one.rows):
                out.append(attack_row(
                    row, name, params={**(params or {}).get(name, {}), **(said.params if said else {})},
                    carriers=carriers, key=one.key, seed=one.seed(seed), read=read, max_image_pixels=max_image_pixels,
                    ask=Replay(said.model, iter(said.replies[number])) if said else None))
        except Unfit as error:
            if not (drop or said):
                raise
            yield Outcome(one, (), str(error), error.args[0])
        else:
            yield Outcome(one, tuple(out))
