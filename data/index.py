"""The rows of a run: found in their files by one pass, and read again one at a time as they are drawn.

The pass (`load_rows`) reads each record once, checks it, and opens each distinct image once, so that a bad row costs
seconds and not a rollout. Of a row it keeps 53 bytes: where it lies, and what has to be known of it without reading it.
An `Index` is these records, and a list of rows to whoever takes one: it is read back from its file, embedded images
with it. So the order of prompts, full shuffles, the exact shares of a mixture and resumes are the same at any size. A
stream with a shuffle buffer (what `datasets` has for data too large for memory, IterableDataset) gives none of these:
it shuffles within the buffer only, cannot know a domain's rows in advance, and replays what it has given to resume.
Data that is on the hub only must therefore be brought here first (Dataset.save_to_disk, or the files).

One process of a host makes the pass. The others load what it wrote down (`Index.dump`), which is no pickle.
"""

import hashlib
import io
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from .errors import Problems, RowError, UserError
from .files import RowFile, open_rows
from .schema import TASKS, ImageSource, Row, opened, parse_row

MAX_WORKERS = 8
"""Most threads that decode images; each may hold a decoded image of the largest size."""
_AT_ONCE, _BYTES_AT_ONCE = 1024, 64 << 20
"""Rows, and bytes of embedded images, that wait until their images are opened together."""
_RECORD = struct.Struct("<IqIqIB3I8sI")
RECORD = np.dtype([("file", "<u4"), ("offset", "<i8"), ("length", "<u4"), ("number", "<i8"), ("domain", "<u4"),
                   ("task", "u1"), ("tokens", "<u4", 3), ("digest", "V8"), ("order", "<u4")])
"""What is kept of a row: index of its file there; the two numbers of `RowFile.read`; number for messages; domain as
index in the domains' names, task as one in TASKS; tokens of prompt, images and response, where they were counted; hash
of its fields and of its images' content; its number among the rows that `check` was called with."""
_FIELDS = [field.name for field in fields(Row) if field.name != "images"]


@dataclass(frozen=True, slots=True)
class Picture:
    """What one look at an image has shown."""

    digest: bytes
    """16 bytes, of its content: of the file's bytes, or of a PIL image's pixels."""
    size: tuple[int, int]
    """Width and height in pixels."""
    seen: Any
    """What the `see` of the pass has made of its pixels."""


Check = Callable[[Row, Sequence[Picture]], tuple[int, int, int] | None]
"""Called with each good row in order and its pictures; gives the tokens of prompt, images and response."""
See = Callable[[Image.Image], Any]
"""Called with each distinct image, on several threads."""


class Index(Sequence[Row]):
    """Rows that one pass has checked. A row is a new object each time that it is taken.

    Raises:
        RowError: on taking a row whose file was changed or removed since it was checked.
    """

    def __init__(self, files: Sequence[RowFile | Sequence[Row]], records: np.ndarray, names: list[str]) -> None:
        """
        Args:
            files: that the rows lie in; a list has them itself.
            records: (rows,) of dtype RECORD.
            names: the domains.
        """
        self._files, self.records, self._names = files, records, names

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "Index": ...
    def __getitem__(self, index: int | slice) -> "Row | Index":
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        owner, offset, length, number, *_ = self.records[index].item()
        file = self._files[owner]
        return _row(file, file.read(offset, length), number) if isinstance(file, RowFile) else file[offset]

    @property
    def domains(self) -> list[str]:
        """The domain of each row, without reading it."""
        return [self._names[code] for code in self.records["domain"].tolist()]

    @property
    def tasks(self) -> list[str]:
        """The task of each row, without reading it."""
        return [TASKS[code] for code in self.records["task"].tolist()]

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the rows in order and the content of their images, whatever folder they lie in."""
        return hashlib.blake2b(self.records["digest"].tobytes(), digest_size=8).hexdigest()

    def where(self, index: int) -> str:
        """FILE:LINE of a row, as messages name it."""
        owner, offset, _, number, *_ = self.records[index].item()
        file = self._files[owner]
        return f"{file.path}:{number}" if isinstance(file, RowFile) else f"row {file[offset].id}"

    def select(self, indices: Sequence[int] | np.ndarray) -> "Index":
        """The rows at `indices`, in that order; nothing is read."""
        return Index(self._files, self.records[np.asarray(indices, dtype=np.int64)], self._names)

    def dump(self, more: Mapping[str, Any]) -> bytes:
        """The index, and plain JSON beside it, for another process of this host; see `load`."""
        files = [[str(file.path), file.stamps] for file in self._files if isinstance(file, RowFile)]
        assert len(files) == len(self._files), "rows that lie in no file are not for others"
        about = json.dumps({"files": files, "names": self._names, "more": more}).encode()
        out = io.BytesIO()
        np.savez(out, records=self.records, about=np.frombuffer(about, dtype=np.uint8))
        return out.getvalue()

    @classmethod
    def load(cls, path: Path) -> tuple["Index", dict[str, Any]]:
        """The index and the JSON that `dump` has written to `path`.

        Raises:
            UserError: it or a file of rows cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as saved:
                records, about = saved["records"], json.loads(saved["about"].tobytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}); let all ranks of a host see the run "
                            "directory, then repeat the command") from error
        files = []
        for name, stamps in about["files"]:
            files.append(open_rows(Path(name)))
            files[-1].stamps = stamps  # a file that was changed in between is told on taking a row
        return cls(files, records, about["names"]), about["more"]


