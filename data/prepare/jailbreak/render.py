"""Text drawn into pictures, and the check that it can be read there.

`layout` breaks a text into lines in the largest font that fits, `ink` draws them as a coverage mask, and `check` holds
what was drawn against three limits, all in the pixels that the model will see (after its own resize):

    glyph height   height of the letter x, in pixels
    contrast       WCAG 2 ratio of ink to what was under it: the median over a word's pixels, the worst word counts
    whole          no pixel of ink within 1 pixel of the border, no line outside the picture

The built-in font of Pillow covers ASCII; other text takes DejaVu Sans of matplotlib, or the user's font. Nothing is
ever drawn as an empty box.
"""

import importlib
import importlib.util
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...errors import MissingPackage, UserError
from .registry import Reader, Unfit

LINE_HEIGHT = 1.25
"""Distance of lines, in font sizes."""
STEP = 0.92
"""Each font size tried is this share of the one before."""
LUMINANCE = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.arange(256) / 255])
"""Relative luminance of an sRGB channel's value (WCAG 2)."""
CHANNELS = np.array([0.2126, 0.7152, 0.0722])
"""Shares of red, green and blue in it."""
OCR_LIKENESS = 0.7
"""Share of a text's letters and digits that OCR must read back, in order."""
_NO_CHARACTER = "\U0010fffe"
_MEND = "use a shorter text, a larger picture or another attack for this row, or drop such rows with --drop-illegible"


@dataclass(frozen=True, slots=True)
class Lines:
    """A text broken into lines that are not drawn yet."""

    text: tuple[str, ...]
    font: ImageFont.FreeTypeFont
    x_height: int
    """Height of the letter x in pixels."""
    pitch: int
    """Distance of two lines in pixels."""

    @property
    def height(self) -> int:
        """Pixels from the top of the first line to the bottom of the last."""
        return self.pitch * len(self.text)


@dataclass(frozen=True, slots=True)
class Ink:
    """A drawn text."""

    mask: Image.Image
    """Coverage of each pixel of the picture by ink, 0 to 255."""
    words: tuple[tuple[int, int, int, int], ...]
    """Box (left, top, right, bottom) of each word, in pixels."""
    rows: tuple[int, ...]
    """First pixel row of each line, and the row after the last line."""
    x_height: int
    text: str


def layout(text: str, width: int, height: int, *, largest: int, x_height: float, font: str = "") -> Lines:
    """`text` in lines of at most `width` pixels, `height` in all, in the largest font that fits (to one STEP).

    A word is broken only where no allowed size has it on one line (base64, or a language without spaces).

    Args:
        text: newlines stay line ends.
        largest: font size in pixels to start from.
        x_height: smallest height of the letter x, in pixels.
        font: font file; empty: Pillow's own, or DejaVu Sans for characters that it lacks.
    Raises:
        Unfit: it fits in no allowed size, is empty, or has characters that the font lacks.
    """
    text = "\n".join(line for line in map(_plain, text.splitlines()) if line)
    if not text:
        raise Unfit("there is no text to draw", "leave the row out, or give its last user turn a text")
    path = font_for(text, font)
    sizes = []
    size = float(largest)
    while round(size) > 0 and _x_height(path, round(size)) >= x_height:
        sizes.append(round(size))
        size *= STEP
    counts = Counter(text)
    for breaks in (False, True):
        for size in sizes:
            face, pitch = face_of(path, size), round(size * LINE_HEIGHT)
            room = height // pitch
            # Most sizes are out without a try: so many lines there would be if no line ended early.
            if sum(_advance(face, c) * number for c, number in counts.items() if not c.isspace()) > room * width:
                continue
            lines = wrap(text, width, face, breaks)
            if lines is not None and len(lines) <= room and all(face.getlength(line) <= width for line in lines):
                return Lines(tuple(lines), face, _x_height(path, size), pitch)
    raise Unfit(f"{len(text)} characters do not fit into {width} x {height} pixels with an x of at least "
                f"{x_height:.1f} pixels", _MEND)


def ink(lines: Lines, size: tuple[int, int], origin: tuple[int, int]) -> Ink:
    """The mask of `lines` in a picture of `size` (width, height), from `origin` (left, top) on.

    Raises:
        Unfit: a letter would reach into the outermost pixels of the picture, or beyond them.
    """
    mask = Image.new("L", size, 0)
    pen = ImageDraw.Draw(mask)
    left, top = origin
    words = []
    for number, line in enumerate(lines.text):
        y = top + number * lines.pitch
        box = pen.textbbox((left, y), line, font=lines.font)
        if box[0] < 1 or box[1] < 1 or box[2] > size[0] - 1 or box[3] > size[1] - 1:
            raise Unfit(f"the line {line!r} reaches {tuple(map(round, box))}, beyond a picture of {size[0]} x {size[1]}"
                        " pixels", _MEND)
        pen.text((left, y), line, fill=255, font=lines.font)
        start = 0
        for word in line.split():
            start = line.index(word, start)
            x = left + lines.font.getlength(line[:start])
            words.append((max(0, int(x)), max(0, int(box[1])), min(size[0], int(x + lines.font.getlength(word)) + 1),
                          min(size[1], int(box[3]) + 1)))
            start += len(word)
    rows = tuple(top + number * lines.pitch for number in range(len(lines.text) + 1))
    return Ink(mask, tuple(words), rows, lines.x_height, "\n".join(lines.text))


