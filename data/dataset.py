"""Rows from files: JSON lines, parquet, or a Hugging Face dataset folder.

Everything is checked before training starts, images included (header and full decode), so that a bad row costs seconds
and not a rollout. Files are read a batch at a time (streaming.py). Of an image only its path is kept, or its encoded
bytes where a row file embeds it: in memory up to streaming.IN_MEMORY_BYTES, then on disk. `schema.open_image` decodes
at use.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from PIL import Image

from .schema import ImageSource, Row, RowError, open_image, parse_row
from .streaming import ImageStore, StoredImage, read_records

MAX_WORKERS = 8
"""Most threads that decode images; each may hold a decoded image of the largest size."""
_AT_ONCE = 1024
"""Images handed to the threads at a time: a million waiting tasks would take a gigabyte."""


def load_rows(paths: Sequence[str | Path], *, max_image_pixels: int) -> list[Row]:
    """All rows of the given files and folders, in order, fully checked.

    Args:
        paths: .jsonl or .parquet files, or folders written by `datasets.Dataset.save_to_disk`. In a parquet file or a
            folder, "line" n of a message is the n-th record, from 1.
        max_image_pixels: most pixels of an image.
    Returns:
        Rows; an embedded image is bytes or a `StoredImage`, equal ones are one object. A path in `images` is
        absolute. A relative one is taken from the row file's folder (the dataset folder itself), and no path, as
        written, may lead out of it; a symbolic link inside it is followed.
    Raises:
        RowError: the first bad row, else the first bad image in file order; a file that is missing, unreadable or
            empty; an id given twice; no room for embedded images.
    """
    store = ImageStore()
    rows: list[Row] = []
    first: dict[str, str] = {}
    places: list[str] = []
    for path in map(Path, paths):
        folder = os.path.abspath(path if path.is_dir() else path.parent)
        before = len(rows)
        for number, record in read_records(path):
            where = f"{path}:{number}"
            row = parse_row(record, where)
            if row.id in first:
                raise RowError(where, "id", f"{row.id!r} is the id of {first[row.id]} too", "make the ids unique")
            first[row.id] = where
            images = tuple(_kept(image, store, folder, where, f"images[{i}]") for i, image in enumerate(row.images))
            rows.append(replace(row, images=images))
            places.append(where)
        if len(rows) == before:
            raise RowError(str(path), "", "there are no rows in it", "add rows, or do not name it")
    if not rows:
        raise RowError("data", "", "no row file was named", "give at least one with --data.path")
    _check_images(rows, places, max_image_pixels)
    return rows


def fingerprint(rows: Iterable[Row]) -> str:
    """16 hex digits over the rows in order and the content of their images, whatever folder they lie in.

    Raises:
        RowError: an image file is gone.
    """
    digest = hashlib.blake2b(digest_size=8)
    seen: dict[str, str] = {}
    for row in rows:
        plain = asdict(replace(row, images=()))
        plain["images"] = [_image_digest(image, seen, row.id) for image in row.images]
        digest.update(json.dumps(plain, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _kept(image: ImageSource, store: ImageStore, folder: str, where: str, field: str) -> ImageSource:
    if isinstance(image, bytes):
        try:
            return store.keep(image)
        except OSError as error:
            raise RowError(where, field, f"there is no room for the embedded image ({error})", "set TMPDIR to a folder "
                           "with room, or write the images as files and give their paths") from error
    if not isinstance(image, str):
        return image
    path = os.path.normpath(os.path.join(folder, image))
    if not path.startswith(os.path.join(folder, "")):
        raise RowError(where, field, f"{image} leads out of the data folder {folder}",
                       "move the image into it and give its path relative to the row file")
    return path


def _check_images(rows: Sequence[Row], places: Sequence[str], max_pixels: int) -> None:
    """Decode every image once, one that several rows share only for the first."""
    first: dict[str | int, tuple[ImageSource, str, str]] = {}
    for row, where in zip(rows, places, strict=True):
        for i, image in enumerate(row.images):
            first.setdefault(image if isinstance(image, str) else id(image), (image, where, f"images[{i}]"))
    images = list(first.values())

    def check(item: tuple[ImageSource, str, str]) -> None:
        source, where, field = item
        open_image(source.read() if isinstance(source, StoredImage) else source, max_pixels, where, field)

    # Pillow decodes without the GIL; map raises the first error in row order
    with ThreadPoolExecutor(min(MAX_WORKERS, len(os.sched_getaffinity(0)))) as pool:
        for start in range(0, len(images), _AT_ONCE):
            for _ in pool.map(check, images[start:start + _AT_ONCE]):
                pass


def _image_digest(image: ImageSource, seen: dict[str, str], row_id: str) -> str:
    if isinstance(image, Image.Image):
        image_bytes = repr(image.size).encode() + image.convert("RGBA").tobytes()
        return hashlib.blake2b(image_bytes, digest_size=16).hexdigest()
    if isinstance(image, bytes | StoredImage):
        content = image if isinstance(image, bytes) else image.read()
        return hashlib.blake2b(content, digest_size=16).hexdigest()
    if image not in seen:
        try:
            with open(image, "rb") as file:
                seen[image] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError as error:
            raise RowError(f"row {row_id}", "images", f"{image} cannot be read ({error.strerror})",
                           "restore it") from error
    return seen[image]