def load_rows(paths: Sequence[str | Path], *, max_image_pixels: int, rejected: list[RowError] | None = None,
              check: Check | None = None, see: See | None = None) -> Index:
    """All rows of the given files and folders, in order, fully checked.

    Args:
        paths: .jsonl or .parquet files, or folders written by `datasets.Dataset.save_to_disk`. In a parquet file or a
            folder, "line" n of a message is the n-th record, from 1.
        max_image_pixels: most pixels of an image.
        rejected: takes the error of every bad row and file, which are then left out; without it the first is raised.
        check, see: called in the pass, see `Check` and `See`.
    Returns:
        Rows; an embedded image is bytes. A path in `images` is absolute. A relative one is taken from the row file's
        folder (the dataset folder itself), and no path, as written, may lead out of it; a symbolic link inside it is
        followed.
    Raises:
        RowError: the first bad row or image in file order; a file that is missing, unreadable or empty; then an id
            given twice.
    Memory: 69 bytes a row, 53 of them for good, and about 350 a distinct image while it runs. Ids are compared by
        128-bit hashes: among a billion ids two different ones are taken for equal with probability 1.5e-21.
    """
    files: list[RowFile] = []

    def found() -> Iterator[_Found | RowError]:
        for path in map(Path, paths):
            yield from _scan(path, files)
        if not paths:
            yield RowError("data", "", "no row file was named", "give at least one with --data.path")

    made = _Pass(max_image_pixels, rejected, check, see)
    return made.without_twins(made.run(found(), files))


def index_rows(rows: Sequence[Row], *, max_image_pixels: int, check: Check | None = None,
               see: See | None = None) -> Index:
    """`load_rows` of rows that are there already, whose ids are not looked at; messages name a row by its id."""
    found = (_Found(f"row {row.id}", (0, i, 0, i + 1), row) for i, row in enumerate(rows))
    return _Pass(max_image_pixels, None, check, see).run(found, [rows])


def select(rows: Sequence[Row], indices: Sequence[int]) -> Sequence[Row]:
    """The rows at `indices`, in that order; of an index without reading them."""
    return rows.select(indices) if isinstance(rows, Index) else [rows[i] for i in indices]


@dataclass(frozen=True, slots=True)
class _Found:
    """A row that is good but for its images, which were not looked at."""

    where: str
    position: tuple[int, int, int, int]
    """file, offset, length and number of RECORD."""
    row: Row


def _scan(path: Path, files: list[RowFile]) -> Iterator[_Found | RowError]:
    """The rows and errors of a file, which is added to `files`."""
    number = 0
    try:
        files.append(file := open_rows(path))
        for number, offset, length, record in file.scan():
            try:
                row = _row(file, record, number)
            except RowError as error:
                yield error
            else:
                yield _Found(f"{path}:{number}", (len(files) - 1, offset, length, number), row)
        if not number:
            raise RowError(str(path), "", "there are no rows in it", "add rows, or do not name it")
    except RowError as error:
        yield error


def _row(file: RowFile, record: object, number: int) -> Row:
    """The checked row of a record of the file, its images' paths absolute; raises RowError."""
    if isinstance(record, RowError):
        raise record
    where = f"{file.path}:{number}"
    row = parse_row(record, where)
    if not row.images:
        return row

    def absolute(image: ImageSource, field: str) -> ImageSource:
        if not isinstance(image, str):
            return image
        path = os.path.normpath(os.path.join(file.folder, image))
        if not path.startswith(os.path.join(file.folder, "")):
            raise RowError(where, field, f"{image} leads out of the data folder {file.folder}",
                           "move the image into it and give its path relative to the row file")
        return path

    problems = Problems()
    images = tuple(problems.take(absolute, image, f"images[{i}]") for i, image in enumerate(row.images))
    problems.settle()
    return replace(row, images=images)


