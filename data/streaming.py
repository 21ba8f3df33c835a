"""Records from files, one at a time, and embedded images that do not stay in memory.

`read_records` reads JSON lines, a JSON list, CSV, TSV, parquet and saved Hugging Face datasets, and never holds more
than a batch. Nothing is interpreted here: schema.py does that for rows, adapters/ for published sets.
"""

import csv
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk

from .schema import ImageSource, RowError

ROW_KINDS = (".jsonl", ".parquet")
KINDS = (*ROW_KINDS, ".json", ".csv", ".tsv")
IN_MEMORY_BYTES = 256 << 20
"""Embedded images of one `ImageStore` beyond this go to a file."""
_BATCH = 64
"""Records read at a time from parquet and Arrow; an embedded image may take megabytes."""
_BUFFER = 1 << 20
"""Bytes read at a time from each column of a parquet file."""
_CHUNK = 1 << 20
"""Characters read at a time from a JSON list."""
_CELL = 1 << 24
"""Longest CSV cell, in characters; the csv module's own limit of 131,072 is below a long prompt."""
_SEPARATOR = re.compile(r"\s*([\[,\]])\s*")


def read_records(path: Path, *, kinds: tuple[str, ...] = ROW_KINDS, option: str = "--data.path",
                 ) -> Iterator[tuple[int, Any]]:
    """(number, raw record) for each record of one file, or of a folder of `datasets.Dataset.save_to_disk`.

    Args:
        path: the file or folder.
        kinds: suffixes that are read; some of KINDS.
        option: what the user named `path` with, for messages.
    Returns:
        The number is the line in a .jsonl file (blank lines are skipped, and count), else the record's place from 1.
        An embedded image is {"bytes", "path"}, undecoded.
    Raises:
        RowError: no such file, another kind, not readable, corrupt or cut off; names file, and line or record.
    """
    if not path.exists():
        raise RowError(str(path), "", "there is no such file or folder", f"correct {option}")
    try:
        if path.is_dir():
            yield from _folder_records(path)
        elif path.suffix not in kinds:
            raise RowError(str(path), "", f"files of kind {path.suffix!r} are not read",
                           f"give {', '.join(kinds)} or a folder of Dataset.save_to_disk")
        elif path.suffix == ".parquet":
            # as it is by default, all row groups' bytes would be read ahead and held
            batches = pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False).iter_batches(_BATCH)
            yield from enumerate((record for batch in batches for record in batch.to_pylist()), start=1)
        else:
            yield from {".jsonl": _json_lines, ".json": _json_list, ".csv": _cells, ".tsv": _cells}[path.suffix](path)
    except PermissionError as error:
        raise RowError(str(path), "", f"it cannot be read ({error.strerror})",
                       "give this user the right to read it") from error
    except (pa.ArrowException, OSError) as error:
        raise RowError(str(path), "", f"it is corrupt or cut off ({error})", "write or download it again") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield number, json.loads(text, object_pairs_hook=_object_without_twins)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                raise RowError(f"{path}:{number}", "", f"it is not one JSON object in UTF-8 ({error})",
                               "write one object a line") from error


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    """The objects of a file that is one JSON list; json.load of a 175 MB one takes over a gigabyte."""
    decode = json.JSONDecoder(object_pairs_hook=_object_without_twins).raw_decode
    number, text, at, size, due = 0, "", 0, _CHUNK, "["
    try:
        with open(path, encoding="utf-8-sig") as file:
            while True:
                separator = _SEPARATOR.match(text, at)
                start = separator.end() if separator else at
                if separator and separator[1] == "]" and due == ",":
                    break
                if separator and start < len(text):
                    if separator[1] != due or text[start] not in "{]":
                        raise ValueError(f"expected {due!r} and an object, found {text[at:start + 1]!r}")
                    if text[start] == "]":
                        if number:
                            raise ValueError("there is a comma before the closing ]")
                        break
                    try:
                        item, at = decode(text, start)
                    except json.JSONDecodeError:  # perhaps only its beginning was read yet
                        pass
                    else:
                        number, due, size = number + 1, ",", _CHUNK
                        yield number, item
                        continue
                elif not separator and text[at:].strip():
                    raise ValueError(f"expected {due!r}, found {text[at:at + 20]!r}")
                more = file.read(size)
                if not more:
                    raise ValueError("it ends within the list" if text.strip() else "it is empty")
                text, at, size = text[at:] + more, 0, size * 2
    except (ValueError, RecursionError) as error:
        raise RowError(f"{path}:{number + 1}", "", f"it is not a list of JSON objects in UTF-8 ({error})",
                       "download it again, or convert it to JSON lines") from error


def _cells(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(_CELL)
    number = 0
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for record in csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","):
                number += 1
                if None in record:
                    raise ValueError("it has more cells than the first line has names")
                yield number, record
    except (ValueError, csv.Error) as error:
        raise RowError(f"{path}:{max(number, 1)}", "", f"it is not a table in UTF-8 ({error})",
                       "download it again") from error


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
    if not is_saved_dataset(path):
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


def is_saved_dataset(path: Path) -> bool:
    """Whether the folder was written by `datasets.Dataset.save_to_disk`."""
    return (path / "state.json").exists() and (path / "dataset_info.json").exists()


class StoredImage:
    """An encoded image in an `ImageStore`'s file.

    Pillow, and so `schema.open_image`, takes an object that can only `read`; each call reads all, so threads may share
    it. It is pickled as its bytes.
    """

    __slots__ = ("_file", "_length", "_offset")

    def __init__(self, file: Any, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length

    def read(self) -> bytes:
        """The encoded image."""
        content = os.pread(self._file.fileno(), self._length, self._offset)
        if len(content) != self._length:
            raise OSError(f"an embedded image of {self._length} bytes could not be read back")
        return content

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (self.read(),)


class ImageStore:
    """Keeps embedded images, equal ones once: the first IN_MEMORY_BYTES as bytes, the others in a temporary file.

    The file has no name and goes with the last of its images. It lies in TMPDIR, which should not be memory.
    """

    def __init__(self) -> None:
        self._kept: dict[bytes, ImageSource] = {}
        self._bytes = 0
        self._file: Any = None

    def keep(self, content: bytes) -> ImageSource:
        """`content`, or a StoredImage of it.

        Raises:
            OSError: TMPDIR has no room.
        """
        key = hashlib.blake2b(content, digest_size=16).digest()
        if key not in self._kept:
            self._bytes += len(content)
            self._kept[key] = content if self._bytes <= IN_MEMORY_BYTES else self._store(content)
        return self._kept[key]

    def _store(self, content: bytes) -> ImageSource:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with its last image)
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(content)
        self._file.flush()
        # schema.ImageSource does not name it, and need not: it is opened as any file is
        return cast("ImageSource", StoredImage(self._file, offset, len(content)))