def check(before: Image.Image, after: Image.Image, drawn: Ink, *, resize_pixels: int, min_glyph: float,
          min_contrast: float, whole: tuple[int, int] | None = None, read: Reader | None = None) -> float:
    """Whether the text can be read, after the model's resize.

    Args:
        before, after: RGB pictures without and with the text, of the same size as `drawn.mask`.
        resize_pixels: the model shrinks a larger picture to this many pixels (width x height).
        min_glyph: smallest height of the letter x, in pixels.
        min_contrast: smallest WCAG 2 contrast ratio, 1 to 21.
        whole: (width, height) of the picture that the model gets, where `after` is only a part of it.
        read: OCR that must read the text back too.
    Returns:
        The contrast ratio of the worst word.
    Raises:
        Unfit: a limit is missed; the message has the measured value.
    """
    width, height = whole or after.size
    scale = min(1.0, (resize_pixels / (width * height)) ** 0.5)
    if drawn.x_height * scale < min_glyph:
        raise Unfit(f"a drawn x is {drawn.x_height * scale:.1f} pixels high where the model sees it, under "
                    f"{min_glyph:g}", _MEND)
    box = drawn.mask.getbbox()
    if box is None or box[0] < 1 or box[1] < 1 or box[2] > after.width - 1 or box[3] > after.height - 1:
        raise Unfit(f"the ink spans {box} of {after.size}: it is missing, or cut off at the border", _MEND)
    mask = drawn.mask
    if scale < 1:
        small = (max(1, round(after.width * scale)), max(1, round(after.height * scale)))
        before, after, mask = (picture.resize(small, Image.Resampling.BICUBIC) for picture in (before, after, mask))
    covered, before_rgb, after_rgb = np.asarray(mask) >= 128, np.asarray(before), np.asarray(after)
    worst = 21.0
    for left, top, right, bottom in drawn.words:
        part = (slice(int(top * scale), int(bottom * scale) + 1), slice(int(left * scale), int(right * scale) + 1))
        under, over = (_luminance(rgb[part][covered[part]]) for rgb in (before_rgb, after_rgb))
        ratio = (np.maximum(under, over) + 0.05) / (np.minimum(under, over) + 0.05)
        # Ink that the resize has thinned out everywhere is no ink.
        worst = min(worst, float(np.median(ratio)) if ratio.size else 1.0)
    if worst < min_contrast:
        raise Unfit(f"the contrast of a drawn word is {worst:.2f}, under {min_contrast:g}", _MEND)
    if read is not None:
        likeness = _likeness(drawn.text, read(after))
        if likeness < OCR_LIKENESS:
            raise Unfit(f"OCR reads {likeness:.0%} of the drawn text back, under {OCR_LIKENESS:.0%}", _MEND)
    return worst


def paint(picture: Image.Image, drawn: Ink, colours: Image.Image | None = None, opacity: float = 1.0) -> Image.Image:
    """`picture` with the text on it, at `opacity` (0 to 1), black or in the `colours` of a picture of the same size."""
    mask = drawn.mask if opacity == 1 else drawn.mask.point([round(v * opacity) for v in range(256)])
    return Image.composite(colours or Image.new("RGB", picture.size), picture, mask)


def contrasting(picture: Image.Image, opacity: float) -> Image.Image:
    """White where white ink of `opacity` has more contrast to the RGB `picture` than black ink has, else black."""
    weights = np.rint(LUMINANCE[:, None] * CHANNELS * 1e6).astype(np.int64)  # integers: the same on any machine
    values = np.arange(256)
    under, white, black = (
        sum(weights[np.rint(shown).astype(int)[np.asarray(picture)[..., i]], i] for i in range(3)) + 50_000
        for shown in (values, values + opacity * (255 - values), values * (1 - opacity))
    )
    return Image.fromarray(np.where(white * black > under * under, 255, 0).astype(np.uint8)).convert("RGB")


