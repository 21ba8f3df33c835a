"""Rows from files: the three formats agree, every bad file, row or image is one error with its place, and an index is
a list of rows that takes few bytes, for other processes too."""

import gc
import io
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Sequence, Value
from datasets import Image as ImageFeature
from PIL import Image

from cosmo_rl.data import index, schema
from cosmo_rl.data.index import Index, index_rows, load_rows, select
from cosmo_rl.data.schema import Row, RowError, open_image, opened, parse_row

LIMIT = 10_000


def row(id: str, **fields) -> dict:
    return {"id": id, "task": "general", "domain": "general", "prompt": "what?", "source": "mine", "licence": "CC0",
            **fields}


def write(path, rows) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def picture(path, seed: int = 0, size: tuple[int, int] = (20, 30)) -> str:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return str(path)


def embedded(path: Path, images: list[list[bytes]]) -> list[Path]:
    """A parquet file and a saved dataset with a row for each list of encoded images."""
    features = Features({**{k: Value("string") for k in row("1")}, "images": Sequence(ImageFeature())})
    records = [row(str(i), images=[{"path": None, "bytes": content} for content in contents])
               for i, contents in enumerate(images)]
    saved = Dataset.from_list(records, features=features)
    saved.save_to_disk(path / "saved")
    saved.to_parquet(path / "a.parquet")
    return [path / "saved", path / "a.parquet"]


def fails(paths, *parts: str, limit: int = LIMIT) -> str:
    with pytest.raises(RowError) as caught:
        load_rows(paths, max_image_pixels=limit)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def test_json_lines_in_order_over_files_with_absolute_image_paths(tmp_path, monkeypatch):
    (tmp_path / "sub" / "images").mkdir(parents=True)
    picture(tmp_path / "sub" / "images" / "x.png")
    write(tmp_path / "sub" / "a.jsonl",
          [row("1", images=["images/x.png"]), "", row("2", images=["./images/../images/x.png"])])
    b = write(tmp_path / "b.jsonl", [row("3", images=[str(tmp_path / "sub" / "images" / "x.png")])])
    monkeypatch.chdir(tmp_path)
    rows = list(load_rows(["sub/a.jsonl", b], max_image_pixels=LIMIT))
    assert [r.id for r in rows] == ["1", "2", "3"]
    assert {r.images for r in rows} == {(str(tmp_path / "sub" / "images" / "x.png"),)}
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "b.jsonl").read_bytes())
    assert list(load_rows(["b.jsonl"], max_image_pixels=LIMIT)) == rows[2:]


def test_parquet_and_dataset_folder_give_the_rows_of_the_json_lines(tmp_path):
    picture(tmp_path / "x.png")
    records = [row("1", images=["x.png"], tags={"combined": "safe"}, options=["a", "b"]),
               row("2", key_elements=["cup"], attack={"name": "n", "params": {"x": 1}, "seed": 3, "source_id": "1"}),
               row("3", prompt=None, messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}])]
    expected = list(load_rows([write(tmp_path / "a.jsonl", records)], max_image_pixels=LIMIT))
    assert expected == [parse_row({**r, "images": [str(tmp_path / p) for p in r.get("images", [])]}, "f")
                        for r in records]

    columns = {name: [r.get(name) for r in records] for name in {name for r in records for name in r}}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert list(load_rows([str(tmp_path / "a.parquet")], max_image_pixels=LIMIT)) == expected

    folder = tmp_path / "saved"
    Dataset.from_dict(columns).save_to_disk(folder)
    shutil.copy(tmp_path / "x.png", folder)
    rows = load_rows([str(folder)], max_image_pixels=LIMIT)
    assert list(rows[1:]) == expected[1:] and rows[0].images == (str(folder / "x.png"),)


def test_a_dataset_with_embedded_images_keeps_their_bytes(tmp_path):
    content = Path(picture(tmp_path / "x.png")).read_bytes()
    for path in embedded(tmp_path, [[content], []]):
        rows = load_rows([path], max_image_pixels=LIMIT)
        assert rows[0].images == (content,) and rows[1].images == ()
        fails([path], f"{path}:1: field `images[0]`: the embedded image has 30 x 20 = 600 pixels", limit=599)


