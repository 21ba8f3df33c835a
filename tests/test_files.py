"""Records of each kind of file: all in order, and one again."""

import csv
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from cosmo_rl.data import files
from cosmo_rl.data.files import KINDS, Parquet, RowFile, open_rows, read_records
from cosmo_rl.data.schema import RowError


def read(path) -> list:
    return list(read_records(path, kinds=KINDS))


def fails(path, *parts: str) -> str:
    with pytest.raises(RowError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


ITEMS = [{"a": i, "text": "x" * (i * 7) + '"]}, {["', "deep": [{"b": [1, {"c": "\u00e9\U0001f600"}]}]}
         for i in range(60)]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"separators": (",", ":")}], ids=["line", "indented", "dense"])
def test_a_json_list_is_read_alike_in_chunks_of_any_size(tmp_path, monkeypatch, chunk, layout):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    for start in ("", "\ufeff", " \n"):
        (tmp_path / "a.json").write_text(start + json.dumps(ITEMS, **layout) + "\n\n", encoding="utf-8")
        assert read(tmp_path / "a.json") == list(enumerate(ITEMS, start=1))
    (tmp_path / "a.json").write_text(" [ ] ")
    assert read(tmp_path / "a.json") == []


def test_a_json_list_is_not_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 100)
    (tmp_path / "a.json").write_text(json.dumps(ITEMS[:3]) + " this is never looked at")
    records = read_records(tmp_path / "a.json", kinds=KINDS)
    assert next(records) == (1, ITEMS[0])
    (tmp_path / "b.json").write_text(json.dumps(ITEMS)[:-500])
    records = read_records(tmp_path / "b.json", kinds=KINDS)
    for _ in range(50):
        next(records)  # the cut is told only where it is


@pytest.mark.parametrize(("text", "parts"), [
    ("", [":1: it is not a list", "it is empty"]),
    (" \n", [":1: ", "it is empty"]),
    ('{"a": 1}', [":1: ", "expected '['"]),
    ('[{"a": 1}, 3]', [":2: ", "an object, found ', 3'"]),
    ('[{"a": 1} {"a": 2}]', [":2: ", "expected ','"]),
    ('[{"a": 1}, ]', [":2: ", "a comma before the closing ]"]),
    ('[, {"a": 1}]', [":1: "]),
    (', {"a": 1}]', [":1: ", "expected '['"]),
    ('[{"a": 1}[{"a": 2}]', [":2: ", "expected ','"]),
    ('[{"a": 1}, {"a": ', [":2: ", "it ends within the list"]),
    ('[{"a": 1}', [":2: ", "it ends within the list"]),
    ('[{"a": 1}, {"a": 1, "a": 2}]', [":2: field `a`: is given twice; keep one"]),
    ('[{"a": 1}, {"a": nothing}]', [":2: ", "; download it again"]),
    ('[{"a": ' + "[" * 100_000, [":1: lists and objects lie more than 64 deep within each other; flatten it"]),
    ('[{"a": 1}, {"b": ' + "[" * 64 + "]" * 64 + "}]", [":2: field `b`: lists and objects lie more than 64 deep"]),
])
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_a_bad_json_list_is_told_by_item(tmp_path, monkeypatch, text, parts, chunk):
    monkeypatch.setattr(files, "_CHUNK", chunk if len(text) < 1000 else 1 << 20)
    (tmp_path / "a.json").write_text(text)
    assert fails(tmp_path / "a.json", *parts).startswith(f"{tmp_path / 'a.json'}:")


def test_bytes_that_are_no_utf8_are_told(tmp_path):
    for name in ("a.json", "a.csv", "a.tsv"):
        (tmp_path / name).write_bytes(b'[{"a": "\xff"}]')
        fails(tmp_path / name, f"{name}:1: it is not", "UTF-8", "0xff")


