"""The contact sheet: a few samples of every attack on one picture, to be looked at before a training run is spent."""

from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageOps

from ...schema import Row, open_image
from .registry import ordered
from .render import dejavu_sans, face_of, lacks, wrap
from .rows import MAX_IMAGE_PIXELS, last_text
from .text import ZERO_WIDTH

SAMPLES, PER_LABEL = 3, 2
"""Samples of an attack, and most of them with one label."""
CELL, PICTURE, TEXT, HEADER, GAP = 250, 200, 96, 30, 8
"""Pixels: width of a sample, height of its pictures, of its text, of an attack's heading, and between samples."""
FONT, LINE = 12, 15
UNSAFE, BENIGN, INK, FAINT = (178, 34, 34), (0, 110, 60), (20, 20, 20), (110, 110, 110)


@dataclass(slots=True)
class _Sample:
    id: str
    unsafe: bool
    text: str
    picture: Image.Image | None


@dataclass(slots=True)
class ContactSheet:
    """Collects samples while rows are made; keeps thumbnails only."""

    max_image_pixels: int = MAX_IMAGE_PIXELS
    heldout: frozenset[str] = frozenset()
    """Attacks that are marked as held out."""
    _samples: dict[str, list[_Sample]] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """`row`, if it is attacked and its attack has not enough samples of its label yet."""
        if row.attack is None:
            return
        own = self._samples.setdefault(row.attack["name"], [])
        unsafe = row.is_unsafe
        if len(own) < SAMPLES and sum(sample.unsafe == unsafe for sample in own) < PER_LABEL:
            images = [open_image(source, self.max_image_pixels, f"row {row.id}") for source in row.images]
            own.append(_Sample(row.id, unsafe, last_text(row), _side_by_side(images) if images else None))

    def draw(self) -> Image.Image:
        """The sheet, RGB: two attacks side by side."""
        attacks = [attack for attack in ordered() if attack.name in self._samples]
        width, height = SAMPLES * (CELL + GAP) + 2 * GAP, HEADER + PICTURE + TEXT + 2 * GAP
        sheet = Image.new("RGB", (2 * width, max(1, (len(attacks) + 1) // 2) * height), "white")
        pen = ImageDraw.Draw(sheet)
        for number, attack in enumerate(attacks):
            left, top = number % 2 * width + GAP, number // 2 * height + GAP
            mark = ", held out" if attack.name in self.heldout else ""
            pen.rectangle((left, top, left + width - 2 * GAP, top + HEADER - 6), fill=(232, 236, 242))
            pen.text((left + 6, top + 3), f"{attack.name}  ({attack.family}, {attack.kind}{mark})", fill=INK,
                     font=face_of("", 15))
            for place, sample in enumerate(self._samples[attack.name]):
                _draw_sample(sheet, pen, sample, left + place * (CELL + GAP), top + HEADER)
        return sheet


def _draw_sample(sheet: Image.Image, pen: ImageDraw.ImageDraw, sample: _Sample, left: int, top: int) -> None:
    small = face_of(dejavu_sans(), FONT)
    label = "unsafe" if sample.unsafe else "benign"
    pen.text((left, top), label, fill=UNSAFE if sample.unsafe else BENIGN, font=small)
    pen.text((left + 50, top), _clipped(sample.id, CELL - 50), fill=FAINT, font=small)
    y = top + LINE + 4
    if sample.picture is not None:
        sheet.paste(sample.picture, (left, y))
        width, height = sample.picture.size
        pen.rectangle((left, y, left + width - 1, y + height - 1), outline=(200, 200, 200))
        y += height + 4
    room = (top + PICTURE + TEXT - y) // LINE
    lines = wrap(_visible(sample.text), CELL, small, breaks=True) or []
    if len(lines) > room:
        lines = [*lines[:room - 1], f"... ({len(sample.text)} characters)"]
    for number, line in enumerate(lines):
        pen.text((left, y + number * LINE), line, fill=INK, font=small)


def _side_by_side(images: list[Image.Image]) -> Image.Image:
    """All pictures of a row in CELL x (PICTURE - 20) pixels at most: strips below one another, others two by two."""
    size = (CELL, PICTURE - 20)
    if len(images) == 1 or all(image.width > 1.5 * image.height for image in images):
        width, height = max(image.width for image in images), sum(image.height for image in images)
        gap, top = height // 50, 0  # strips are cut from one picture: they are shown in one scale
        out = Image.new("RGB", (width, height + gap * (len(images) - 1)), (200, 200, 200))
        for image in images:
            out.paste(image, (0, top))
            top += image.height + gap
        return ImageOps.contain(out, size)
    width, height = (size[0] - 4) // 2, size[1] // (-(-len(images) // 2)) - 4
    out = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        out.paste(ImageOps.contain(image, (width, height)), (i % 2 * (width + 4), i // 2 * (height + 4)))
    return out


def _visible(text: str) -> str:
    """Zero-width characters as a middle dot, and what the font lacks as a question mark."""
    text = text.replace(ZERO_WIDTH, "\u00b7" if dejavu_sans() else "|")
    return "".join(c if c in " \n" or not lacks(dejavu_sans(), c) else "?" for c in text)


def _clipped(text: str, width: int) -> str:
    font = face_of(dejavu_sans(), FONT)
    text = _visible(text.replace("\n", " "))
    while font.getlength(text) > width and len(text) > 4:
        text = f"...{text[4:]}"
    return text