def test_embedded_images_are_read_back_from_the_file(tmp_path):
    contents = [Path(picture(tmp_path / f"{i}.png", seed=i)).read_bytes() for i in range(9)]
    images = [[contents[i % 9], contents[(i + 1) % 9]] for i in range(200)]
    for path in embedded(tmp_path, images):
        rows = load_rows([path], max_image_pixels=LIMIT)
        assert [list(one.images) for one in rows] == images
        assert rows.fingerprint == index_rows(list(rows), max_image_pixels=LIMIT).fingerprint


def test_a_bad_embedded_image_is_named(tmp_path):
    content = Path(picture(tmp_path / "x.png")).read_bytes()
    for path in embedded(tmp_path, [[content], [content[:-300]]]):
        fails([path], f"{path}:2: field `images[0]`: the embedded image is corrupt or cut off")


def test_each_distinct_image_is_decoded_once(tmp_path, monkeypatch):
    names = [f"{i}.png" for i in range(4)]
    contents = [Path(picture(tmp_path / name, seed=i)).read_bytes() for i, name in enumerate(names)]
    write(tmp_path / "a.jsonl", [row(str(i), images=[names[i % 4], f"./{names[0]}"]) for i in range(40)])
    looked = []
    monkeypatch.setattr(index, "opened", lambda *args: looked.append(args[0]) or opened(*args))
    monkeypatch.setattr(index, "_AT_ONCE", 3)  # more than one batch
    load_rows([tmp_path / "a.jsonl"], max_image_pixels=LIMIT)
    assert sorted(looked) == [str(tmp_path / name) for name in names]
    for path in embedded(tmp_path, [[contents[i % 4]] for i in range(40)]):
        looked.clear()
        load_rows([path], max_image_pixels=LIMIT)
        assert sorted(looked) == sorted(contents)


