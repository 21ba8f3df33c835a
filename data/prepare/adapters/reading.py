"""What the adapters share: how a published set is declared, its files, one record read strictly, the finished rows.

An adapter is one function, declared with `published` in safety.py, reasoning.py or instructions.py: it takes a `Record`
and gives rows of schema.py. `Adapter` does the rest: it walks the files, refuses another layout, completes and checks
each row.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import unquote

from ... import strict_json
from ...errors import RowError, shown
from ...files import KINDS, is_saved_dataset, read_records
from ...schema import parse_row

T = TypeVar("T")
Source = str | Path | Sequence[str | Path]
"""A file, a folder with a set's files (its training split is read), or a saved Hugging Face dataset; or several."""
Reject = Callable[[RowError], None]
"""What becomes of a bad record: raise the error, or note it and go on with the next one."""
PLACEHOLDER = "<image>"
"""Stands in a published text for the next image."""
UNREAD = re.compile("video|audio", re.IGNORECASE)
"""In the name of a field, as video_path: a record that fills it is about something that no row can hold."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHORT = 60
"""Longest text, in characters, that is taken for an answer by itself."""
_HELD_OUT = re.compile(r"(?:^|[-_.])(?:test|val|valid|validation|eval|evaluation|dev)(?:[-_.]|$)", re.IGNORECASE)
"""In a file's name: not the training split."""
_HALF = re.compile("[\ud800-\udfff]")
"""A lone surrogate: JSON can spell it, UTF-8 cannot."""
_OPTION = re.compile(r"^[ \t]*\(?([A-Z])[).:][ \t]*(\S.*)$", re.MULTILINE)


class LayoutError(RowError):
    """A record is in another layout; where it is the file's first, none of the file can be read."""


