"""One row of data: its fields, the strict parser of a raw record, and the opening of its images.

A row comes from a JSON line, a parquet record or a Hugging Face dataset (files.py), or from the embedded data.
A bad record is a `RowError` that names file, line, field, problem and mend. The message has all the problems of the
row, so that it is mended once. Nothing is repaired, guessed or dropped, with two exceptions: a null counts as an absent
field (parquet fills absent fields with nulls), and `prompt` is short for one user message with the images before the
text.

A text never holds the place of an image: see foreign.py.

An image becomes 8-bit RGB. Where that is one thing only, it is done silently; where a choice would be made for the user
or the picture would be spoiled, the row is an error:
- converted: grey, palette and CMYK (by Pillow's own formula; an embedded colour profile is not applied, so colours of
  print scans may be off, always alike), 16-bit colour PNGs (their high bytes, as any viewer shows them), EXIF rotation,
  transparent parts (on white); of a phone's JPEG with previews or depth maps behind it (MPO), the photograph.
- errors: 16-bit, 32-bit and float grey (which values are black and white is not known: 12-bit scans would be nearly
  black if scaled, and Pillow's own conversion clips at 255, nearly white); an animation (its first frame may show
  nothing of what the row asks about); a missing, unreadable, corrupt or cut off file; one side over MAX_ASPECT_RATIO
  times the other; more pixels than the limit, by the header, before anything is decoded (huge images and bombs); what
  would take long for its pixels: more than MAX_SCANS passes over them, or a file of little but segments.
"""

import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from PIL import Image, ImageOps

from .errors import MOST_TOLD, Problems, RowError, shown
from .foreign import meant, mend, nearest, placeholder
from .strict_json import MAX_DEPTH

TASKS = ("safety", "jailbreak", "value", "knowledge", "general", "math", "mcq", "ifeval", "helpful")
TAGS = ("image", "text", "combined")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_TEXT = 1 << 24
"""Most characters of a text; the longest contexts hold some 4 million."""
MAX_ASPECT_RATIO = 200
"""Longest over shortest side that Qwen's image processor takes (transformers' `smart_resize`)."""
RESERVED = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>",
             "<|endoftext|>")
T = TypeVar("T")
MAX_SCANS = 100
"""Passes over a JPEG's pixels: encoders use 10 or so; 2,000 took 47 s."""
_BYTES_PER_PIXEL, _BYTES_BESIDE = 8, 1 << 26
"""Longest image file: 16-bit RGBA that does not compress, and what cameras put beside it (previews, a short film)."""
_READS, _BYTES_PER_READ = 20_000, 64
"""Reads that a file may take, and one more for so many bytes of it. Pillow reads each segment by itself: 24 MB of those
with 1 to 12 bytes take 12 s and more. The smallest of use are a GIF's blocks of pixels, 2 reads to 256 bytes."""
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)
_ANIMATED = ("PNG", "WEBP", "GIF")
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError, struct.error, zlib.error)
"""What Pillow raises on corrupt bytes: the first three seen when fuzzing the formats above, the rest in its sources."""

ImageSource = str | bytes | Image.Image
"""An image file's path, an encoded image, or a decoded image."""