def unusual(folder: Path) -> None:
    """animated.gif, cmyk.jpg, deep.png, cut.jpg and bomb.png."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 10, 12, 3), dtype=np.uint8)
    first, second = (Image.fromarray(frame) for frame in noise)
    first.save(folder / "animated.gif", save_all=True, append_images=[second])
    first.convert("CMYK").save(folder / "cmyk.jpg", quality=100)
    Image.fromarray(np.arange(0, 65536, 550, dtype=np.uint16)[:120].reshape(10, 12)).save(folder / "deep.png")
    (folder / "cut.jpg").write_bytes((folder / "cmyk.jpg").read_bytes()[:-300])
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 100))
                                      + png_chunk(b"IEND", b""))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_unusual_images_are_taken_or_refused_as_schema_says(tmp_path):
    unusual(tmp_path)
    names = ("cmyk.jpg", "animated.gif", "deep.png", "cut.jpg", "bomb.png", "none.png")
    path = write(tmp_path / "a.jsonl", [row(name, images=[name]) for name in names])
    rejected: list[RowError] = []
    rows = load_rows([path], max_image_pixels=16_777_216, rejected=rejected)
    assert [one.id for one in rows] == ["cmyk.jpg"]
    wanted = ("animated.gif is an animation; give one frame of it",
              "deep.png has pixels of mode I;16: grey of more than 8 bits, of no known range; convert it to 8 bits",
              "cut.jpg is corrupt or cut off", "bomb.png is beyond 16777216 pixels", "none.png does not exist")
    for line, (error, message) in enumerate(zip(rejected, wanted, strict=True), start=2):
        assert str(error).startswith(f"{path}:{line}: field `images[0]`: ") and message in str(error)


def test_a_decompression_bomb_is_told_from_its_header(tmp_path):
    unusual(tmp_path)
    write(tmp_path / "a.jsonl", [row("a"), row("b", images=["bomb.png"])])
    fails([tmp_path / "a.jsonl"], "a.jsonl:2: field `images[0]`: ", "bomb.png", "pixels", "; shrink it, remove the row",
          limit=16_777_216)


def saved_as(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def scanned(times: int) -> bytes:
    """A progressive JPEG of 64 x 64 with its last scan so often."""
    whole = saved_as(Image.new("L", (64, 64), 90), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * times + whole[-2:]


SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
PNG, JPEG, GIF = (saved_as(SMALL, kind) for kind in ("PNG", "JPEG", "GIF"))
EMPTY_CHUNK = bytes(4) + b"teSt" + zlib.crc32(b"teSt").to_bytes(4, "big")
SOS, BLOCK = scanned(2000).index(b"\xff\xda"), GIF.index(b",\0\0\0\0")
SCANS, SEGMENTS = "has 101 scans, more than 100; save it again", "(it consists of too many small segments); replace it"


@pytest.mark.parametrize(("content", "problem"), [
    (scanned(2000), SCANS),
    (scanned(2000).replace(b"\xff\xda", b"\xff\xff\xff\xda"), SCANS),  # filled up
    (scanned(2000)[:2] + b"\xff\xe5\0\x06\xff\xd9\xff\xd9" + scanned(2000)[2:], SCANS),  # an end that is none
    (scanned(2000)[:SOS] + b"\xff\xd0\xff\xd3" + scanned(2000)[SOS:], SCANS),
    (PNG[:33] + EMPTY_CHUNK * 60_000 + PNG[33:], SEGMENTS), (PNG[:-12] + EMPTY_CHUNK * 60_000 + PNG[-12:], SEGMENTS),
    (JPEG[:2] + b"\xff\xfe\0\2" * 60_000 + JPEG[2:], SEGMENTS),
    (JPEG[:2] + b"\xff\xe5\0\2" * 60_000 + JPEG[2:], SEGMENTS),
    (JPEG[:2] + b"\xff" * 60_000 + JPEG[2:], SEGMENTS),
    (GIF[:BLOCK] + b"!\xfe\1a\0" * 60_000 + GIF[BLOCK:], SEGMENTS),
    (PNG + bytes(2 << 20), "bytes, more than "),
    (b"II*\0" + bytes(100), "is not a readable JPEG, PNG, WEBP, GIF, BMP image"),
])
def test_what_would_take_long_for_its_pixels_is_refused_at_once(tmp_path, monkeypatch, content, problem):
    """2,000 scans took 47 s, and 24 to 50 MB of small segments 12 to 73 s; embedded or as a file."""
    monkeypatch.setattr(schema, "_BYTES_BESIDE", 1 << 20)
    (tmp_path / "a.img").write_bytes(content)
    for source in (content, str(tmp_path / "a.img")):
        with pytest.raises(RowError, match=rf"^a:3: field `images\[2\]`: .*{re.escape(problem)}"):
            open_image(source, LIMIT, "a:3", "images[2]")


def test_what_has_a_reason_to_be_large_or_in_parts_is_taken():
    """A film behind a photograph, where a scan's mark comes by chance; noise, which a GIF has in blocks of 255."""
    film = np.random.default_rng(1).integers(0, 256, 20_000_000, dtype=np.uint8).tobytes()
    assert film.count(b"\xff\xda") > schema.MAX_SCANS
    assert open_image(JPEG + film, 1 << 24, "a").tobytes() == open_image(JPEG, LIMIT, "a").tobytes()
    assert open_image(JPEG + b"\0\2" + scanned(2000), 1 << 24, "a").size == (64, 64)  # nobody looks behind
    assert open_image(scanned(90), LIMIT, "a").size == (64, 64)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2000, 2000), dtype=np.uint8))
    assert open_image(saved_as(noise, "GIF"), 1 << 24, "a").size == (2000, 2000)


@pytest.mark.filterwarnings("ignore:Image size")
def test_an_image_with_harm_anywhere_is_taken_or_refused():
    rng = random.Random(0)
    refused, whole = 0, [saved_as(SMALL, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "MPO")]
    for i in range(600):
        content = bytearray(whole[i % 6])
        for _ in range(rng.choice((1, 3, 10))):
            content[rng.randrange(rng.choice((60, 300, len(content))))] = rng.randrange(256)
        try:
            assert open_image(bytes(content), 1 << 20, "a:1").mode == "RGB"
        except RowError as error:
            refused += 1
            assert str(error).isprintable() and str(error).startswith("a:1: field `images`: the embedded image ")
    assert 100 < refused < 500


