"""Rows from files: JSON lines, parquet, or a Hugging Face dataset folder.

Everything is checked in one pass before training starts, images included (header and full decode), so that a bad row
costs seconds and not a rollout. Rows stay in their files, embedded images with them (store.py); `schema.open_image`
decodes at use.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from .schema import ImageSource, Row, RowError, open_image, parse_row
from .store import StoredRows, with_paths
from .streaming import RowFile, open_rows

MAX_WORKERS = 8
"""Most threads that decode images; each may hold a decoded image of the largest size."""
_AT_ONCE, _BYTES_AT_ONCE = 1024, 64 << 20
"""Images, and bytes of embedded ones, that wait until they are decoded together."""
T = TypeVar("T")


def load_rows(paths: Sequence[str | Path], *, max_image_pixels: int,
              rejected: list[RowError] | None = None) -> StoredRows:
    """All rows of the given files and folders, in order, fully checked.

    Args:
        paths: .jsonl or .parquet files, or folders written by `datasets.Dataset.save_to_disk`. In a parquet file or a
            folder, "line" n of a message is the n-th record, from 1.
        max_image_pixels: most pixels of an image.
        rejected: takes the error of every bad row and file, which are then left out; without it the first is raised.
    Returns:
        Rows; an embedded image is bytes. A path in `images` is absolute. A relative one is taken from the row file's
        folder (the dataset folder itself), and no path, as written, may lead out of it; a symbolic link inside it is
        followed.
    Raises:
        RowError: the first bad row or image in file order; a file that is missing, unreadable or empty; then an id
            given twice.
    Memory: 56 bytes a row, 40 of them for good, and about 100 a distinct image. Ids are compared by 128-bit hashes:
        among a billion ids two different ones are taken for equal with probability 1.5e-21.
    """
    loading = _Loading(max_image_pixels, rejected)
    for path in map(Path, paths):
        loading.add(path)
    if not paths:
        loading.reject(RowError("data", "", "no row file was named", "give at least one with --data.path"))
    return loading.rows()


def fingerprint(rows: Iterable[Row]) -> str:
    """16 hex digits over the rows in order and the content of their images, whatever folder they lie in.

    Raises:
        RowError: an image file is gone.
    """
    digest = hashlib.blake2b(digest_size=8)
    seen: dict[bytes, bytes] = {}
    for row in rows:
        plain = asdict(replace(row, images=()))
        plain["images"] = [_image_digest(image, seen, row.id).hex() for image in row.images]
        digest.update(json.dumps(plain, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


class DistinctImages(Generic[T]):
    """What `look` finds in each distinct image: called once for each, on threads, for a bounded number at a time.

    Images are told apart by path or, embedded ones, by content (128-bit hashes), and PIL images by identity: the caller
    holds these.
    """

    def __init__(self, look: Callable[[ImageSource, str, str], T]) -> None:
        """
        Args:
            look: (image, where, field) -> anything; `where` and `field` are those that the image was first added with.
        """
        self.found: dict[bytes | int, T] = {}
        self._look = look
        self._waiting: dict[bytes | int, tuple[ImageSource, str, str]] = {}
        self._bytes = 0

    def add(self, image: ImageSource, where: str, field: str) -> bytes | int:
        """The image's key in `found`, where its entry may not stand before `finish`."""
        key = id(image) if isinstance(image, Image.Image) else _digest(image)
        if key not in self.found and key not in self._waiting:
            self._waiting[key] = image, where, field
            self._bytes += len(image) if isinstance(image, bytes) else 0
            if len(self._waiting) >= _AT_ONCE or self._bytes >= _BYTES_AT_ONCE:
                self.finish()
        return key

    def finish(self) -> None:
        """Look at all that wait; raises what `look` raised first, in the order of adding."""
        # Pillow decodes without the GIL
        with ThreadPoolExecutor(min(MAX_WORKERS, len(os.sched_getaffinity(0)))) as pool:
            found = pool.map(lambda item: self._look(*item), self._waiting.values())
            self.found.update(zip(self._waiting, found, strict=True))
        self._waiting.clear()
        self._bytes = 0