class Message(TypedDict):
    """A chat message; a list content holds {"type": "text", "text": ...} and {"type": "image"} parts."""

    role: str
    content: str | list[dict[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt with what its rewards, its SFT and its provenance need."""

    id: str
    """Unique in the data set."""
    task: str
    """One of TASKS; routes the rewards."""
    domain: str
    """Unit of the sampling mixture and of the logged rewards."""
    messages: tuple[Message, ...]
    """Chat up to the turn to be answered: roles system (first only), user, assistant; the last one is user."""
    images: tuple[ImageSource, ...] = ()
    """One for each image part of `messages`, in reading order."""
    answer: str | None = None
    """Reference answer."""
    options: tuple[str, ...] | None = None
    """Choices of a multiple-choice question; required for task mcq."""
    tags: dict[str, str] | None = None
    """image, text, combined -> safe | unsafe; `combined` is required for tasks safety and jailbreak."""
    category: str | None = None
    """Kind of risk or of question, for tables."""
    chosen: str | None = None
    """Response that SFT imitates."""
    constraints: tuple[dict[str, Any], ...] = ()
    """Checkable instructions of an ifeval row, as JSON objects."""
    key_elements: tuple[str, ...] = ()
    """What a thinking that looks at the image names."""
    attack: dict[str, Any] | None = None
    """name (str), params (JSON object), seed (int), source_id (str) of the transform that made the row."""
    source: str
    """Where the row comes from."""
    licence: str
    """Licence of the row."""

    @property
    def is_unsafe(self) -> bool:
        """The row as a whole, image and text together, asks for harm; one without tags does not."""
        return self.tags is not None and self.tags.get("combined") == "unsafe"


FIELDS = (*(f.name for f in fields(Row)), "prompt")


def parse_row(obj: Any, where: str) -> Row:
    """A checked Row from one raw record.

    Args:
        obj: dict of the fields of Row, nulls meaning absent, with `prompt` (str) allowed in place of `messages`. An
            image is a path (str), encoded bytes, a PIL image, or {"bytes", "path"} as Hugging Face stores it.
        where: FILE:LINE, for messages.
    Returns:
        The row. Images are neither opened nor looked for: see `open_image`.
    Raises:
        RowError: all of unknown or missing fields, wrong types, unknown task, role or tag, placeholders in a text,
            image parts that do not match `images`.
    """
    if not isinstance(obj, dict):
        raise RowError(where, "", f"a row is an object of fields, not {_kind(obj)}", 'write {"id": ..., "task": ...}')
    obj = _without_nulls(obj, where)
    problems = Problems()
    take = problems.take
    listed = f"; the fields are {', '.join(FIELDS)}"  # once
    for i, name in enumerate(name for name in obj if name not in FIELDS):
        near = meant(str(name), FIELDS, obj) if i < MOST_TOLD else ""  # it takes 0.5 ms, and a row may have 10^6 names
        problems.add(where, str(name), "there is no such field",
                     f"did you mean `{near}`?" if near else f"remove it{listed}")
        listed = listed if near else ""

    required = {name: take(_text, obj.get(name), name, where) for name in ("id", "task", "domain", "source", "licence")}
    optional = {name: take(_text, obj[name], name, where) for name in ("answer", "category") if name in obj}
    if "chosen" in obj:
        optional["chosen"] = take(_plain_text, obj["chosen"], "chosen", where)
    task = required["task"]
    if task and task not in TASKS:
        near = nearest(task, TASKS)
        problems.add(where, "task", f"unknown task {shown(repr(task))}", f"give one of {', '.join(TASKS)}"
                     + (f" (did you mean {near}?)" if near else ""))

    images = take(_each, obj.get("images", []), "images", where, _image)
    messages = take(_messages, obj, None if images is None else len(images), where)
    options = take(_options, obj["options"], where) if "options" in obj else None
    if task == "mcq" and "options" not in obj:
        problems.add(where, "options", "task mcq has no options", "give the list of choices")
    tags = take(_tags, obj["tags"], where) if "tags" in obj else None
    if task in ("safety", "jailbreak") and not ("tags" in obj and (tags is None or "combined" in tags)):
        problems.add(where, "tags.combined", f"task {task} does not say whether the row is safe",
                     'give "safe" or "unsafe" for image and text taken together')
    constraints = take(_each, obj.get("constraints", []), "constraints", where, _json_object)
    key_elements = take(_each, obj.get("key_elements", []), "key_elements", where, _text)
    attack = take(_attack, obj["attack"], where) if "attack" in obj else None
    problems.settle()
    return Row(**required, **optional, messages=messages, images=images, options=options, tags=tags,
               constraints=constraints, key_elements=key_elements, attack=attack)


def open_image(source: ImageSource, max_pixels: int, where: str, field: str = "images") -> Image.Image:
    """The decoded image, upright (EXIF orientation applied), transparent parts on white.

    Args:
        source: path, encoded bytes or PIL image.
        max_pixels: most pixels (width x height), tested on the header before anything is decoded.
        where, field: named in messages.
    Returns:
        A PIL image of mode RGB; see the module for what is converted.
    Raises:
        RowError: missing or unreadable file, not a JPEG, PNG, WEBP, GIF or BMP, corrupt or cut off, more than
            `max_pixels`, one side more than 200 times the other, an animation, grey of more than 8 bits, or what would
            take long for its pixels.
    """
    return opened(source, max_pixels, where, field)[0]


def opened(source: ImageSource, max_pixels: int, where: str, field: str) -> tuple[Image.Image, bytes]:
    """`open_image`, and the bytes that were decoded: the file's content, or the pixels of a PIL image."""
    name = source if isinstance(source, str) else \
        "the PIL image" if isinstance(source, Image.Image) else "the embedded image"
    if isinstance(source, str) and not os.path.isfile(source):
        problem = f"{name} is not a regular file" if os.path.exists(source) else f"the image file {name} does not exist"
        raise RowError(where, field, problem, "put it there, or correct the path")
    try:
        if isinstance(source, Image.Image):
            image = _decode(source, max_pixels, name, where, field)
            return image, repr(image.size).encode() + image.tobytes()
        size, most = len(source) if isinstance(source, bytes) else os.path.getsize(source), \
            _BYTES_PER_PIXEL * max_pixels + _BYTES_BESIDE
        if size > most:
            raise RowError(where, field, f"{name} has {size} bytes, more than {most}", _SHRINK)
        content = encoded(source)
        with Image.open(_Metered(content), formats=IMAGE_FORMATS) as image:
            if image.format in ("JPEG", "MPO") and (scans := _scans(content)) > MAX_SCANS:
                raise RowError(where, field, f"{name} has {scans} scans, more than {MAX_SCANS}",
                               "save it again, or remove the row")
            return _decode(image, max_pixels, name, where, field), content
    except RowError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError(where, field, f"{name} is beyond {max_pixels} pixels ({error})", _SHRINK) from error
    except PermissionError as error:
        raise RowError(where, field, f"{name} cannot be read ({error.strerror})",
                       "give this user the right to read it") from error
    except Image.UnidentifiedImageError as error:
        raise RowError(where, field, f"{name} is not a readable {', '.join(IMAGE_FORMATS)} image",
                       "replace or convert it, or remove the row") from error
    except _DECODE_ERRORS as error:
        raise RowError(where, field, f"{name} is corrupt or cut off ({error})",
                       "replace it, or remove the row") from error


def image_size(source: ImageSource) -> tuple[int, int]:
    """(width, height) in pixels of an image that `open_image` can open, from its header."""
    if isinstance(source, Image.Image):
        return source.size
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS) as image:
        return image.size


def encoded(source: str | os.PathLike | bytes) -> bytes:
    """The file's content of an image that is not decoded."""
    return source if isinstance(source, bytes) else Path(source).read_bytes()


class _Metered(io.BytesIO):
    """Bytes that Pillow may not read in too many parts."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.left = _READS + len(content) // _BYTES_PER_READ

    def read(self, size: int | None = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise OSError("it consists of too many small segments")
        return super().read(size)


def _scans(content: bytes) -> int:
    """Scans of a JPEG, counted as libjpeg meets them, up to the end of its first picture: films may follow."""
    if content.count(b"\xff\xda") <= MAX_SCANS:  # nearly always, and at once
        return 0
    count, at = 0, 2
    while count <= MAX_SCANS and (found := _MARKER.search(content, at)) and found[1] != b"\xd9":
        count += found[1] == b"\xda"
        alone = found[1] in (b"\x01", b"\xd8")  # all others have a length, their pixels aside
        at = found.end() + (0 if alone else int.from_bytes(content[found.end():found.end() + 2], "big"))
    return count


_SHRINK = "shrink it, remove the row, or raise --data.max-image-pixels"


def _decode(image: Image.Image, max_pixels: int, name: Any, where: str, field: str) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise RowError(where, field, f"{name} has {width} x {height} = {width * height} pixels, "
                       f"more than {max_pixels}", _SHRINK)
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise RowError(where, field, f"{name} is {width} x {height}, one side more than {MAX_ASPECT_RATIO} times "
                       "the other", "crop it, or remove the row")
    if image.format in _ANIMATED and getattr(image, "is_animated", False):
        raise RowError(where, field, f"{name} is an animation", "give one frame of it, as PNG or JPEG")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise RowError(where, field, f"{name} has pixels of mode {image.mode}: grey of more than 8 bits, of no known "
                       "range", "convert it to 8 bits, with the range that shows its content")
    if image.has_transparency_data:  # transparent pixels hide arbitrary colours; qwen_vl_utils shows them on white too
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", int: "a number",
             float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _without_nulls(value: Any, where: str, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise RowError(where, "", f"it holds more than {MAX_DEPTH} objects and lists inside one another",
                       "flatten it, or remove the row")
    if isinstance(value, dict):
        return {k: _without_nulls(v, where, depth + 1) for k, v in value.items() if v is not None}
    return [_without_nulls(v, where, depth + 1) for v in value] if isinstance(value, list | tuple) else value


def _text(value: Any, field: str, where: str) -> str:
    if value is None:
        raise RowError(where, field, "is missing", "add it as a string")
    if not isinstance(value, str):
        raise RowError(where, field, f"is {_kind(value)}, not a string", "put it in quotes")
    if not value.strip():
        raise RowError(where, field, "is empty", "fill it in, or leave an optional field out")
    if len(value) > MAX_TEXT:
        raise RowError(where, field, f"has {len(value)} characters, more than {MAX_TEXT}", "shorten it")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(where, field, f"holds half of a character at position {error.start} (a lone surrogate)",
                           "write whole Unicode characters") from error
    return value


def _each(value: Any, field: str, where: str, parse: Callable[[Any, str, str], T]) -> tuple[T, ...]:
    """`parse` of each item of a list, called with the item and its own field."""
    if not isinstance(value, list):
        raise RowError(where, field, f"is {_kind(value)}, not a list", "put it in [ ]")
    problems = Problems()
    parsed = tuple(problems.take(parse, item, f"{field}[{i}]", where) for i, item in enumerate(value))
    problems.settle()
    return parsed


def _options(value: Any, where: str) -> tuple[str, ...]:
    options = _each(value, "options", where, _text)
    if len(set(options)) < max(2, len(options)):
        raise RowError(where, "options", f"{len(options)} options, {len(set(options))} of them different",
                       "give at least 2, all different")
    return options


def _object(value: Any, field: str, where: str, keys: tuple[str, ...], problems: Problems) -> dict[str, Any]:
    """The value, which must be an object; keys that it may not have are noted in `problems`."""
    if not isinstance(value, dict):
        raise RowError(where, field, f"is {_kind(value)}, not an object", f"give an object of {', '.join(keys)}")
    for key in value:
        if key not in keys:
            problems.add(where, f"{field}.{key}", "there is no such field",
                         f"remove it; the fields are {', '.join(keys)}")
    return value


def _json_object(value: Any, field: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(where, field, f"is {_kind(value)}, not an object", "give a JSON object")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RowError(where, field, f"is not plain JSON ({error})",
                       "use strings, finite numbers, lists and objects") from error
    return value


def _image(value: Any, field: str, where: str) -> ImageSource:
    if isinstance(value, dict):  # Hugging Face's Image feature; the bytes win, the path is then only a name
        problems = Problems()
        item = _object(value, field, where, ("bytes", "path"), problems)
        problems.settle()
        value = item.get("bytes", item.get("path"))
    if isinstance(value, bytes):
        if not value:
            raise RowError(where, field, "is an image of 0 bytes", "replace it, or remove the row")
        return value
    if isinstance(value, Image.Image):
        return value
    if value is not None and not isinstance(value, str):
        raise RowError(where, field, f"is {_kind(value)}, not an image", "give a path, bytes or a PIL image")
    value = _text(value, field, where)
    if "://" in value or value.startswith("data:"):
        raise RowError(where, field, f"{value[:80]} is a URL", "download the image and give its path")
    return value


def _messages(obj: dict[str, Any], num_images: int | None, where: str) -> tuple[Message, ...]:
    """The messages of a row; num_images None: the number is not known, as the images are bad."""
    if ("prompt" in obj) == ("messages" in obj):
        problem = "stands beside `prompt`" if "prompt" in obj else "is missing"
        raise RowError(where, "messages", problem, "give either `prompt` or `messages`")
    if "prompt" in obj:
        text = _plain_text(obj["prompt"], "prompt", where)
        parts = [*({"type": "image"} for _ in range(num_images or 0)), {"type": "text", "text": text}]
        return ({"role": "user", "content": parts if num_images else text},)

    messages = _each(obj["messages"], "messages", where, _message)
    problems = Problems()
    if not messages:
        raise RowError(where, "messages", "is an empty list", "give at least one item")
    for i, message in enumerate(messages):
        if message["role"] == "system" and i:
            problems.add(where, f"messages[{i}].role", "unexpected role 'system'",
                         "use system (first only), user or assistant")
    if messages[-1]["role"] == "assistant":
        problems.add(where, f"messages[{len(messages) - 1}].role", "the last message is by assistant",
                     "end with the user's turn; the reply that SFT imitates goes into `chosen`")
    if messages[-1]["role"] == "system" and len(messages) == 1:
        problems.add(where, "messages[0].role", "the last message is by system", "end with the user's turn")
    num_parts = sum(part["type"] == "image" for message in messages if isinstance(message["content"], list)
                    for part in message["content"])
    if num_images is not None and num_parts != num_images:
        problems.add(where, "images", f"{num_images} images, but `messages` has {num_parts} image parts",
                     'write one {"type": "image"} part for each image')
    problems.settle()
    return messages


def _message(value: Any, field: str, where: str) -> Message:
    problems = Problems()
    item = _object(value, field, where, ("role", "content"), problems)
    role = problems.take(_text, item.get("role"), f"{field}.role", where)
    if role and role not in ("system", "user", "assistant"):
        problems.add(where, f"{field}.role", f"unexpected role {shown(repr(role))}",
                     "use system (first only), user or assistant")
    content = problems.take(_content, item.get("content"), f"{field}.content", where)
    problems.settle()
    return {"role": role, "content": content}


def _content(value: Any, field: str, where: str) -> str | list[dict[str, str]]:
    if not isinstance(value, list):
        return _plain_text(value, field, where)
    if not value:
        raise RowError(where, field, "is an empty list", "give at least one item")
    return list(_each(value, field, where, _part))


def _plain_text(value: Any, field: str, where: str) -> str:
    text = _text(value, field, where)
    if "<" not in text:
        return text
    problems = Problems()
    for token in RESERVED:
        if token in text:  # the tokenizer would read it as an image's place, or as the end of a turn
            problems.add(where, field, f"holds the reserved token {token}",
                         'remove it; an image is a {"type": "image"} part, and a turn a message')
    if held := placeholder(text):
        problems.add(where, field, f"holds {shown(held)}, which the model would read as words", mend(held, field))
    problems.settle()
    return text


def _part(value: Any, field: str, where: str) -> dict[str, str]:
    problems = Problems()
    part = _object(value, field, where, ("type", "text"), problems)
    problems.settle()
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": _plain_text(part.get("text"), f"{field}.text", where)}
    if kind != "image":
        raise RowError(where, f"{field}.type", f"unknown kind of part {shown(repr(kind))}", 'use "text" or "image"')
    if "text" in part:
        raise RowError(where, f"{field}.text", "an image part has a text", "write the text as a part of its own")
    return {"type": "image"}


def _tags(value: Any, where: str) -> dict[str, str]:
    problems = Problems()
    tags = _object(value, "tags", where, TAGS, problems)
    for key, tag in tags.items():
        if key in TAGS and tag not in ("safe", "unsafe"):
            problems.add(where, f"tags.{key}", f"is {shown(repr(tag))}", 'give "safe" or "unsafe"')
    problems.settle()
    return tags


def _attack(value: Any, where: str) -> dict[str, Any]:
    problems = Problems()
    attack = _object(value, "attack", where, ("name", "params", "seed", "source_id"), problems)
    seed = attack.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool):
        problems.add(where, "attack.seed", f"is {_kind(seed)}, not a whole number", "give the seed of the transform")
    made = {"name": problems.take(_text, attack.get("name"), "attack.name", where), "seed": seed,
            "params": problems.take(_json_object, attack.get("params", {}), "attack.params", where),
            "source_id": problems.take(_text, attack.get("source_id"), "attack.source_id", where)}
    problems.settle()
    return made