def fail(error: RowError) -> NoReturn:
    """The strict `Reject`."""
    raise error


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a published set, read strictly."""

    data: dict[str, Any]
    where: str
    """FILE:NUMBER, for messages."""
    roots: tuple[str, ...]
    """Absolute folders that image paths may start from."""
    unlabelled: str = ""
    """What the prompts become that the set does not label: "unsafe", "safe" or "reject"."""

    def bad(self, field: str, problem: str, mend: str = "mend or remove the record") -> RowError:
        """The error to raise for a field."""
        return RowError(self.where, field, problem, mend)

    def part(self, data: dict[str, Any]) -> "Record":
        """A part of the record, to be read as strictly; its fields as messages name them."""
        return replace(self, data=data)

    def optional(self, field: str) -> str | None:
        """A text; None when it is absent, null or blank."""
        value = self.data.get(field)
        if value is not None and not isinstance(value, str):
            raise self.bad(field, f"is {type(value).__name__}, not a text")
        if value and _HALF.search(value):
            raise self.bad(field, "holds half of a character (a lone surrogate)")
        return value.strip() or None if value else None

    def text(self, field: str) -> str:
        """A text that must be there."""
        value = self.optional(field)
        if value is None:
            raise self.bad(field, "is missing or blank")
        return value

    def joined(self, *fields: str) -> str | None:
        """Those of the texts that are there, as `a / b`."""
        return " / ".join(filter(None, map(self.optional, fields))) or None

    def texts(self, field: str) -> list[str]:
        """A list of texts, none of them blank."""
        value = self.data.get(field)
        if not isinstance(value, list):
            raise self.bad(field, "is missing" if value is None else f"is {type(value).__name__}, not a list of texts")
        named = self.part({f"{field}[{i}]": item for i, item in enumerate(value)})
        return [named.text(name) for name in named.data]

    def whole(self, field: str) -> int:
        """A whole number; 3.0, as a table with gaps holds it, is one."""
        value = self.data.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            raise self.bad(field, "is missing" if value is None else f"is {str(value)[:60]!r}, not a whole number")
        return int(value)

    def json(self, field: str) -> Any:
        """What a text that holds JSON says."""
        try:
            return strict_json.loads(self.text(field))
        except ValueError as error:
            raise self.bad(field, f"is not a text that holds JSON ({error})") from error

    def choice(self, field: str, values: Mapping[Any, T] | Sequence[T]) -> T:
        """What a field's value stands for; itself, of a sequence."""
        named: Mapping[Any, T] = values if isinstance(values, Mapping) else {value: value for value in values}
        value = self.data.get(field)
        if not isinstance(value, str | int) or value not in named:  # a truth value is an int
            raise self.bad(field, f"is {value!r}", f"give one of {', '.join(map(repr, named))}")
        return named[value]

    def images(self, field: str, least: int = 0) -> list[str | bytes]:
        """One image or a list of them: absolute paths and encoded bytes; none when the field is absent or null.

        Args:
            least: fewer than so many are an error.
        """
        value = self.data.get(field)
        items = value if isinstance(value, list) else [] if value in (None, "") else [value]
        if len(items) < least:
            raise self.bad(field, f"holds {len(items)} images, not {least} or more")
        return [self._image(item, f"{field}[{i}]" if isinstance(value, list) else field)
                for i, item in enumerate(items)]

    def image(self, field: str) -> list[str | bytes]:
        """As `images`, but there must be exactly one."""
        images = self.images(field)
        if len(images) != 1:
            raise self.bad(field, f"holds {len(images)} images, not 1")
        return images

    def _image(self, value: Any, field: str) -> str | bytes:
        if isinstance(value, dict):  # Hugging Face's Image feature
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if not isinstance(value, str) or not value:
            raise self.bad(field, "holds no image")
        path = unquote(value.removeprefix("file://")) if value.startswith("file://") else value
        if "://" in path or path.startswith("data:"):
            raise self.bad(field, f"{path[:80]} is a URL", "download the image and give its path")
        inside = [full for root in self.roots if (full := os.path.normpath(os.path.join(root, path)))
                  .startswith(os.path.join(root, ""))]
        if not inside:
            raise self.bad(field, f"{value} leads out of the image folder {self.roots[0]}",
                           "name the folder that the images lie in (--images)")
        for full in inside:
            if os.path.isfile(full):
                return full
        raise self.bad(field, f"the image file {inside[0]} does not exist",
                       "unpack the images there, or name the folder that they lie in (--images)")

    def prompt(self, field: str, images: list[str | bytes], text: str | None = None) -> dict[str, Any]:
        """The fields `prompt` or `messages`, and `images`, of a question with its images.

        An `<image>` in the text is the place of the next image, and there must be as many as images; without any the
        images come first.

        Args:
            text: the question; None: the field itself.
        """
        text = self.text(field) if text is None else text
        if PLACEHOLDER not in text:
            return {"prompt": text, "images": images}
        return {"messages": [{"role": "user", "content": self.content(field, text, len(images))}], "images": images}

    def content(self, field: str, text: str, num_images: int) -> list[dict[str, str]]:
        """A message's content, its `<image>` placeholders made image parts."""
        pieces = text.split(PLACEHOLDER)
        if len(pieces) - 1 != num_images:
            raise self.bad(field, f"holds {len(pieces) - 1} {PLACEHOLDER} placeholders for {num_images} images")
        content: list[dict[str, str]] = []
        for i, piece in enumerate(pieces):
            content += [{"type": "image"}] if i else []
            content += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
        return content

    def letter(self, field: str, index: int, choices: Sequence[str]) -> str:
        """The letter of a choice by its place, counted from 0; there must be a letter for each choice."""
        if len(choices) > len(LETTERS):
            raise self.bad(field, f"is one of {len(choices)} choices, more than there are letters")
        if not 0 <= index < len(choices):
            raise self.bad(field, f"names choice {index} of {len(choices)} (counted from 0)")
        return LETTERS[index]

    def graded(self, field: str, question: str, answer: str, task: str = "") -> dict[str, Any]:
        """`task`, `answer` and perhaps `options` of a question: mcq where the answer is the letter of a listed choice.

        Args:
            field: where the answer stands.
            task: of the others; "": math where the answer has a digit or LaTeX, else general, and a letter is refused.
        Raises:
            RowError: a letter of none of the choices: no value could be compared with it.
        """
        choices, letter = options(question), answer.strip("(). ")
        if len(letter) == 1 and letter.isascii() and letter.isalpha() and (choices or (not task and letter.isupper())):
            if choices and letter in LETTERS[:len(choices)]:
                return {"task": "mcq", "answer": letter, "options": choices}
            raise self.bad(field, f"answers {letter!r}, and the question lists "
                           + (f"{len(choices)} choices, A to {LETTERS[len(choices) - 1]}" if choices else "no choices"),
                           "list each choice on a line of its own, as (A) ..., or remove the record")
        return {"task": task or ("math" if re.search(r"[\d\\]", answer) else "general"), "answer": answer}