class _Loading:
    """The one pass over the files: places, ids and domains of the good rows, errors of the bad ones."""

    def __init__(self, max_image_pixels: int, rejected: list[RowError] | None) -> None:
        self.rejected = rejected
        self.files: list[RowFile] = []
        self.places = array("q")  # five numbers a row, see StoredRows
        self.names: dict[str, int] = {}
        self.ids = bytearray()  # 16 bytes a row
        self.bad: set[int] = set()  # rows found bad after they were counted
        # (row, where, field, key) of the images that are not known to be good
        self.open: list[tuple[int, str, str, bytes | int]] = []

        def problem(image: ImageSource, where: str, field: str) -> RowError | None:
            try:
                open_image(image, max_image_pixels, where, field)
            except RowError as error:
                return error
            return None

        self.images = DistinctImages(problem)

    def add(self, path: Path) -> None:
        records = 0
        try:
            file = open_rows(path)
            self.files.append(file)
            for number, first, second, record in file.scan():
                records += 1
                try:
                    self._add_row(file, first, second, number, record)
                except RowError as error:
                    self.reject(error)
            if not records:
                raise RowError(str(path), "", "there are no rows in it", "add rows, or do not name it")
        except RowError as error:
            self.reject(error)

    def _add_row(self, file: RowFile, first: int, second: int, number: int, record: object) -> None:
        if isinstance(record, RowError):
            raise record
        where = f"{file.path}:{number}"
        row = with_paths(parse_row(record, where), file.folder, where)
        index = len(self.places) // 5
        code = self.names.setdefault(row.domain, len(self.names))
        self.places.extend((len(self.files) - 1, first, second, number, code))
        self.ids += _digest(row.id)
        for i, image in enumerate(row.images):
            key = self.images.add(image, where, f"images[{i}]")
            if self.images.found.get(key, key) is not None:
                self.open.append((index, where, f"images[{i}]", key))
        if len(self.open) >= _AT_ONCE:
            self._settle()

    def reject(self, error: RowError) -> None:
        if self.rejected is None:
            self._settle()  # the images of the rows before it come first
            raise error
        self.rejected.append(error)

    def _settle(self) -> None:
        self.images.finish()
        waiting, self.open = self.open, []
        for index, images in groupby(waiting, key=lambda image: image[0]):
            errors = [RowError(where, field, *error.args[2:]) for _, where, field, key in images
                      if (error := self.images.found[key])]
            if not errors or index in self.bad:
                continue
            self.bad.add(index)
            error = RowError.several(errors)
            if self.rejected is None:
                raise error
            self.rejected.append(error)

    def rows(self) -> StoredRows:
        self._settle()
        places = np.frombuffer(self.places, dtype=np.int64).reshape(-1, 5)
        rows = StoredRows(self.files, places, list(self.names))
        for index, first in _twins(self.ids):
            if index not in self.bad:
                self.bad.add(index)
                self.reject(RowError(rows.where(index), "id", f"{rows[index].id!r} is the id of {rows.where(first)} "
                                     "too", "make the ids unique"))
        if self.bad:
            good = np.ones(len(rows), dtype=bool)
            good[list(self.bad)] = False
            rows = rows.select(np.flatnonzero(good))
        return rows


def _twins(ids: bytearray) -> list[tuple[int, int]]:
    """(row, first row with the same 16-byte id) of every row but the first, in order."""
    words = np.frombuffer(ids, dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal ids stay in file order
    again = np.zeros(len(order), dtype=bool)
    again[1:] = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    heads = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
    return sorted(zip(order[again].tolist(), order[heads[again]].tolist(), strict=True))


def _digest(content: str | bytes) -> bytes:
    content = content if isinstance(content, bytes) else str(content).encode(errors="surrogatepass")
    return hashlib.blake2b(content, digest_size=16).digest()


def _image_digest(image: ImageSource, seen: dict[bytes, bytes], row_id: str) -> bytes:
    if isinstance(image, Image.Image):
        return _digest(repr(image.size).encode() + image.convert("RGBA").tobytes())
    if isinstance(image, bytes):
        return _digest(image)
    key = _digest(image)
    if key not in seen:
        try:
            with open(image, "rb") as file:
                seen[key] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        except OSError as error:
            raise RowError(f"row {row_id}", "images", f"{image} cannot be read ({error.strerror})",
                           "restore it") from error
    return seen[key]