def test_a_selection_of_a_dataset_is_what_is_loaded(tmp_path):
    Dataset.from_list([row(str(i)) for i in range(600)]).select(range(599, 0, -2)).save_to_disk(tmp_path / "saved")
    rows = load_rows([tmp_path / "saved"], max_image_pixels=LIMIT)
    assert [r.id for r in rows] == [str(i) for i in range(599, 0, -2)]


@pytest.mark.parametrize(("line", "parts"), [
    ('{"id": "b", ', ["a.jsonl:3: it is not one JSON object", "; write one object a line"]),
    ('{"id": "b", "id": "c"}', ["a.jsonl:3: field `id`: is given twice; keep one of them"]),
    ("[" * 100_000, ["a.jsonl:3: lists and objects lie more than 64 deep within each other; flatten it"]),
    *(('{"id": "b", "attack": ' + "[" * n + "]" * n + "}", ["a.jsonl:3: field `attack`: lists and objects lie more"])
      for n in (64, 480, 700)),
    ('{"id": "b", "attack": {"name": 1, "name": 2}}', ["a.jsonl:3: field `name`: is given twice; keep one of them"]),
    (row("b", **{"n" * 100_000: 1}), ["a.jsonl:3: field `nnnnnn", "nn...nn", "nnn`: there is no such field; remove"]),
    (row("b", **{"a\n\x1b[31m": 1}), [r"a.jsonl:3: field `a\n\x1b[31m`: there is no such field"]),
    (row("b", task="t" * 100_000), ["a.jsonl:3: field `task`: unknown task 'ttt", "ttt...ttt", "give one of safety"]),
    (row("b", answer="x" * (1 << 24) + "x"), ["a.jsonl:3: field `answer`: has 16777217 characters, more than 1677721"]),
    ('["b"]', ["a.jsonl:3: a row is an object of fields, not a list"]),
    (row("b", task="safte"), ["a.jsonl:3: field `task`: unknown task 'safte'; give one of safety, jailbreak"]),
    (row("b", answer=3), ["a.jsonl:3: field `answer`: is a number, not a string; put it in quotes"]),
    (row("a"), ["a.jsonl:3: field `id`: 'a' is the id of ", "a.jsonl:1 too; make the ids unique"]),
    (row("b", images=["none.png"]), ["a.jsonl:3: field `images[0]`: the image file ", "none.png does not exist"]),
    (row("b", images=["x.png", "cut.png"]), ["a.jsonl:3: field `images[1]`: ", "cut.png is corrupt or cut off"]),
    (row("b", images=["text.png"]), ["a.jsonl:3: field `images[0]`: ", "text.png is not a readable JPEG", "; replace"]),
    (row("b", images=["empty.png"]), ["a.jsonl:3: field `images[0]`: ", "empty.png is not a readable JPEG"]),
    (row("b", images=["big.png"]), ["a.jsonl:3: field `images[0]`: ", "20000 pixels, more than 10000; shrink"]),
    (row("b", images=["../x.png"]), ["a.jsonl:3: field `images[0]`: ../x.png leads out of the data folder", "; move"]),
    (row("b", images=["sub/../../rows2/x.png"]), ["a.jsonl:3: field `images[0]`: ", "leads out of the data folder"]),
    (row("b", images=["/etc/hostname"]), ["a.jsonl:3: field `images[0]`: /etc/hostname leads out of the data folder"]),
    (row("b", images=["."]), ["a.jsonl:3: field `images[0]`: "]),
    (row("b", images=["nul\0.png"]), ["a.jsonl:3: field `images[0]`: "]),
    (row("b", images=["x" * 5000]), ["a.jsonl:3: field `images[0]`: "]),
])
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, parts):
    folder = tmp_path / "rows"
    folder.mkdir()
    (tmp_path / "rows2").mkdir()  # a sibling whose name only starts alike is outside too
    for path in (folder / "x.png", tmp_path / "x.png", tmp_path / "rows2" / "x.png"):
        picture(path)
    picture(folder / "big.png", size=(100, 200))
    (folder / "cut.png").write_bytes((folder / "x.png").read_bytes()[:-300])
    (folder / "text.png").write_text("not found")
    (folder / "empty.png").touch()
    message = fails([write(folder / "a.jsonl", [row("a", images=["x.png"]), "", line, row("d")])], *parts)
    assert message.startswith(str(folder / "a.jsonl") + ":3: ") and message.isprintable() and len(message) < 1000


