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
- "text and image": equal texts, an image in common (same or near): dropped.
- "text": equal texts that no image goes with, or a text of at least 8 words that one image at most goes with in both
  sets, though the images differ: dropped. A shorter or repeated text ("what is shown?", FigStep's instruction) is the
  form of a question and not the question, so with another image it is only reported, as "text, other image".
- "image": the same pixels, another text: dropped, since the answer may hang on what was learnt of the picture. Not for
  a picture without structure (blank pages as in InternVL's text-only rows): it would drop whatever shares it.
- "near image": near, another text: reported. Pictures of one make (FigStep pages, charts) are near too often.
Paraphrases, translations, crops, and texts with another instruction around them are not found.
"""

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .dataset import MAX_WORKERS, load_rows
from .schema import ImageSource, Row, open_image

KINDS = ("text and image", "text", "image", "text, other image", "near image")
"""How a row may match, the strongest first."""
DROPPED = frozenset(KINDS[:3])
MAX_LEVELS = 8
"""Largest difference of a pixel of the 16 x 16 grey images of two near images, of 255."""
_SPECIFIC_WORDS = 8
_AT_ONCE = 1024
_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|[+*/=<>^%]|-(?=\s*\d)")
_INVISIBLE = dict.fromkeys([0xAD, *range(0x200B, 0x2010), 0x2060, 0xFEFF])


@dataclass(frozen=True, slots=True)
class Match:
    """A training row that an evaluation set holds."""

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
class _Print:
    """What an image is compared by."""

    pixels: bytes
    """Hash of size and RGB pixels."""
    dhash: int
    grey: bytes
    """16 x 16 pixels."""
    blank: bool
    """All of `grey` within MAX_LEVELS: no structure to know it by."""


def load_evaluation_sets(files: Mapping[str, Sequence[str | Path]], *, max_image_pixels: int) -> dict[str, list[Row]]:
    """The rows of each named evaluation set, from row files as `load_rows` takes them; a published set becomes one with
    adapters/convert.py."""
    return {name: load_rows(paths, max_image_pixels=max_image_pixels) for name, paths in files.items()}


def find_contaminated(rows: Sequence[Row], evaluation_rows: Mapping[str, Sequence[Row]], *,
                      max_image_distance: int = 4, max_image_pixels: int = 16_777_216) -> Report:
    """Which of `rows` are in one of the evaluation sets, and why; see the module.

    Args:
        rows: training rows.
        evaluation_rows: name of the set -> its rows.
        max_image_distance: bits of 64 in which the dHash of near images may differ.
        max_image_pixels: largest image, as for `load_rows`.
    Raises:
        ValueError: `max_image_distance` is not in [0, 64], or an image cannot be decoded.
    Cost: each distinct image is decoded once, on at most MAX_WORKERS threads; about 0.4 KiB a distinct image.
    """
    if not 0 <= max_image_distance <= 64:
        raise ValueError(f"max_image_distance is {max_image_distance}; a dHash has 64 bits, so give 0 to 64")
    sets = {name: list(members) for name, members in evaluation_rows.items()}
    prints = _prints((row for members in (rows, *sets.values()) for row in members), max_image_pixels)
    mine = [_look(row, prints) for row in rows]
    matches: list[Match] = []
    for name, members in sets.items():
        index = _Index(members, prints, mine, max_image_distance)
        for row, seen in zip(rows, mine, strict=True):
            kind, other = index.best(*seen)
            if other is not None:
                matches.append(Match(row.id, name, other, KINDS[kind]))
    return Report(tuple(matches), len(rows))


def drop_contaminated(rows: Sequence[Row], report: Report, kinds: Collection[str] = DROPPED) -> list[Row]:
    """The rows that `report` has no match of `kinds` for, in order."""
    gone = report.ids(kinds)
    return [row for row in rows if row.id not in gone]


def normalised(text: str) -> str:
    """A text by its words: NFKC, case folded, punctuation and white space one space; "" if it has no word.

    Decimal signs, the signs + * / = < > ^ % and a minus before a digit stay: "x + 1" is not "x * 1", nor 3.5 "35".
    """
    plain = unicodedata.normalize("NFKC", text.translate(_INVISIBLE)).casefold()
    return " ".join(_WORD.findall(plain))


def asked_text(row: Row) -> str:
    """The normalised text of the user's turns."""
    texts: list[str] = []
    for message in row.messages:
        content = message["content"]
        if message["role"] == "user":
            texts += [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return normalised(" ".join(texts))


Seen = tuple[str, tuple[_Print, ...]]
"""A row's normalised text and what its images are compared by."""


class _Index:
    """One evaluation set, by text, by pixels, and by what is near an image of the training rows."""

    def __init__(self, members: Sequence[Row], prints: Mapping[str | int, _Print], mine: Sequence[Seen],
                 max_distance: int) -> None:
        self.ids = [row.id for row in members]
        self.looks = [_look(row, prints) for row in members]
        self.by_text: dict[str, list[int]] = defaultdict(list)
        self.by_pixels: dict[bytes, list[int]] = defaultdict(list)
        for i, (text, images) in enumerate(self.looks):
            self.by_text[text].append(i)
            for image in images:
                self.by_pixels[image.pixels].append(i)
        self.near = _near([image for _, images in mine for image in images],
                          [image for _, images in self.looks for image in images], max_distance)
        self.specific = {text for text in self.by_text if text.count(" ") + 1 >= _SPECIFIC_WORDS}
        for looks in (mine, self.looks):
            pictures: dict[str, set[bytes]] = defaultdict(set)
            for text, images in looks:
                if text in self.specific:
                    pictures[text] |= {image.pixels for image in images}
            self.specific -= {text for text, seen in pictures.items() if len(seen) > 1}

    def best(self, text: str, images: tuple[_Print, ...]) -> tuple[int, str | None]:
        """(place in KINDS, id of the first such row) of the strongest match; the id is None without any."""
        same = self.by_text.get(text, []) if text else []
        alike = {image.pixels for image in images}.union(*(self.near.get(image.pixels, ()) for image in images))
        for i in same:
            if any(image.pixels in alike for image in self.looks[i][1]):
                return 0, self.ids[i]
        for i in same:
            if text in self.specific or not (images or self.looks[i][1]):
                return 1, self.ids[i]
        for image in images:
            if image.pixels in self.by_pixels and not image.blank:
                return 2, self.ids[self.by_pixels[image.pixels][0]]
        if same:
            return 3, self.ids[same[0]]
        for image in images:
            if not image.blank and (others := self.near.get(image.pixels)):
                return 4, self.ids[min(self.by_pixels[other][0] for other in others)]
        return len(KINDS), None


def _look(row: Row, prints: Mapping[str | int, _Print]) -> Seen:
    return asked_text(row), tuple(prints[_key(image)] for image in row.images)


def _key(image: ImageSource) -> str | int:
    return image if isinstance(image, str) else id(image)


def _prints(rows: Iterable[Row], max_pixels: int) -> dict[str | int, _Print]:
    """Of each distinct image, by path or by identity of the object in memory."""
    found: dict[str | int, tuple[ImageSource, str]] = {}
    for row in rows:
        for image in row.images:
            found.setdefault(_key(image), (image, row.id))
    items, prints = list(found.items()), {}

    def look(item: tuple[str | int, tuple[ImageSource, str]]) -> tuple[str | int, _Print]:
        key, (image, row_id) = item
        return key, _print(open_image(image, max_pixels, f"row {row_id}"))

    with ThreadPoolExecutor(min(MAX_WORKERS, len(os.sched_getaffinity(0)))) as pool:
        for start in range(0, len(items), _AT_ONCE):
            prints.update(pool.map(look, items[start:start + _AT_ONCE]))
    return prints


def _print(image: Image.Image) -> _Print:
    grey = image.convert("L")
    small = np.asarray(grey.resize((9, 8), Image.Resampling.LANCZOS))
    shape = np.asarray(grey.resize((16, 16), Image.Resampling.LANCZOS))
    pixels = hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()
    dhash = int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")
    return _Print(pixels, dhash, shape.tobytes(), int(shape.max()) - int(shape.min()) <= MAX_LEVELS)


def _near(left: Iterable[_Print], right: Iterable[_Print], max_distance: int) -> dict[bytes, set[bytes]]:
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

