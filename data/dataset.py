"""Rows from files: JSON lines, parquet, or a Hugging Face dataset folder.

Everything is checked before training starts, images included (header and full decode), so that a bad row costs seconds
and not a rollout. Only paths or encoded bytes are kept; `schema.open_image` decodes again at use.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk
from PIL import Image

from .schema import ImageSource, Row, RowError, open_image, parse_row

_BATCH = 256
"""Records read at a time from parquet and Arrow."""


def load_rows(paths: Sequence[str | Path], *, max_image_pixels: int) -> list[Row]:
    """All rows of the given files and folders, in order, fully checked.

    Args:
        paths: .jsonl or .parquet files, or folders written by `datasets.Dataset.save_to_disk`. In a parquet file or a
            folder, "line" n of a message is the n-th record, from 1.
        max_image_pixels: most pixels of an image.
    Returns:
        Rows; a path in `images` is absolute. A relative one is taken from the row file's folder (the dataset folder
        itself), and no path, as written, may lead out of it; a symbolic link inside it is followed.
    Raises:
        RowError: the first bad row, else the first bad image in file order; a file that is missing, unreadable or
            empty; an id given twice.
    """
    rows: list[Row] = []
    first: dict[str, str] = {}
    places: list[str] = []
    for path in map(Path, paths):
        folder = os.path.abspath(path if path.is_dir() else path.parent)
        before = len(rows)
        for number, record in _records(path):
            where = f"{path}:{number}"
            row = parse_row(record, where)
            if row.id in first:
                raise RowError(where, "id", f"{row.id!r} is the id of {first[row.id]} too", "make the ids unique")
            first[row.id] = where
            images = tuple(_inside(image, folder, where, f"images[{i}]") for i, image in enumerate(row.images))
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


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, raw record) for each row of one file or folder."""
    if not path.exists():
        raise RowError(str(path), "", "there is no such file or folder", "correct --data.path")
    try:
        if path.is_dir():
            yield from _folder_records(path)
        elif path.suffix == ".jsonl":
            yield from _json_records(path)
        elif path.suffix == ".parquet":
            batches = pq.ParquetFile(path).iter_batches(_BATCH)
            yield from enumerate((record for batch in batches for record in batch.to_pylist()), start=1)
        else:
            raise RowError(str(path), "", f"files of kind {path.suffix!r} are not read",
                           "give .jsonl, .parquet or a folder of Dataset.save_to_disk")
    except PermissionError as error:
        raise RowError(str(path), "", f"it cannot be read ({error.strerror})",
                       "give this user the right to read it") from error
    except (pa.ArrowException, OSError) as error:
        raise RowError(str(path), "", f"it is corrupt or cut off ({error})", "write or download it again") from error


def _json_records(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield number, json.loads(text, object_pairs_hook=_object_without_twins)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                raise RowError(f"{path}:{number}", "", f"it is not one JSON object in UTF-8 ({error})",
                               "write one object a line") from error


def _object_without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    obj = dict(pairs)
    if len(obj) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return obj


def _folder_records(path: Path) -> Iterator[tuple[int, Any]]:
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise RowError(str(path), "", f"it holds several splits ({splits})", f"name one, as in {path}/SPLIT")
    if not (path / "state.json").exists() or not (path / "dataset_info.json").exists():
        raise RowError(str(path), "", "the folder is not a Hugging Face dataset (state.json and dataset_info.json)",
                       "write it with Dataset.save_to_disk, or name row files")
    try:
        dataset = load_from_disk(path)
    except IndexError:  # what `datasets` does with a saved data set of 0 rows, which has no Arrow file
        return
    except (ValueError, KeyError, TypeError) as error:
        raise RowError(str(path), "", f"datasets cannot load it ({error})", "save it again") from error
    assert isinstance(dataset, Dataset)
    # as stored: `datasets` itself would decode the images, with no limit
    tables = cast("Iterator[pa.Table]", dataset.with_format("arrow").iter(_BATCH))
    yield from enumerate((record for table in tables for record in table.to_pylist()), start=1)


def _inside(image: ImageSource, folder: str, where: str, field: str) -> ImageSource:
    if not isinstance(image, str):
        return image
    path = os.path.normpath(os.path.join(folder, image))
    if not path.startswith(os.path.join(folder, "")):
        raise RowError(where, field, f"{image} leads out of the data folder {folder}",
                       "move the image into it and give its path relative to the row file")
    return path


def _check_images(rows: Sequence[Row], places: Sequence[str], max_pixels: int) -> None:
    """Decode every image once, a file that several rows share only for the first."""
    images: dict[Any, tuple[ImageSource, str, str]] = {}
    for row, where in zip(rows, places, strict=True):
        for i, image in enumerate(row.images):
            images.setdefault(image if isinstance(image, str) else (where, i), (image, where, f"images[{i}]"))

    def check(item: tuple[ImageSource, str, str]) -> None:
        open_image(item[0], max_pixels, *item[1:])

    with ThreadPoolExecutor() as pool:  # Pillow decodes without the GIL; map raises the first error in row order
        for _ in pool.map(check, images.values()):
            pass


def _image_digest(image: ImageSource, seen: dict[str, str], row_id: str) -> str:
    if isinstance(image, Image.Image):
        image_bytes = repr(image.size).encode() + image.convert("RGBA").tobytes()
        return hashlib.blake2b(image_bytes, digest_size=16).hexdigest()
    if isinstance(image, bytes):
        return hashlib.blake2b(image, digest_size=16).hexdigest()
    if image not in seen:
        try:
            with open(image, "rb") as file:
                seen[image] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError as error:
            raise RowError(f"row {row_id}", "images", f"{image} cannot be read ({error.strerror})",
                           "restore it") from error
    return seen[image]