def test_the_first_bad_image_in_row_order_is_reported(tmp_path):
    for i in range(50):
        picture(tmp_path / f"{i}.png", seed=i, size=(100, 100) if i < 10 else (5, 5))
    for i in (9, 30, 40):
        (tmp_path / f"{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes()[:60])
    path = write(tmp_path / "a.jsonl", [row(str(i), images=[f"{i}.png"]) for i in range(50)])
    for _ in range(3):
        fails([path], "a.jsonl:10: field `images[0]`", "9.png")


def test_every_bad_image_of_a_row_is_told(tmp_path):
    good = picture(tmp_path / "good.png")
    path = write(tmp_path / "rows.jsonl", [row("a", images=["none.png", "good.png", "lost.png"]),
                                           row("b", images=["../x.png", good, "../y.png", "none.png"])])
    fails([path], f"{path}:1: 2 problems: (1) field `images[0]`: the image file ",
          "none.png does not exist; put it there, or correct the path (2) field `images[2]`: the image file ")
    found: list[RowError] = []
    assert not len(load_rows([path], max_image_pixels=LIMIT, rejected=found))
    assert sorted([problem.args[:2] for error in found for problem in error.problems]) == [
        (f"{path}:1", "images[0]"), (f"{path}:1", "images[2]"), (f"{path}:2", "images[0]"), (f"{path}:2", "images[2]")]


def test_bytes_that_are_no_utf8_are_named_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(row("a")).encode() + b'\n{"id": "\xff"}\n')
    fails([tmp_path / "a.jsonl"], "a.jsonl:2: it is not one JSON object in UTF-8", "0xff")


def test_an_id_may_not_come_again_in_another_file(tmp_path):
    a, b = (write(tmp_path / f"{name}.jsonl", [row("same")]) for name in "ab")
    fails([a, b], f"{b}:1: field `id`: 'same' is the id of {a}:1 too")
    fails([a, a], "make the ids unique")