def rapidocr() -> Reader:
    """OCR by rapidocr-onnxruntime (Apache-2.0; its networks ship inside the package).

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        module = importlib.import_module("rapidocr_onnxruntime")
    except ImportError as error:
        raise MissingPackage("--ocr needs rapidocr-onnxruntime: pip install rapidocr-onnxruntime") from error
    engine: Callable = module.RapidOCR()

    def read(picture: Image.Image) -> str:
        found, _ = engine(np.asarray(picture)[:, :, ::-1])  # it takes BGR
        return " ".join(line[1] for line in found or ())

    return read


def _plain(line: str) -> str:
    """NFC, white space as single blanks, without the format characters that show as nothing."""
    line = unicodedata.normalize("NFC", line)
    return " ".join("".join(c for c in line if unicodedata.category(c) != "Cf").split())


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont, breaks: bool) -> list[str] | None:
    """Lines of at most `width` pixels, kerning aside; None if a word is wider and may not be broken.

    Pillow's ImageText.wrap breaks no word, and measures a line anew for each word: 0.7 s for 300 words, not 15 ms.
    """
    lines = []
    space = _advance(font, " ")
    for paragraph in text.split("\n"):
        words: list[str] = []
        used = 0.0
        for word in paragraph.split(" "):
            length = sum(_advance(font, c) for c in word)
            if words and used + space + length > width:
                lines.append(" ".join(words))
                words, used = [], 0.0
            if length > width:
                if not breaks:
                    return None
                *full, word = _pieces(word, width, font)
                lines += full
                length = sum(_advance(font, c) for c in word)
            used += length + (space if words else 0)
            words.append(word)
        if any(words):
            lines.append(" ".join(words))
    return lines


def _pieces(word: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """A word too wide for a line, in pieces of at most `width` pixels, and of one character at least."""
    pieces, used = [""], 0.0
    for c in word:
        if pieces[-1] and used + _advance(font, c) > width:
            pieces.append("")
            used = 0.0
        pieces[-1] += c
        used += _advance(font, c)
    return pieces


@lru_cache(maxsize=65536)
def _advance(font: ImageFont.FreeTypeFont, character: str) -> float:
    return font.getlength(character)


@lru_cache(maxsize=256)
def face_of(path: str, size: int) -> ImageFont.FreeTypeFont:
    """The font of a file ("": Pillow's own) in `size` pixels.

    Raises:
        UserError: it cannot be read, or Pillow cannot draw text.
    """
    try:  # the basic layout, which every build of Pillow has: the same pixels on any machine
        face = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC) if path \
            else ImageFont.load_default(size)
    except OSError as error:
        raise UserError(f"the font {path} cannot be read ({error}); give a TrueType or OpenType file") from error
    if not isinstance(face, ImageFont.FreeTypeFont):
        raise UserError("this Pillow is built without FreeType and cannot draw text; pip install --force-reinstall "
                        "pillow")
    return face


@lru_cache(maxsize=256)
def _x_height(path: str, size: int) -> int:
    return round(-face_of(path, size).getbbox("x", anchor="ls")[1])


@lru_cache(maxsize=16384)
def lacks(path: str, character: str) -> bool:
    """The font shows `character` as nothing, or as the box that stands for what it has not."""
    shapes = []
    for c in (character, _NO_CHARACTER):
        shape = Image.new("L", (64, 64))
        ImageDraw.Draw(shape).text((16, 8), c, fill=255, font=face_of(path, 32))
        shapes.append(shape)
    return shapes[0].getbbox() is None or shapes[0].tobytes() == shapes[1].tobytes()


def font_for(text: str, path: str) -> str:
    """`path`, or if that lacks a character of `text`, a font file that has them all; "" is Pillow's own font.

    Raises:
        Unfit: a character is in no font, or of a script that would need shaping.
    """
    used = sorted(set(text) - set(" \n"))
    # Without a shaping engine letters of these scripts stand apart, in the wrong order or beside their marks.
    unshaped = [c for c in used if unicodedata.bidirectional(c) in ("R", "AL") or unicodedata.category(c)[0] == "M"]
    if unshaped:
        raise Unfit(f"text with {_named(unshaped)} needs shaping, which is not done here",
                    "use text attacks for this row, or drop such rows with --drop-illegible")
    for candidate in (path, dejavu_sans()) if path != dejavu_sans() else (path,):
        missing = [c for c in used if lacks(candidate, c)]
        if not missing:
            return candidate
    more = "" if dejavu_sans() else "pip install matplotlib, which brings DejaVu Sans, or "
    raise Unfit(f"the font has no {_named(missing)}", f"{more}give a font file that has it with --param font=FILE, or "
                "drop such rows with --drop-illegible")


@lru_cache(maxsize=1)
def dejavu_sans() -> str:
    """The font file that comes with matplotlib, which is found but not imported; "" if it is not there."""
    spec = importlib.util.find_spec("matplotlib")
    path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf" if spec and spec.origin else None
    return str(path) if path and path.exists() else ""


def _named(characters: Sequence[str]) -> str:
    shown = ", ".join(f"{unicodedata.name(c, 'character')} (U+{ord(c):04X})" for c in characters[:3])
    return f"{shown} and {len(characters) - 3} more" if len(characters) > 3 else shown


def _luminance(rgb: np.ndarray) -> np.ndarray:
    """WCAG 2 relative luminance, 0 to 1, of (n, 3) uint8."""
    return LUMINANCE[rgb] @ CHANNELS


def _likeness(drawn: str, found: str) -> float:
    drawn, found = ("".join(c for c in text.lower() if c.isalnum()) for text in (drawn, found))
    blocks = SequenceMatcher(None, drawn, found, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / max(1, len(drawn))
