"""Records from files: all in order, or one again by where it lies.

`read_records` reads JSON lines, a JSON list, CSV, TSV, parquet and saved Hugging Face datasets, and never holds more
than a batch. Files of rows (JSON lines, parquet, saved datasets) are also opened as a `RowFile`, whose `scan` says
where each record lies and whose `read` takes one from there. Nothing is interpreted here: schema.py does that for rows,
adapters/ for published sets.
"""

import csv
import json
import os
import re
import tempfile
import weakref
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, AnyStr, cast

import pyarrow as pa
import pyarrow.parquet as pq

from . import strict_json
from .errors import UserError
from .schema import RowError

if TYPE_CHECKING:
    from datasets import Dataset

ROW_KINDS = (".jsonl", ".parquet")
KINDS = (*ROW_KINDS, ".json", ".csv", ".tsv")
GROUP_BYTES = 64 << 20
"""Largest row group of a parquet file, uncompressed, that is read whole to take one row from it."""
_SMALL_GROUP_BYTES, _SMALL_GROUP_ROWS = 4 << 20, 1024
"""Size of the row groups that a file with larger ones is rewritten to."""
_BATCH = 64
"""Most records read at a time from parquet and Arrow; an embedded image may take megabytes."""
_BUFFER = 1 << 20
"""Bytes read at a time from each column of a parquet file."""
_CHUNK = 1 << 20
"""Characters read at a time from a JSON list."""
_CELL = 1 << 24
"""Longest CSV cell, in characters; the csv module's own limit of 131,072 is below a long prompt."""
_LINE = 1 << 26
"""Longest line, or item of a JSON list, in bytes or characters."""
_RECORD = 1 << 28
"""Most bytes of a parquet record, uncompressed, on average over its row group; zeros compress many thousandfold."""
_SEPARATOR = re.compile(r"\s*([\[,\]])\s*")

Found = tuple[int, int, int, Any]
"""(number, offset, length, record); `RowFile.read` takes the two in the middle."""


def read_records(path: Path, *, kinds: tuple[str, ...] = ROW_KINDS, option: str = "--data.path",
                 ) -> Iterator[tuple[int, Any]]:
    """(number, raw record) for each record of one file, or of a folder of `datasets.Dataset.save_to_disk`.

    Args:
        path: the file or folder.
        kinds: suffixes that are read; some of KINDS.
        option: what the user named `path` with, for messages.
    Returns:
        The number is the line in a .jsonl file (blank lines are skipped, and count), else the record's, from 1. An
        embedded image is {"bytes", "path"}, undecoded.
    Raises:
        RowError: no such file, another kind, not readable, corrupt or cut off, a name given twice, nested too deep, too
            long; names file, and line or record.
    """
    _check_kind(path, kinds, option)
    with _named_errors(lambda: str(path)):
        if path.is_dir() or path.suffix in ROW_KINDS:
            for number, _, _, record in open_rows(path, kinds=kinds, option=option).scan():
                if isinstance(record, RowError):
                    raise record
                yield number, record
        else:
            yield from {".json": _json_list, ".csv": _cells, ".tsv": _cells}[path.suffix](path)


class RowFile(ABC):
    """A file or folder of records, read in order once, and then one by one.

    Every process opens it for itself. `read` moves no shared position, so threads and forks may do it.
    """

    def __init__(self, path: Path, files: Iterable[str | Path]) -> None:
        """
        Args:
            path: as the user gave it. files: what it consists of; a change of one of them is noticed.
        """
        self.path = path
        self.folder = os.path.abspath(path if path.is_dir() else path.parent)
        """What relative image paths are relative to."""
        self.stamps = _stamps(os.path.abspath(file) for file in files)
        """What its files were when it was opened."""

    def scan(self) -> Iterator[Found]:
        """Every record, with its number (the line of a .jsonl file, else the record's from 1) and where it lies.

        A line that is no record comes as the RowError that says so, and the next line follows.

        Raises:
            RowError: it is corrupt from the named record on, or within the records that are read together with it.
        """
        number = 0
        with _named_errors(lambda: f"{self.path}:{number + 1}"):
            for found in self._scan():
                number = found[0]
                yield found

    @abstractmethod
    def _scan(self) -> Iterator[Found]:
        """`scan`, with the errors of whoever reads."""

    def read(self, offset: int, length: int) -> Any:
        """The record that `scan` found there.

        Raises:
            RowError: the file was changed (size or time of change), removed, or cannot be read any more.
        """
        try:
            same = _stamps(self.stamps) == self.stamps
        except OSError:
            same = False
        if not same:
            raise RowError(str(self.path), "", "it was changed or removed after its rows were checked",
                           "leave row files alone during a run: restore it, or start again with the new rows")
        with _named_errors(lambda: str(self.path)):
            return self._read(offset, length)

    @abstractmethod
    def _read(self, offset: int, length: int) -> Any:
        """`read`, of files that are as they were."""