def test_all_bad_rows_can_be_collected(tmp_path):
    """With a list for them; the good rows are all there, an image that two rows share is bad for both."""
    picture(tmp_path / "x.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:-300])
    records = [row("a", images=["x.png"]), "{", row("b", images=["cut.png"]), row("c", task="poetry"), row("a"),
               row("d", images=["x.png", "cut.png", "cut.png"]), "", row("e"), row("a"), row("e", answer=3),
               row("a", images=["cut.png"])]
    path, none, empty = write(tmp_path / "a.jsonl", records), str(tmp_path / "none.jsonl"), tmp_path / "empty.jsonl"
    empty.touch()
    rejected: list[RowError] = []
    rows = load_rows([none, path, empty], max_image_pixels=LIMIT, rejected=rejected)
    assert [one.id for one in rows] == ["a", "e"] and rows.where(1) == f"{path}:8"
    assert rows.domains == ["general", "general"]
    assert sorted((error.args[0], error.args[1]) for error in rejected) == sorted([
        (none, ""), (f"{path}:2", ""), (f"{path}:3", "images[0]"), (f"{path}:4", "task"), (f"{path}:5", "id"),
        (f"{path}:6", "images[1]"), (f"{path}:9", "id"), (f"{path}:10", "answer"), (f"{path}:11", "images[0]"),
        (str(empty), "")])
    assert all("is the id of " + path + ":1 too" in str(error) for error in rejected if error.args[1] == "id")
    rejected = []
    assert len(load_rows([], max_image_pixels=LIMIT, rejected=rejected)) == 0 and len(rejected) == 1


def test_the_first_fault_in_file_order_is_raised_whatever_it_is(tmp_path, monkeypatch):
    for i in range(9):
        picture(tmp_path / f"{i}.png", seed=i)
    (tmp_path / "4.png").write_bytes(b"gone")
    records = [row(str(i), images=[f"{i}.png"]) for i in range(9)]
    for at_once in (1, 3, 1024):
        monkeypatch.setattr(index, "_AT_ONCE", at_once)
        later = write(tmp_path / "a.jsonl", [*records[:7], row("x", task="poetry"), *records[7:]])
        fails([later], "a.jsonl:5: field `images[0]`: ", "4.png is not a readable")
        earlier = write(tmp_path / "b.jsonl", [*records[:2], row("x", task="poetry"), *records[2:]])
        fails([earlier], "b.jsonl:3: field `task`: ")
        fails([write(tmp_path / "c.jsonl", [records[0], records[0], *records[1:]])], "c.jsonl:6: ", "4.png")


def test_nothing_to_load_is_an_error(tmp_path):
    fails([], "no row file was named; give at least one with --data.path")
    full, empty = write(tmp_path / "a.jsonl", [row("a")]), write(tmp_path / "b.jsonl", ["", "  "])
    fails([full, empty], f"{empty}: there are no rows in it; ")
    pq.write_table(pa.table({"id": pa.array([], pa.string())}), tmp_path / "e.parquet")
    fails([tmp_path / "e.parquet"], "e.parquet: there are no rows in it")
    Dataset.from_dict({"id": []}).save_to_disk(tmp_path / "saved")
    fails([tmp_path / "saved"], "saved: there are no rows in it")


def test_a_source_that_cannot_be_read_is_named(tmp_path):
    fails([tmp_path / "none.jsonl"], "none.jsonl: there is no such file or folder; correct --data.path")
    (tmp_path / "a.csv").write_text("id\n")
    fails([tmp_path / "a.csv"], "a.csv: files of kind '.csv' are not read; give .jsonl, .parquet or a folder")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    fails([tmp_path / "a.parquet"], "a.parquet: it is corrupt or cut off", "again")
    pq.write_table(pa.table({"id": ["a"] * 1000}), tmp_path / "b.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-200])
    fails([tmp_path / "b.parquet"], "b.parquet: it is corrupt or cut off")
    pq.write_table(pa.table({"id": ["a", "b"]}), tmp_path / "c.parquet")
    fails([tmp_path / "c.parquet"], "c.parquet:1: 5 problems: (1) field `task`: is missing")


def test_a_folder_that_is_no_dataset_is_named(tmp_path):
    fails([tmp_path], "not a Hugging Face dataset", "save_to_disk")
    DatasetDict({name: Dataset.from_list([row(name)]) for name in ("train", "test")}).save_to_disk(tmp_path / "two")
    fails([tmp_path / "two"], "it holds several splits (test, train); name one, as in ")
    assert [r.id for r in load_rows([tmp_path / "two" / "test"], max_image_pixels=LIMIT)] == ["test"]
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        broken = tmp_path / f"broken-{name}"
        shutil.copytree(tmp_path / "two" / "test", broken)
        (broken / name).write_bytes((broken / name).read_bytes()[:30])
        assert re.match(f"{re.escape(str(broken))}(/state.json)?: .*; ", fails([broken], "again"))


def test_fingerprint_follows_content_not_place(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        picture(tmp_path / folder / "x.png")
        write(tmp_path / folder / "a.jsonl", [row("1", images=["x.png"]), row("2", answer="yes")])

    def of(folder: str) -> str:
        return load_rows([tmp_path / folder / "a.jsonl"], max_image_pixels=LIMIT).fingerprint

    same = of("one")
    assert re.fullmatch("[0-9a-f]{16}", same) and of("two") == same
    seen = {same}
    picture(tmp_path / "two" / "x.png", seed=1)
    seen.add(of("two"))
    for change in ([row("2", answer="yes"), row("1", images=["x.png"])], [row("1", images=["x.png"])],
                   [row("1", images=["x.png"]), row("2", answer="no")]):
        write(tmp_path / "one" / "a.jsonl", change)
        seen.add(of("one"))
    assert len(seen) == 5


def test_fingerprint_of_images_in_memory():
    image = Image.new("RGB", (4, 4), "red")
    sources = (image, image.copy(), image.resize((2, 8)), Image.new("RGB", (4, 4), "blue"), PNG)
    prints = [index_rows([parse_row(row("1", images=[source]), "f:1")], max_image_pixels=LIMIT).fingerprint
              for source in sources]
    assert prints[0] == prints[1] and len(set(prints)) == 4


# -- rows that stay in their files ------------------------------------------------------------------------------------


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


def load(files) -> Index:
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
    assert rows.domains == [row.domain for row in wanted] and rows.tasks == [row.task for row in wanted]
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
        patch.setattr(Index, "__getitem__", lambda *_: pytest.fail("a row was read"))
        some = select(rows, indices)
        assert some.domains == ["d2", "d0", "d0", "d0"]
    assert isinstance(some, Index) and list(some) == [wanted[i] for i in indices]
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


def test_another_process_loads_what_one_has_found(files, tmp_path):
    """The same rows in the same order, less those left out, and what else was said of them; no pickle."""
    check = lambda row, pictures: (len(row.id), len(pictures), 7)
    rows = load_rows(files, max_image_pixels=100, check=check).select([50, 3, 44, 0])
    (tmp_path / "index.npz").write_bytes(rows.dump({"tasks": ["general"]}))
    code = ("import sys; from pathlib import Path; from cosmo_rl.data.index import Index\n"
            "rows, more = Index.load(Path(sys.argv[1]))\n"
            "print([row.id for row in rows], rows.domains, rows.fingerprint, rows.where(0), more,\n"
            "      rows.records['tokens'].tolist(), sep='|')")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "index.npz")], capture_output=True, text=True,
                          check=True)
    assert done.stdout == "|".join(map(str, (
        ["r50", "r3", "r44", "r0"], rows.domains, rows.fingerprint, f"{files[2]}:11", {"tasks": ["general"]},
        [[3, 0, 7], [2, 0, 7], [3, 1, 7], [2, 1, 7]]))) + "\n"
    with pytest.raises(ValueError, match=r"gone\.npz cannot be read \(No such file or directory\); let all ranks of a"):
        Index.load(tmp_path / "gone.npz")