class _Pass:
    """The one pass. What is found waits until enough images are together, and is then judged in order."""

    def __init__(self, max_image_pixels: int, rejected: list[RowError] | None, check: Check | None,
                 see: See | None) -> None:
        self.max_image_pixels, self.rejected, self.check, self.see = max_image_pixels, rejected, check, see
        self.records, self.ids, self.names = bytearray(), bytearray(), dict[str, int]()  # 53 and 16 bytes a row
        self.pictures: dict[bytes | int, Picture | RowError] = {}

    def run(self, found: Iterable[_Found | RowError], files: Sequence[RowFile | Sequence[Row]]) -> Index:
        waiting: list[_Found | RowError] = []
        num_bytes = 0
        for one in found:
            waiting.append(one)
            if isinstance(one, _Found):
                num_bytes += sum(len(image) for image in one.row.images if isinstance(image, bytes))
            if len(waiting) >= _AT_ONCE or num_bytes >= _BYTES_AT_ONCE:
                self._settle(waiting)
                waiting, num_bytes = [], 0
        self._settle(waiting)
        return Index(files, np.frombuffer(self.records, dtype=RECORD).copy(), list(self.names))

    def without_twins(self, rows: Index) -> Index:
        """The rows less those whose id another one before them has."""
        twins = _twins(self.ids)
        for index, first in twins:
            self._reject(RowError(rows.where(index), "id", f"{rows[index].id!r} is the id of {rows.where(first)} too",
                                  "make the ids unique"))
        return rows.select(np.delete(np.arange(len(rows)), [index for index, _ in twins])) if twins else rows

    def _settle(self, waiting: list[_Found | RowError]) -> None:
        keys = self._open([one for one in waiting if isinstance(one, _Found)])
        for one in waiting:
            if isinstance(one, RowError):
                self._reject(one)
                continue
            pictures = [self.pictures[key] for key in next(keys)]
            errors = [RowError(one.where, f"images[{i}]", picture.problem, picture.mend)
                      for i, picture in enumerate(pictures) if isinstance(picture, RowError)]
            if errors:
                self._reject(RowError.several(errors))
            else:
                self._keep(one, [picture for picture in pictures if isinstance(picture, Picture)])

    def _open(self, found: Sequence[_Found]) -> Iterator[list[bytes | int]]:
        """The keys of each one's images in `pictures`; an image is told apart by path, content or identity."""
        keys = [[id(image) if isinstance(image, Image.Image) else _digest(image) for image in one.row.images]
                for one in found]
        new = {key: image for one, mine in zip(found, keys, strict=True)
               for key, image in zip(mine, one.row.images, strict=True) if key not in self.pictures}
        if new:  # Pillow decodes without the GIL
            with ThreadPoolExecutor(min(MAX_WORKERS, len(os.sched_getaffinity(0)))) as pool:
                self.pictures.update(zip(new, pool.map(self._look, new.items()), strict=True))
        return iter(keys)

    def _look(self, item: tuple[bytes | int, ImageSource]) -> Picture | RowError:
        key, source = item
        try:
            image, content = opened(source, self.max_image_pixels, "", "")
        except RowError as error:
            return error
        digest = key if isinstance(source, bytes) and isinstance(key, bytes) else _digest(content)
        return Picture(digest, image.size, self.see and self.see(image))

    def _keep(self, found: _Found, pictures: Sequence[Picture]) -> None:
        row, order = found.row, len(self.ids) // 16
        tokens = (self.check and self.check(row, pictures)) or (0, 0, 0)
        plain = {name: getattr(row, name) for name in _FIELDS} | {"images": [one.digest.hex() for one in pictures]}
        digest = hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=8).digest()
        self.records += _RECORD.pack(*found.position, self.names.setdefault(row.domain, len(self.names)),
                                     TASKS.index(row.task), *tokens, digest, order)
        self.ids += _digest(row.id)

    def _reject(self, error: RowError) -> None:
        if self.rejected is None:
            raise error
        self.rejected.append(error)


def _twins(ids: bytearray) -> list[tuple[int, int]]:
    """(row, first row with the same 16-byte id) of every row but the first, in order."""
    words = np.frombuffer(ids, dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal ids stay in file order
    again = np.zeros(len(order), dtype=bool)
    again[1:] = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    heads = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
    return sorted(zip(order[again].tolist(), order[heads[again]].tolist(), strict=True))


def _digest(content: str | os.PathLike | bytes) -> bytes:
    content = content if isinstance(content, bytes) else str(content).encode(errors="surrogatepass")
    return hashlib.blake2b(content, digest_size=16).digest()
