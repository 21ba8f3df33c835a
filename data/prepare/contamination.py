"""Training rows that an evaluation set holds too, by text and by image.

Texts are compared exactly after `normalised`. Images are compared by their decoded pixels (a hash, so a file may have
been renamed or saved losslessly again) and, for re-encoded and resized copies, by a dHash: 64 bits, each saying whether
a pixel of the 9 x 8 grey image is brighter than its left neighbour; two images are near when at most
`max_image_distance` bits differ and no pixel of their 16 x 16 grey images differs by more than 8 of 255 levels.

Both halves of "near" are needed. Measured (Pillow 13, 1,500 easy-vqa pictures, 300 pages of three typeset lines, 400
gradients with ellipses): at 4 bits 59% of the easy-vqa pictures and 67% of the pages have another one near them by
dHash alone, since flat areas and lines of text in one place make the same bits; with the grey image besides, 9 of 1.1
million easy-vqa pairs and no pair of pages are left. Of copies (JPEG quality 75, half and double size) 4 bits and 8
levels find at least 99%; a crop of 2% changes more than that and is not found.

What is dropped by default, and what only reported:
- "text and image": equal texts (or none on both sides), an image in common (same or near): dropped.
- "text": equal texts that no image goes with, or a text of at least 8 words that one image at most goes with in both
  sets, though the images differ: dropped. A shorter or repeated text ("what is shown?", FigStep's instruction) is the
  form of a question and not the question, so with another image it is only reported, as "text, other image".
- "image": the same pixels, another text: dropped, since the answer may hang on what was learnt of the picture. Not for
  a picture without structure (blank pages as in InternVL's text-only rows): it would drop whatever shares it.
- "near image": near, another text: reported. Pictures of one make (FigStep pages, charts) are near too often.
Paraphrases, translations, crops, and texts with another instruction around them are not found.
"""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import UserError
from ..index import Check, Index, Picture, index_rows
from ..schema import Row

KINDS = ("text and image", "text", "image", "text, other image", "near image")
"""How a row may match, the strongest first."""
DROPPED = frozenset(KINDS[:3])
MAX_LEVELS = 8
"""Largest difference of a pixel of the 16 x 16 grey images of two near images, of 255."""
_SPECIFIC_WORDS = 8
_AT_ONCE = 1024
_MINUS = r"-(?=\s*\d)|(?:(?<=\b\w)|(?<=[\d)]))-(?=\w\b)|(?:(?<=\b\w\s)|(?<=[\d)]\s))-(?=\s\w\b)"
"""Before a digit, or between a letter or number and a letter: not the hyphens of step-by-step."""
_TOKENS = r"\d+(?:[.,]\d+)*|[^\W\d_]+{marks}|[+*/=<>^%{signs}]|(?<=\w)#|" + _MINUS
_KINDS = {chr(code): unicodedata.category(chr(code)) for code in range(0x80, 0x10000)}
_MARKS = "".join(c for c, kind in _KINDS.items() if kind in ("Mn", "Mc", "Me"))
"""Vowel signs of Indic scripts and Thai, accents without a letter of their own: no word characters to `re`."""
_SIGNS = _MARKS + "".join(c for c, kind in _KINDS.items() if kind in ("Sm", "Sc", "So")) + "\U0001f000-\U0001faff"
_WORD = re.compile(_TOKENS.format(marks="", signs=""))
_ANY_WORD = re.compile(_TOKENS.format(marks=rf"(?:[{_MARKS}]+[^\W\d_]*)*", signs=_SIGNS))
"""As _WORD, which is faster, for texts that are not ASCII."""
_INVISIBLE = dict.fromkeys([0xAD, 0x34F, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070),
                            *range(0xFE00, 0xFE10), 0xFEFF])
_RAISED = re.compile("[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u215e]+")
_ONE_WAY = {0x2212: "-", 0xD7: "*", 0xF7: "/", 0x2044: "/", 0x2215: "/"}
"""Signs with an ASCII form that NFKC does not know."""