def options(text: str) -> list[str] | None:
    """The choices that a question lists under A, B, ... in order, each on a line of its own, as `A. x` or `(A) x`.

    None when there are fewer than two, the letters have gaps, or two choices are equal.
    """
    found = _OPTION.findall(text)
    texts = [choice.rstrip(" \t") for _, choice in found]  # here: as part of the pattern it would be quadratic
    if len(found) < 2 or "".join(letter for letter, _ in found) != LETTERS[:len(found)]:
        return None
    return texts if len(set(texts)) == len(texts) else None


def lettered(choices: Sequence[str]) -> str:
    """Choices as a question shows them: `A. x`, `B. y`, ..., each on a line of its own."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


ADAPTERS: dict[str, "Adapter"] = {}
"""Name -> adapter. Importing registry.py fills it."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A published set: how it lies on disk, where it comes from, and what its records become."""

    name: str
    """Opens the ids of its rows."""
    source: str
    """`source` of the rows: where the set is published."""
    licence: str
    """`licence` of the rows, as published."""
    tasks: tuple[str, ...]
    """Tasks that its rows may have."""
    fields: tuple[frozenset[str], ...]
    """Alternatives: each record has all fields of one of them."""
    without: frozenset[str]
    """Fields of other sets, whose records would do otherwise: none of them may be there."""
    files: tuple[str, ...]
    """Patterns of the training split's files in a folder; none: files are named one by one."""
    roots: tuple[str, ...]
    """Folders that image paths may start from, relative to the folder of their file."""
    unlabelled: str
    """What prompts without a safety label become, if the caller does not say; "": the set labels its prompts."""
    mapping: Callable[[Record], Iterable[dict[str, Any]]]
    """The rows of a record, without id; domain (the task), source and licence are filled in."""

    def __call__(self, source: Source, *, images: str | Path | None = None, reject: Reject = fail,
                 unlabelled: str = "") -> Iterator[dict[str, Any]]:
        """Rows of the set, each accepted by `schema.parse_row`.

        Args:
            source: see `Source`.
            images: folder that image paths start from; None: the layout's own.
            reject: takes the error of a record that gives no rows.
            unlabelled: "unsafe", "safe" or "reject"; "": the adapter's own.
        Returns:
            Rows; images are absolute paths of files that are there, or encoded bytes. The id is
            NAME:FILE:NUMBER, followed by :K where a record gives several rows; FILE as `named_files` gives it.
        Raises:
            LayoutError: the first record of a file lacks fields of the layout. A later one that does is a bad record.
            RowError: no files, a file that cannot be read, or what `reject` raises.
        """
        for path, stem in self.named_files(source).items():
            folder = path if path.is_dir() else path.parent
            starts = [images] if images is not None else [folder / root for root in self.roots]
            roots = tuple(os.path.abspath(start) for start in starts)
            fits = False
            for number, data in read_records(path, kinds=KINDS, option="--in"):
                where = f"{path}:{number}"
                try:
                    self._check(data, where)
                    fits = True
                    record = Record(data, where, roots, unlabelled or self.unlabelled)
                    if heard := [name for name in data if data[name] and UNREAD.search(name)]:
                        raise record.bad(heard[0], "is there: a row holds images only", "leave the record out")
                    made = list(self.mapping(record))
                    for k, row in enumerate(made):
                        unique = f"{self.name}:{stem}:{number}" + (f":{k}" if len(made) > 1 else "")
                        made[k] = {"id": unique, "domain": row["task"], "source": self.source, "licence": self.licence,
                                   **{name: value for name, value in row.items() if value is not None}}
                        parse_row(made[k], where)
                except RowError as error:
                    if isinstance(error, LayoutError) and not fits:
                        raise
                    reject(error)
                else:
                    yield from made

    def named_files(self, source: Source) -> dict[Path, str]:
        """The files of the set that are read, and their names in ids: no two are the same.

        A file's name is its path from the folder given (the name alone, where a file was given), without suffix; with
        it where another file would have the same, and from the folder of all where that does not do.

        Raises:
            RowError: a folder has none, or a file is given twice, be it through a link.
        """
        sources = [source] if isinstance(source, str | Path) else source
        found = [(base, path) for one in sources for base, paths in [self._files(Path(one))] for path in paths]
        common = Path(os.path.commonpath([os.path.abspath(base) for base, _ in found])) if found else Path()
        names: dict[Path, list[str]] = {}
        real = set[Path]()
        for base, path in found:
            if path.resolve() in real:
                raise RowError(str(path), "", "the file is given twice", "name it once (--in)")
            real.add(path.resolve())
            bare = Path if path.is_dir() else lambda name: name.with_suffix("")
            near, far = path.relative_to(base), Path(os.path.abspath(path)).relative_to(common)
            names[path] = [form.as_posix() for form in (bare(near), near, bare(far), far)]
        used = Counter(name for forms in names.values() for name in set(forms))
        return {path: next((name for name in forms if used[name] == 1), forms[-1]) for path, forms in names.items()}

    def _files(self, source: Path) -> tuple[Path, list[Path]]:
        """(what names start from, the files of a source)."""
        if not source.is_dir() or is_saved_dataset(source) or (source / "dataset_dict.json").exists():
            return source.parent, [source]  # read_records tells of a file that is not there
        if not self.files:
            raise RowError(str(source), "", f"files of layout {self.name} have no fixed names", "name the file")
        found = sorted({path for pattern in self.files for path in source.rglob(pattern)
                        if path.is_file() and not _HELD_OUT.search(path.stem)})
        if not found:
            raise RowError(str(source), "", f"there is no file {' or '.join(self.files)} in it",
                           f"name the folder or the file of {self.name} (--in)")
        return source, found

    def fit(self, data: Mapping[str, Any]) -> int:
        """How many fields of the layout a record has; 0 if it is in another one."""
        return 0 if self.without & data.keys() else max(
            (len(fields) for fields in self.fields if fields <= data.keys()), default=0)

    def _check(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise LayoutError(where, "", f"a record of {self.name} is an object of fields, not {type(data).__name__}",
                              "name the set's own file")
        if self.fit(data):
            return
        missing = min((sorted(fields - data.keys()) for fields in self.fields), key=len)
        fits = {name: other.fit(data) for name, other in sorted(ADAPTERS.items())}
        others = sorted(filter(fits.get, fits), key=lambda name: -fits[name])
        there = shown(", ".join(map(str, data)) or "none", 160)
        mend = f"this looks like {' or '.join(others)}" if others else "name a file of that set, or rename the fields"
        if not missing:
            raise LayoutError(where, sorted(self.without & data.keys())[0], f"is there, but layout {self.name} has no "
                              f"such field; the record's fields are {there}", mend)
        raise LayoutError(where, missing[0], f"is not there, but layout {self.name} has {', '.join(missing)}; the "
                          f"record's fields are {there}", mend)


def published(*, source: str, licence: str, tasks: str, fields: Sequence[str], files: Sequence[str] = (),
              without: str = "", roots: Sequence[str] = ("",), unlabelled: str = "",
              ) -> Callable[[Callable[[Record], Iterable[dict[str, Any]]]], Adapter]:
    """Decorator: the mapping becomes the adapter of its name; the arguments as in `Adapter`, names parted by blanks."""
    def add(mapping: Callable[[Record], Iterable[dict[str, Any]]]) -> Adapter:
        name = mapping.__name__
        ADAPTERS[name] = Adapter(
            name=name, source=source, licence=licence, tasks=tuple(tasks.split()), files=tuple(files),
            fields=tuple(frozenset(names.split()) for names in fields), without=frozenset(without.split()),
            roots=tuple(roots), unlabelled=unlabelled, mapping=mapping)
        return ADAPTERS[name]

    return add