def test_tables_keep_quoted_line_ends_and_long_cells(tmp_path):
    records = [{"a": 'one, "two"\nthree\tfour', "b": ""}, {"a": "x" * 500_000, "b": "\u00e9"}]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["a", "b"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(records)
        assert read(tmp_path / name) == list(enumerate(records, start=1))
    (tmp_path / "a.csv").write_text("a,b\n1,2\n1,2,3\n")
    fails(tmp_path / "a.csv", "a.csv:2: it is not a table in UTF-8 (it has more cells than the first line has names)")
    (tmp_path / "a.csv").write_text("a,b,a\n1,2,3\n")
    fails(tmp_path / "a.csv", "a.csv:1: field `a`: is given twice; keep one of them")
    (tmp_path / "a.csv").write_text("a,b\n1\n")
    assert read(tmp_path / "a.csv") == [(1, {"a": "1", "b": None})]


def test_only_the_kinds_asked_for_are_read(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(RowError, match=r"a.json: files of kind '.json' are not read; give .jsonl, .parquet or a fold"):
        list(read_records(tmp_path / "a.json"))
    with pytest.raises(RowError, match=r"b.json: there is no such file or folder; correct --in"):
        list(read_records(tmp_path / "b.json", kinds=KINDS, option="--in"))


def three_kinds(tmp_path, records) -> list:
    """The records as JSON lines, parquet and a saved dataset."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=30)
    Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    return [tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "saved"]


def scanned(path) -> tuple[RowFile, list]:
    file = open_rows(path)
    return file, list(file.scan())


RECORDS = [{"a": i, "text": "\u00e9" * (i % 7) + "x", "deep": [{"b": i}] * (i % 3)} for i in range(100)]


def test_records_are_read_again_in_any_order(tmp_path):
    for path in three_kinds(tmp_path, RECORDS):
        file, found = scanned(path)
        assert [number for number, *_ in found] == list(range(1, 101))
        assert [record for *_, record in found] == RECORDS
        for _, offset, length, record in random.Random(0).sample(found, 100):
            assert file.read(offset, length) == record
        other = open_rows(path)  # it has scanned nothing
        assert other.read(*found[70][1:3]) == RECORDS[70]


def test_offsets_of_json_lines_count_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"a": "\u00e9"}\n\n  \r\n{"a":\u2003}\n{"a": 2}\r\n{"a": 3}'.encode())
    file, found = scanned(tmp_path / "a.jsonl")
    assert [(number, record) for number, _, _, record in found if number != 4] == [
        (1, {"a": "\u00e9"}), (5, {"a": 2}), (6, {"a": 3})]
    assert isinstance(found[1][3], RowError) and str(found[1][3]).startswith(f"{tmp_path / 'a.jsonl'}:4: it is not one")
    assert [file.read(offset, length) for number, offset, length, _ in found if number != 4] == [
        {"a": "\u00e9"}, {"a": 2}, {"a": 3}]
    with pytest.raises(RowError, match=r"a\.jsonl:4: it is not one JSON object"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("change", ["touched", "longer", "replaced", "removed"])
def test_a_file_that_changed_after_the_scan_is_told(tmp_path, kind, change):
    path = three_kinds(tmp_path, RECORDS)[kind]
    file, found = scanned(path)
    data = next(path.glob("*.arrow")) if path.is_dir() else path
    stat = data.stat()
    if change == "touched":
        os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "longer":
        with data.open("ab") as handle:
            handle.write(b" ")
        os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        data.rename(tmp_path / "moved")
        if change == "replaced":
            data.write_bytes((tmp_path / "moved").read_bytes())
            os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns - 1_000_000_000))
    message = f"^{path}: it was changed or removed after its rows were checked; leave row files alone"
    with pytest.raises(RowError, match=message):
        file.read(*found[5][1:3])


def test_large_row_groups_are_rewritten_to_small_ones(tmp_path, monkeypatch):
    table = pa.Table.from_pylist(RECORDS).append_column("kind", pa.array(["x", "y"] * 50).dictionary_encode())
    pq.write_table(table, tmp_path / "a.parquet")
    plain, found = scanned(tmp_path / "a.parquet")
    assert isinstance(plain, Parquet) and len(plain._starts) == 2
    monkeypatch.setattr(files, "GROUP_BYTES", 100)
    for most_bytes, most_rows, groups in ((1 << 20, 40, 3), (100, 40, None), (1, 40, 100)):
        monkeypatch.setattr(files, "_SMALL_GROUP_BYTES", most_bytes)
        monkeypatch.setattr(files, "_SMALL_GROUP_ROWS", most_rows)
        file, again = scanned(tmp_path / "a.parquet")
        assert isinstance(file, Parquet) and again == found
        assert len(file._starts) - 1 == groups or (groups is None and 3 < len(file._starts) - 1 < 100)
        assert [file.read(i, 0) for i in (99, 0, 40, 39)] == [found[i][3] for i in (99, 0, 40, 39)]

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", full)
    fails(tmp_path / "a.parquet", "a.parquet: there is no room for a copy of it with smaller row groups", "; set TMP")


def test_one_row_group_is_read_for_a_run_of_its_rows(tmp_path, monkeypatch):
    path = three_kinds(tmp_path, RECORDS)[1]
    file, _ = scanned(path)
    assert isinstance(file, Parquet)
    reads, real = [], file._file.read_row_group
    monkeypatch.setattr(file._file, "read_row_group", lambda group: reads.append(group) or real(group))
    assert [file.read(i, 0)["a"] for i in range(100)] == list(range(100))
    assert reads == [0, 1, 2, 3]


def test_threads_and_forks_may_read(tmp_path):
    for path in three_kinds(tmp_path, RECORDS):
        file, found = scanned(path)
        with ThreadPoolExecutor(4) as pool:
            again = list(pool.map(lambda i, file=file, found=found: file.read(*found[i % 100][1:3])["a"], range(1000)))
        assert again == [i % 100 for i in range(1000)]


def test_a_line_that_does_not_end_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LINE", 100)
    monkeypatch.setattr(files, "_CHUNK", 50)
    for name, text, problem in (
        ("a.jsonl", '{"a": 1}\n{"a": "' + "x" * 500, "jsonl:2: the line has more than 100 bytes; write one record"),
        ("a.csv", "a,b\n1," + "2" * 500, "a.csv:2: the line has more than 100 bytes"),
        ("a.json", '[{"a": 1}, {"a": "' + "x" * 500, "a.json:2: it is not a list of JSON objects in UTF-8 (it has"),
    ):
        (tmp_path / name).write_text(text)
        fails(tmp_path / name, problem)


def columns(**more: pa.Array) -> pa.Table:
    return pa.table({"id": ["1", "2"], **more})


def nested(depth: int) -> pa.Array:
    array = pa.array([1, 2])
    for _ in range(depth):
        array = pa.StructArray.from_arrays([array], names=["x"])
    return array


TWINS = pa.StructArray.from_arrays([pa.array(["a", "b"])] * 2, names=["name", "name"])
BAD_SCHEMAS = {
    "twins": (pa.Table.from_arrays([pa.array(["1"])] * 2, names=["id", "id"]), "field `id`: is the name of two col"),
    "within": (columns(attack=TWINS), "field `attack.name`: is the name of two columns"),
    "in_list": (columns(a=pa.ListArray.from_arrays([0, 1, 2], TWINS)), ".name`: is the name of two columns"),
    "deep": (columns(a=nested(64)), "its type is more than 64 deep; flatten it"),
    "deeper": (columns(a=nested(700)), "Parquet schema too deeply nested"),
    "zone": (columns(a=pa.array([1, 2], pa.timestamp("s", tz="No/Where"))), ":1: it is corrupt or cut off (a value"),
}


@pytest.mark.parametrize("case", BAD_SCHEMAS)
def test_columns_that_no_record_can_have(tmp_path, case):
    table, problem = BAD_SCHEMAS[case]
    pq.write_table(table, tmp_path / "a.parquet")
    fails(tmp_path / "a.parquet", "a.parquet", problem)


def test_records_that_unpack_to_more_than_memory_are_refused_by_their_sizes(tmp_path, monkeypatch):
    """Half a gigabyte of zeros is 18 kB in zstd, and took 8.9 GB on its way to a row."""
    for i, (size, batch) in enumerate(((1, 64), (40_000, 24), (400_000, 2), (900_000, 1))):
        path = tmp_path / f"{i}.parquet"
        pq.write_table(columns(answer=["\0" * size] * 2), path, compression="zstd", use_dictionary=False)
        monkeypatch.setattr(files, "GROUP_BYTES", 1_000_000)
        file = open_rows(path)
        assert isinstance(file, Parquet) and file._batch == batch and len(list(file.scan())) == 2
    monkeypatch.setattr(files, "_RECORD", 600_000)
    fails(path, "the records of a row group take 9000", "bytes each, more than 600000; store large things as files")


CODECS = [("snappy", True), ("none", False), ("zstd", False), ("gzip", True)]


def mutants(content: bytes, seed: int, count: int) -> Iterator[bytes]:
    """The content with bytes set, bits turned, parts cut out and put in."""
    rng = random.Random(seed)
    for _ in range(count):
        mutant = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 5, 20))):
            at, kind = rng.randrange(len(mutant)), rng.randrange(5)
            if kind < 2:
                mutant[at] = rng.randrange(256)
            elif kind == 2:
                mutant[at] ^= 1 << rng.randrange(8)
            elif kind == 3:
                del mutant[at:at + rng.randrange(1, 50)]
            else:
                mutant[at:at + 8] = rng.choice((b"\xff" * 8, bytes(8), b"\x7f" * 8))
        yield bytes(mutant)


def outcomes(path: Path, files: Iterable[tuple[Path, bytes]]) -> Counter[str]:
    """What comes of reading `path` with one file at a time of another content: records, or a RowError in one line."""
    counts: Counter[str] = Counter()
    for file, content in files:
        file.write_bytes(content)
        try:
            list(read_records(path, kinds=KINDS))
            counts["read"] += 1
        except RowError as error:
            assert re.match(rf"{re.escape(str(path))}(/[\w.-]+)?(:\d+)?: ", str(error)), error
            assert str(error).isprintable() and len(str(error)) < 1000, error
            counts["refused"] += 1
    return counts


@pytest.mark.parametrize(("codec", "dictionary"), CODECS)
def test_a_parquet_file_with_harm_anywhere_is_read_or_refused(tmp_path, codec, dictionary):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(RECORDS), path, compression=codec, use_dictionary=dictionary, row_group_size=30)
    counts = outcomes(path, ((path, content) for content in mutants(path.read_bytes(), 1, 60)))
    assert counts["refused"] > 20, counts


def test_harm_in_a_page_is_told_with_the_record(tmp_path):
    """In the second row group; the records before it are read."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=64, compression="gzip")
    content, start = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    content[start + 40:start + 44] = b"\xff" * 4
    path.write_bytes(content)
    found: list = []
    with pytest.raises(RowError, match=r"a\.parquet:65: it is corrupt or cut off \(.*\); write or download it again"):
        for record in open_rows(path).scan():
            found.append(record)
    assert [number for number, *_ in found] == list(range(1, 65))


def test_a_page_with_another_checksum_than_written_is_refused(tmp_path):
    """The form is right, and the value is another one: nothing else would show it."""
    path = tmp_path / "a.parquet"
    pq.write_table(columns(text=["swordfish", "other"]), path, compression="none", use_dictionary=False,
                   write_page_checksum=True, write_statistics=False)
    assert len(read(path)) == 2
    at = path.read_bytes().index(b"swordfish")
    path.write_bytes(path.read_bytes()[:at] + b"w" + path.read_bytes()[at + 1:])
    fails(path, "a.parquet:1: it is corrupt or cut off (", "CRC checksum")


def test_a_saved_data_set_with_harm_anywhere_is_read_or_refused(tmp_path):
    """Unchecked lengths led out of the memory-mapped file: the process died."""
    path = three_kinds(tmp_path, RECORDS)[2]
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        counts = outcomes(path, ((file, content) for content in [*mutants(whole, 2, 40), whole]))
        assert counts["read"] >= 1 and counts["refused"] > 10, (file, counts)


@pytest.mark.parametrize(("state", "problem"), [
    ("null", "state.json: it is not what Dataset.save_to_disk writes"), ("{}", "('_data_files')"),
    ("[" * 100_000, "lie more than 64 deep"), ('{"_data_files": 1}', "it is not what"),
    ('{"_data_files": [{"filename": 3}]}', "field `_data_files`: it names 3, which is no file of its folder; save"),
    ('{"_data_files": [{"filename": "../a.parquet"}]}', "it names '../a.parquet', which is no file"),
    ('{"_data_files": [{"filename": "gone.arrow"}]}', "it names 'gone.arrow'"),
])
def test_a_saved_data_set_s_list_of_files_is_checked(tmp_path, state, problem):
    path = three_kinds(tmp_path, RECORDS)[2]
    (path / "state.json").write_text(state)
    fails(path, problem)