@dataclass(frozen=True, slots=True)
class Match:
    """A training row that an evaluation set holds."""

    index: int
    """Of the training row."""
    row_id: str
    evaluation_set: str
    evaluation_id: str
    """The first of the rows that match most strongly."""
    kind: str
    """One of KINDS."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was found; a row has one match for each evaluation set that holds it."""

    matches: tuple[Match, ...]
    num_rows: int
    """Training rows that were looked at."""

    def ids(self, kinds: Collection[str] = DROPPED) -> set[str]:
        """Ids of the training rows that match in one of `kinds`."""
        return {match.row_id for match in self.matches if match.kind in kinds}

    def table(self, examples: int = 3) -> str:
        """A line for each evaluation set and kind: number of rows, whether they are dropped, the first few."""
        groups: dict[tuple[str, int], list[Match]] = defaultdict(list)
        for match in self.matches:
            groups[match.evaluation_set, KINDS.index(match.kind)].append(match)
        lines = [f"{len(self.ids())} of {self.num_rows} rows are in an evaluation set"]
        for (name, kind), found in sorted(groups.items()):
            shown = ", ".join(f"{match.row_id} = {match.evaluation_id}" for match in found[:examples])
            lines.append(f"{name:<20}{KINDS[kind]:<20}{'dropped' if KINDS[kind] in DROPPED else 'kept':<9}"
                         f"{len(found):>7}  {shown}{', ...' if len(found) > examples else ''}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Print:
    """What an image is compared by."""

    pixels: bytes
    """Hash of size and RGB pixels."""
    dhash: int
    grey: bytes
    """16 x 16 pixels."""
    blank: bool
    """All of `grey` within MAX_LEVELS: no structure to know it by."""


@dataclass(frozen=True, slots=True)
class Look:
    """What is kept of a row."""

    text: bytes
    """Hash of its normalised text, the first byte 1 if it has _SPECIFIC_WORDS; empty if it has no word."""
    images: tuple[Print, ...]


class Looks:
    """What is kept of a set of rows to compare them by: the `check` of a pass over them, and its `see` (index.py).

    Memory: about 0.3 KiB a row, and 0.5 a distinct image.
    """

    def __init__(self, check: Check | None = None) -> None:
        """
        Args:
            check: called too.
        """
        self._all: list[Look] = []
        self._check = check

    def __call__(self, row: Row, pictures: Sequence[Picture]) -> tuple[int, int, int] | None:
        text = asked_text(row)
        specific = text.count(" ") + 1 >= _SPECIFIC_WORDS
        key = bytes([specific]) + hashlib.blake2b(text.encode(), digest_size=16).digest() if text else b""
        self._all.append(Look(key, tuple(picture.seen for picture in pictures)))
        return self._check(row, pictures) if self._check else None

    def of(self, rows: Index) -> list[Look]:
        """Of each row that the pass has left."""
        return [self._all[number] for number in rows.records["order"].tolist()]

    def see(self, image: Image.Image) -> "Print":
        """What a decoded image is compared by."""
        grey = image.convert("L")
        small = np.asarray(grey.resize((9, 8), Image.Resampling.LANCZOS))
        shape = np.asarray(grey.resize((16, 16), Image.Resampling.LANCZOS))
        pixels = hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()
        dhash = int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")
        return Print(pixels, dhash, shape.tobytes(), int(shape.max()) - int(shape.min()) <= MAX_LEVELS)


def find_contaminated(rows: Sequence[Row], evaluation_rows: Mapping[str, Sequence[Row]], *,
                      max_image_distance: int = 4, max_image_pixels: int = 16_777_216) -> Report:
    """`compare` of rows that were not looked at yet.

    Args:
        evaluation_rows: name of the set -> its rows.
        max_image_pixels: largest image, as for `load_rows`.
    Raises:
        UserError: as `compare`, or an image cannot be decoded.
    """
    def looked_at(members: Sequence[Row]) -> tuple[Sequence[Row], list[Look]]:
        looks = Looks()
        return members, looks.of(index_rows(members, max_image_pixels=max_image_pixels, check=looks, see=looks.see))

    sets = {name: looked_at(members) for name, members in evaluation_rows.items()}
    return compare(*looked_at(rows), sets, max_image_distance=max_image_distance)


def compare(rows: Sequence[Row], mine: Sequence[Look], sets: Mapping[str, tuple[Sequence[Row], Sequence[Look]]], *,
            max_image_distance: int = 4) -> Report:
    """Which of `rows` are in one of the evaluation sets, and why; see the module.

    Args:
        rows: training rows, read only where they match. mine: of each its look.
        sets: the same of each evaluation set, by name.
        max_image_distance: bits of 64 in which the dHash of near images may differ.
    Raises:
        UserError: `max_image_distance` is not in [0, 64].
    """
    if not 0 <= max_image_distance <= 64:
        raise UserError(f"max_image_distance is {max_image_distance}; a dHash has 64 bits, so give 0 to 64")
    matches: list[Match] = []
    for name, (members, looks) in sets.items():
        known = _Known(looks, mine, max_image_distance)
        for i, look in enumerate(mine):
            kind, other = known.best(look)
            if other is not None:
                matches.append(Match(i, rows[i].id, name, members[other].id, KINDS[kind]))
    return Report(tuple(matches), len(rows))


def normalised(text: str) -> str:
    """A text by its words: NFKC, case folded, punctuation and white space one space; "" if it has no word.

    What a short question may turn on stays: decimal signs, + * / = < > ^ %, a minus, the # of C#, vowel signs, and all
    symbols beyond ASCII ("x + 1" is not "x * 1", 3.5 not "35", 10\u00b2 not "102", a triangle ABC not an angle ABC).
    """
    if not text.isascii():
        apart = _RAISED.sub(r" \g<0>", text.translate(_INVISIBLE))
        text = unicodedata.normalize("NFKC", apart).translate(_ONE_WAY)
    plain = text.casefold()
    return " ".join((_WORD if plain.isascii() else _ANY_WORD).findall(plain))


def asked_text(row: Row) -> str:
    """The normalised text of the user's turns."""
    texts: list[str] = []
    for message in row.messages:
        content = message["content"]
        if message["role"] == "user":
            texts += [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return normalised(" ".join(texts))


class _Known:
    """One evaluation set, by text, by pixels, and by what is near an image of the training rows."""

    def __init__(self, members: Sequence[Look], mine: Sequence[Look], max_distance: int) -> None:
        # the first row of each: a list of all would be walked for each row that shares a form's text
        self.by_text: dict[bytes, int] = {}
        self.text_alone: dict[bytes, int] = {}
        self.by_pixels: dict[bytes, int] = {}
        self.by_both: dict[tuple[bytes, bytes], int] = {}
        for i, look in enumerate(members):
            self.by_text.setdefault(look.text, i)
            if not look.images:
                self.text_alone.setdefault(look.text, i)
            for image in look.images:
                self.by_pixels.setdefault(image.pixels, i)
                self.by_both.setdefault((look.text, image.pixels), i)
        self.near = _near(*((image for look in looks for image in look.images) for looks in (mine, members)),
                          max_distance)
        self.specific = {text for text in self.by_text if text[:1] == b"\1"}
        for looks in (mine, members):
            pictures: dict[bytes, set[bytes]] = defaultdict(set)
            for look in looks:
                if look.text in self.specific:
                    pictures[look.text] |= {image.pixels for image in look.images}
            self.specific -= {text for text, seen in pictures.items() if len(seen) > 1}

    def best(self, look: Look) -> tuple[int, int | None]:
        """(index in KINDS, index of the first such row) of the strongest match; the latter is None without any."""
        text, images = look.text, look.images
        known = [image for image in images if text or not image.blank]  # a row without words is its picture
        alike = {image.pixels for image in known}.union(*(self.near.get(image.pixels, ()) for image in known))
        both = [self.by_both[text, pixels] for pixels in alike if (text, pixels) in self.by_both]
        if both:
            return 0, min(both)
        if text in self.specific:
            return 1, self.by_text[text]
        if text and not images and text in self.text_alone:
            return 1, self.text_alone[text]
        for image in images:
            if image.pixels in self.by_pixels and not image.blank:
                return 2, self.by_pixels[image.pixels]
        if text and text in self.by_text:
            return 3, self.by_text[text]
        for image in images:
            if not image.blank and (others := self.near.get(image.pixels)):
                return 4, min(self.by_pixels[other] for other in others)
        return len(KINDS), None


def _near(left: Iterable[Print], right: Iterable[Print], max_distance: int) -> dict[bytes, set[bytes]]:
    """Pixel hash of each image of `left` -> those of the other images of `right` that are near it."""
    lefts, rights = (list({image.pixels: image for image in side}.values()) for side in (left, right))
    near: dict[bytes, set[bytes]] = {}
    if not lefts or not rights:
        return near
    hashes, greys = [], []
    for side in (lefts, rights):
        hashes.append(np.array([image.dhash for image in side], dtype=np.uint64))
        greys.append(np.frombuffer(b"".join(image.grey for image in side), dtype=np.uint8).reshape(len(side), 256))
    for start in range(0, len(lefts), _AT_ONCE):
        distance = np.bitwise_count(hashes[0][start:start + _AT_ONCE, None] ^ hashes[1])
        for i, close in enumerate(distance <= max_distance, start=start):
            found = np.flatnonzero(close)
            levels = np.abs(greys[0][i].astype(np.int16) - greys[1][found]).max(axis=1, initial=0)
            others = {rights[j].pixels for j in found[levels <= MAX_LEVELS]} - {lefts[i].pixels}
            if others:
                near[lefts[i].pixels] = others
    return near