class JsonLines(RowFile):
    """One JSON object a line; offset and length are the line's, in bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, [path])
        self._handle = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)

    def _scan(self) -> Iterator[Found]:
        offset = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(_lines(file), start=1):
                try:
                    record = _parse_line(line, offset)
                except strict_json.Refused as error:
                    record = RowError(f"{self.path}:{number}", error.field, error.problem, error.mend)
                except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                    record = RowError(f"{self.path}:{number}", "", f"it is not one JSON object in UTF-8 ({error})",
                                      "write one object a line")
                if record is not _BLANK:
                    yield number, offset, len(line), record
                offset += len(line)

    def _read(self, offset: int, length: int) -> Any:
        return _parse_line(os.pread(self._handle, length, offset), offset)


class Parquet(RowFile):
    """A parquet file; an offset is the record's number from 0, a length 0.

    To take one record its row group is read, and kept until another one is wanted. A file with row groups over
    GROUP_BYTES (pandas writes a million rows into one) is first rewritten to small ones, into a temporary file without
    a name in TMPDIR, which should not be memory.

    A page whose checksum was written (few writers do) must have it; of others only what breaks their form is noticed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, [path])
        # as it is by default, all row groups' bytes would be read ahead and held
        self._file = pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)
        _check_schema(path, self._file.schema_arrow)
        groups = _groups(self._file)
        most = max((size // max(rows, 1) for rows, size in groups), default=0)
        if most > _RECORD:
            raise RowError(str(path), "", f"the records of a row group take {most} bytes each, more than {_RECORD}",
                           "store large things as files, and their paths here")
        if max((size for _, size in groups), default=0) > GROUP_BYTES:
            self._file = _regrouped(path, self._file, groups)
            groups = _groups(self._file)
        self._starts = [0, *accumulate(rows for rows, _ in groups)]
        self._held: tuple[int, pa.Table] | None = None
        self._batch = max(1, min(_BATCH, GROUP_BYTES // max(most, 1)))

    def _scan(self) -> Iterator[Found]:
        number = 0
        for batch in self._file.iter_batches(self._batch):
            for record in _checked(batch):
                number += 1
                yield number, number - 1, 0, record

    def _read(self, offset: int, length: int) -> Any:
        group, held = bisect_right(self._starts, offset) - 1, self._held
        if held is None or held[0] != group:
            self._held = held = group, self._file.read_row_group(group)
        return held[1].slice(offset - self._starts[group], 1).to_pylist()[0]


class SavedDataset(RowFile):
    """A folder of `datasets.Dataset.save_to_disk`, memory-mapped; an offset is the record's number from 0."""

    def __init__(self, path: Path) -> None:
        dataset = _load_saved(path)
        super().__init__(path, {path / "state.json", *(file["filename"] for file in dataset.cache_files)}
                         if dataset else [])
        # as stored: `datasets` itself would decode the images, with no limit
        self._dataset = dataset.with_format("arrow") if dataset else None
        if dataset:
            _check_schema(path, dataset.data.schema)

    def _scan(self) -> Iterator[Found]:
        if self._dataset is not None:
            tables = cast("Iterator[pa.Table]", self._dataset.iter(_BATCH))
            for number, record in enumerate((record for table in tables for record in _checked(table)), start=1):
                yield number, number - 1, 0, record

    def _read(self, offset: int, length: int) -> Any:
        assert self._dataset is not None
        return cast("pa.Table", self._dataset[offset:offset + 1]).to_pylist()[0]


def open_rows(path: Path, *, kinds: tuple[str, ...] = ROW_KINDS, option: str = "--data.path") -> RowFile:
    """The RowFile of a .jsonl or .parquet file, or of a folder of `datasets.Dataset.save_to_disk`.

    Raises:
        RowError: as `read_records`.
    """
    _check_kind(path, kinds, option)
    with _named_errors(lambda: str(path)):
        return SavedDataset(path) if path.is_dir() else {".jsonl": JsonLines, ".parquet": Parquet}[path.suffix](path)


def _check_kind(path: Path, kinds: tuple[str, ...], option: str) -> None:
    if not path.exists():
        raise RowError(str(path), "", "there is no such file or folder", f"correct {option}")
    if not path.is_dir() and path.suffix not in kinds:
        raise RowError(str(path), "", f"files of kind {path.suffix!r} are not read",
                       f"give {', '.join(kinds)} or a folder of Dataset.save_to_disk")


@contextmanager
def _named_errors(where: Callable[[], str]) -> Iterator[None]:
    """`where` is asked when it comes to it."""
    try:
        yield
    except PermissionError as error:
        raise RowError(where(), "", f"it cannot be read ({error.strerror})",
                       "give this user the right to read it") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last of a column name
        raise RowError(where(), "", f"it is corrupt or cut off ({error})", "write or download it again") from error


def _checked(table: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """Its records. Lengths and UTF-8 are checked before they are followed: out of the memory, if they are corrupt."""
    table.validate(full=True)
    try:
        return table.to_pylist()
    except (ValueError, OverflowError, KeyError) as error:  # as a date beyond the year 9999, a time zone that is none
        raise pa.ArrowInvalid(f"a value that Python does not have: {error}") from error


def _check_schema(path: Path, schema: pa.Schema) -> None:
    """Raise RowError when two columns, or two parts of one, have a name, or lie too deep."""
    level: list[tuple[str, Iterable[pa.Field]]] = [("", schema)]
    for _ in range(strict_json.MAX_DEPTH):
        below = []
        for within, fields in level:
            fields = list(fields)
            names = [field.name for field in fields]
            if len(set(names)) < len(names):
                twin = Counter(names).most_common(1)[0][0]
                raise RowError(str(path), within + twin, "is the name of two columns", "rename or drop one of them")
            below += [(f"{within}{field.name}.", [field.type.field(i) for i in range(field.type.num_fields)])
                      for field in fields if field.type.num_fields]
        level = below
    if level:
        raise RowError(str(path), level[0][0][:80], f"its type is more than {strict_json.MAX_DEPTH} deep", "flatten it")


def _lines(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """The lines of a file; raises RowError for one of more than _LINE bytes, which would be held whole."""
    number = 0
    while line := file.readline(_LINE + 1):
        number += 1
        if len(line) > _LINE:
            raise RowError(f"{file.name}:{number}", "", f"the line has more than {_LINE} bytes",
                           "write one record a line, and an image as a file or in parquet")
        yield line


def _stamps(files: Iterable[str]) -> dict[str, list[int]]:
    """[bytes, time of change in ns] of each file."""
    return {file: [stat.st_size, stat.st_mtime_ns] for file in files for stat in (os.stat(file),)}


_BLANK = object()


def _parse_line(line: bytes, offset: int) -> Any:
    """The object of a JSON line that begins `offset` bytes into its file; _BLANK for an empty one."""
    text = line.decode("utf-8" if offset else "utf-8-sig")
    return strict_json.loads(text) if text.strip() else _BLANK


def _groups(file: pq.ParquetFile) -> list[tuple[int, int]]:
    """(rows, uncompressed bytes) of each row group."""
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    return [(group.num_rows, group.total_byte_size) for group in groups]


def _regrouped(path: Path, file: pq.ParquetFile, groups: Sequence[tuple[int, int]]) -> pq.ParquetFile:
    """The same records in row groups of about _SMALL_GROUP_BYTES, and at most _SMALL_GROUP_ROWS rows."""
    rows, size = map(sum, zip(*groups, strict=True))
    rows = max(1, min(_SMALL_GROUP_ROWS, rows * _SMALL_GROUP_BYTES // size))
    try:
        copy = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the ParquetFile)
        with pq.ParquetWriter(copy, file.schema_arrow) as writer:
            for batch in file.iter_batches(rows):
                writer.write_batch(batch)
    except OSError as error:
        if error.errno is None:  # pyarrow's, of a corrupt page
            raise
        raise RowError(str(path), "", f"there is no room for a copy of it with smaller row groups ({error})",
                       "set TMPDIR to a folder with room, or write it with row_group_size=1000") from error
    return pq.ParquetFile(copy, buffer_size=_BUFFER, pre_buffer=False)


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    """The objects of a file that is one JSON list; json.load of a 175 MB one takes over a gigabyte."""
    decode = json.JSONDecoder(object_pairs_hook=strict_json.without_twins).raw_decode
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
                        raise UserError(f"expected {due!r} and an object, found {text[at:start + 1]!r}")
                    if text[start] == "]":
                        if number:
                            raise UserError("there is a comma before the closing ]")
                        break
                    try:
                        item, at = decode(text, start)
                    except json.JSONDecodeError:  # perhaps only its beginning was read yet
                        pass
                    else:
                        strict_json.shallow(item)
                        number, due, size = number + 1, ",", _CHUNK
                        yield number, item
                        continue
                elif not separator and text[at:].strip():
                    raise UserError(f"expected {due!r}, found {text[at:at + 20]!r}")
                more = file.read(size)
                if len(text) - at > _LINE:
                    raise UserError(f"it has more than {_LINE} characters")
                if not more:
                    raise UserError("it ends within the list" if text.strip() else "it is empty")
                text, at, size = text[at:] + more, 0, size * 2
    except strict_json.Refused as error:
        raise RowError(f"{path}:{number + 1}", error.field, error.problem, error.mend) from error
    except RecursionError as error:
        raise RowError(f"{path}:{number + 1}", "", *strict_json.TOO_DEEP) from error
    except ValueError as error:
        raise RowError(f"{path}:{number + 1}", "", f"it is not a list of JSON objects in UTF-8 ({error})",
                       "download it again, or convert it to JSON lines") from error


def _cells(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(_CELL)
    number = 0
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(_lines(file), delimiter="\t" if path.suffix == ".tsv" else ",")
            strict_json.without_twins([(name, None) for name in reader.fieldnames or ()])
            for record in reader:
                number += 1
                if None in record:
                    raise UserError("it has more cells than the first line has names")
                yield number, record
    except RowError:
        raise
    except strict_json.Refused as error:
        raise RowError(f"{path}:1", error.field, error.problem, error.mend) from error
    except (ValueError, csv.Error) as error:
        raise RowError(f"{path}:{max(number, 1)}", "", f"it is not a table in UTF-8 ({error})",
                       "download it again") from error


def _load_saved(path: Path) -> "Dataset | None":
    """The data set of a folder; None for one of 0 rows, which has no Arrow file."""
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise RowError(str(path), "", f"it holds several splits ({splits})", f"name one, as in {path}/SPLIT")
    if not is_saved_dataset(path):
        raise RowError(str(path), "", "the folder is not a Hugging Face dataset (state.json and dataset_info.json)",
                       "write it with Dataset.save_to_disk, or name row files")
    if not _arrow_files(path):
        return None  # `datasets` raises an IndexError then
    from datasets import Dataset, load_from_disk  # here: a run without one would start two seconds later

    try:
        dataset = load_from_disk(path)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise RowError(str(path), "", f"datasets cannot load it ({error})", "save it again") from error
    assert isinstance(dataset, Dataset)
    return dataset


def _arrow_files(path: Path) -> list[str]:
    """The names of a saved data set's Arrow files, all in its folder."""
    state = path / "state.json"
    try:
        found = strict_json.loads(state.read_text(encoding="utf-8"))
        names = [file["filename"] for file in found["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RowError(str(state), "", f"it is not what Dataset.save_to_disk writes ({error})",
                       "save it again") from error
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or not (path / name).is_file():
            raise RowError(str(state), "_data_files", f"it names {name!r}, which is no file of its folder",
                           "save it again")
    return names


def is_saved_dataset(path: Path) -> bool:
    """Whether the folder was written by `datasets.Dataset.save_to_disk`."""
    return (path / "state.json").exists() and (path / "dataset_info.json").exists()
