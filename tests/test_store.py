"""Rows that stay in their files: the same rows in any order, few bytes for each, and no silent change."""

import gc
import json
import random
import tracemalloc

import pytest
from datasets import Dataset
from PIL import Image

from cosmo_rl.data.dataset import load_rows
from cosmo_rl.data.schema import RowError, parse_row
from cosmo_rl.data.store import StoredRows, domains, select


def record(i: int, **fields) -> dict:
    return {"id": f"r{i}", "task": "general", "domain": f"d{i % 3}", "prompt": f"what is {i}?", "answer": str(i),
            "source": "mine", "licence": "CC0", **fields}


@pytest.fixture
def files(tmp_path):
    """JSON lines, parquet and a saved dataset of 20 rows each, some with an image beside the file."""
    records = [record(i, images=["x.png"] if i % 4 == 0 else []) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, records[:20])))
    Dataset.from_list(records[20:40]).to_parquet(tmp_path / "b.parquet")
    Dataset.from_list(records[40:]).save_to_disk(tmp_path / "c")
    for folder in (tmp_path, tmp_path / "c"):
        Image.new("RGB", (4, 4)).save(folder / "x.png")
    return [tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "c"]


def load(files) -> StoredRows:
    return load_rows(files, max_image_pixels=100)


def expected(files) -> list:
    rows = []
    for i in range(60):
        folder = files[2] if i >= 40 else files[0].parent
        rows.append(parse_row(record(i, images=[str(folder / "x.png")] if i % 4 == 0 else []), "f"))
    return rows


def test_it_is_a_list_of_rows_to_its_readers(files, tmp_path, monkeypatch):
    rows, wanted = load(files), expected(files)
    monkeypatch.chdir(tmp_path)
    assert len(rows) == 60 and list(rows) == wanted
    order = random.Random(0).choices(range(60), k=200)
    assert [rows[i] for i in order] == [wanted[i] for i in order]
    assert rows[45] == wanted[45] and rows[-1] == wanted[-1]
    assert list(rows[5:50:7]) == wanted[5:50:7] and list(rows[:4][::-1]) == wanted[:4][::-1]
    assert rows.domains == [row.domain for row in wanted] == domains(wanted) == domains(rows)
    assert [rows.where(i) for i in (0, 19, 20, 59)] == [
        f"{files[0]}:1", f"{files[0]}:39", f"{files[1]}:1", f"{files[2]}:20"]
    for bad in (60, -61):
        with pytest.raises(IndexError):
            rows[bad]


def test_a_selection_reads_nothing(files, monkeypatch):
    rows, wanted = load(files), expected(files)
    indices = [50, 3, 3, 21]
    assert select(wanted, indices) == [wanted[i] for i in indices]
    with monkeypatch.context() as patch:
        patch.setattr(StoredRows, "__getitem__", lambda *_: pytest.fail("a row was read"))
        some = select(rows, indices)
        assert domains(some) == ["d2", "d0", "d0", "d0"]
    assert isinstance(some, StoredRows) and list(some) == [wanted[i] for i in indices]
    assert some.where(0) == f"{files[2]}:11"
    assert len(select(rows, [])) == 0 == len(select([], []))


def test_paths_hold_after_a_change_of_folder(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = load([path.relative_to(tmp_path) for path in files])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert list(rows) == expected(files)


def test_a_row_of_a_changed_file_is_an_error_and_the_others_are_not(files):
    rows, wanted = load(files), expected(files)
    files[1].write_bytes(files[1].read_bytes() + b" ")
    assert [rows[0], rows[59]] == [wanted[0], wanted[59]]
    with pytest.raises(RowError, match=r"b\.parquet: it was changed or removed after its rows were checked; leave row"):
        rows[20]


def test_a_row_costs_few_bytes(tmp_path):
    """10,000 rows of about 450 bytes; as objects they took about 2 KiB each."""
    count = 10_000
    with open(tmp_path / "a.jsonl", "w") as file:
        for i in range(count):
            file.write(json.dumps(record(i, chosen=f"the answer is {i} " * 15)) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps(record(0)))
    load([tmp_path / "b.jsonl"])[0]  # what is imported and cached once
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        rows = load([tmp_path / "a.jsonl"])
        gc.collect()
        kept, peak = (size - before for size in tracemalloc.get_traced_memory())
    finally:
        tracemalloc.stop()
    assert len(rows) == count and rows[count - 1].answer == str(count - 1)
    assert kept / count < 64, f"{kept / count:.1f} bytes a row"
    assert peak / count < 256, f"{peak / count:.1f} bytes a row while loading"
