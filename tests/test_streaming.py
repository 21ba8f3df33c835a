"""Records of each kind of file, one at a time, and embedded images that leave memory."""

import csv
import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cosmo_rl.data import streaming
from cosmo_rl.data.schema import RowError, image_size, open_image
from cosmo_rl.data.streaming import KINDS, ImageStore, StoredImage, read_records


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
    monkeypatch.setattr(streaming, "_CHUNK", chunk)
    for start in ("", "\ufeff", " \n"):
        (tmp_path / "a.json").write_text(start + json.dumps(ITEMS, **layout) + "\n\n", encoding="utf-8")
        assert read(tmp_path / "a.json") == list(enumerate(ITEMS, start=1))
    (tmp_path / "a.json").write_text(" [ ] ")
    assert read(tmp_path / "a.json") == []


def test_a_json_list_is_not_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_CHUNK", 100)
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
    ('[{"a": 1}, {"a": 1, "a": 2}]', [":2: ", "field 'a' is given twice"]),
    ('[{"a": 1}, {"a": nothing}]', [":2: ", "; download it again"]),
    ('[{"a": ' + "[" * 100_000, [":1: "]),
])
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_a_bad_json_list_is_told_by_item(tmp_path, monkeypatch, text, parts, chunk):
    monkeypatch.setattr(streaming, "_CHUNK", chunk if len(text) < 1000 else 1 << 20)
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
    (tmp_path / "a.csv").write_text("a,b\n1\n")
    assert read(tmp_path / "a.csv") == [(1, {"a": "1", "b": None})]


def test_only_the_kinds_asked_for_are_read(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(RowError, match=r"a.json: files of kind '.json' are not read; give .jsonl, .parquet or a fold"):
        list(read_records(tmp_path / "a.json"))
    with pytest.raises(RowError, match=r"b.json: there is no such file or folder; correct --in"):
        list(read_records(tmp_path / "b.json", kinds=KINDS, option="--in"))


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_images_beyond_the_memory_are_read_back_from_the_file(monkeypatch):
    contents = [encoded(i) for i in range(20)]
    monkeypatch.setattr(streaming, "IN_MEMORY_BYTES", sum(map(len, contents[:8])))
    store = ImageStore()
    kept: list[Any] = [store.keep(content) for content in contents]
    assert kept[:8] == contents[:8] and all(isinstance(image, StoredImage) for image in kept[8:])
    assert [image.read() for image in kept[8:]] == contents[8:]
    assert [store.keep(content) for content in contents] == kept  # equal ones are kept once
    del store
    for image, content in zip(kept, contents, strict=True):
        assert np.array_equal(np.asarray(open_image(image, 100, "")), np.asarray(open_image(content, 100, "")))
        assert image_size(image) == (5, 9)
        assert pickle.loads(pickle.dumps(image)) == content
    with ThreadPoolExecutor(4) as pool:  # one file, no shared position
        again = list(pool.map(lambda i: kept[8 + i % 12].read() == contents[8 + i % 12], range(2000)))
    assert all(again)