def test_a_file_that_changed_between_two_processes_is_told(files, tmp_path):
    (tmp_path / "index.npz").write_bytes(load(files).dump({}))
    os.utime(files[0], ns=(1, 1))
    rows, _ = Index.load(tmp_path / "index.npz")
    assert rows[59].id == "r59"
    with pytest.raises(RowError, match=r"a\.jsonl: it was changed or removed after its rows were checked"):
        rows[0]


def test_what_the_pass_calls_meets_good_rows_in_order_and_each_picture_once(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png", seed=i)
    path = write(tmp_path / "a.jsonl", [row("a", images=["1.png", "0.png"]), "{", row("b"), row("a"),
                                        row("c", images=["0.png"]), row("d", images=["none.png"])])
    met: list[tuple[str, list]] = []
    seen: list[tuple[int, int]] = []

    def check(one: Row, pictures) -> None:
        met.append((one.id, [picture.seen for picture in pictures]))

    rows = load_rows([path], max_image_pixels=LIMIT, rejected=[], check=check,
                     see=lambda image: seen.append(image.getpixel((0, 0))) or seen[-1])
    assert [name for name, _ in met] == ["a", "b", "a", "c"] and len(seen) == 2 == len(set(seen))
    assert met[0][1][1] == met[3][1][0] and met[0][1][0] != met[0][1][1]
    assert [met[number][0] for number in rows.records["order"]] == [one.id for one in rows] == ["a", "b", "c"]
