"""The command line: rows in, rows out, whole or not at all; held-out attacks apart; one line for each mistake."""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cosmo_rl.data.index import index_rows, load_rows
from cosmo_rl.data.prepare import writer
from cosmo_rl.data.prepare.__main__ import main as prepare
from cosmo_rl.data.prepare.augment import read_params
from cosmo_rl.data.prepare.jailbreak.contact_sheet import ContactSheet
from cosmo_rl.data.prepare.jailbreak.registry import find
from cosmo_rl.data.prepare.jailbreak.rows import attack_row
from cosmo_rl.data.prepare.mini import safety_rows

LIMIT = 2_000_000
main = lambda args: prepare(["augment", *args])
TWINS = ("--twin-by", "^(.*)-[abc]$")
SMALL = ("--param", "size=280", "distractor_grid.size=480")
MADE = (*TWINS, *SMALL, "--holdout", "cipher", "rotate", "--keep-plain")


def write_rows(folder: Path, rows, *, changed=None) -> Path:
    """rows.jsonl in `folder`, its pictures in a folder beside; `changed`: place of a row -> fields to replace."""
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for place, row in enumerate(rows):
        path = f"pictures/{row.id}.png"
        row.images[0].save(folder / path)
        record = {"id": row.id, "task": row.task, "domain": row.domain, "messages": list(row.messages),
                  "images": [path], "tags": row.tags, "category": row.category, "source": row.source,
                  "key_elements": list(row.key_elements), "licence": row.licence}
        if row.answer:
            record["answer"] = row.answer
        lines.append(json.dumps(record | (changed or {}).get(place, {})))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def rows():
    return safety_rows("validation")[:66]


@pytest.fixture(scope="module")
def source(rows, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("in"), rows)


@pytest.fixture(scope="module")
def triplet(source):
    path = source.with_name("triplet.jsonl")
    path.write_text("".join(source.open().readlines()[:3]))
    return path


def command(*args, cwd=None):
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run([sys.executable, "-m", "cosmo_rl.data.prepare", "augment", *map(str, args)], env=environment,
                          cwd=cwd, capture_output=True, text=True, timeout=100)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """The command as a user types it, with the ciphers and one image attack held out."""
    out = tmp_path_factory.mktemp("out") / "new" / "folder"
    done = command("--in", source, "--out", out, *MADE, cwd=source.parent)
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_result_reads_back_and_keeps_the_labels(made, rows):
    out, _ = made
    result = load_rows([out / "rows.jsonl", out / "heldout.jsonl"], max_image_pixels=LIMIT)
    by_id = {row.id: row for row in rows}
    plain = [row for row in result if row.attack is None]
    assert [row.id for row in plain] == list(by_id)
    for row in result:
        old = by_id[row.attack["source_id"] if row.attack else row.id]
        for name in ("tags", "answer", "key_elements", "category", "task", "domain", "source", "licence"):
            assert getattr(row, name) == getattr(old, name)
        if row.attack:
            assert row.id == f"{old.id}+{row.attack['name']}" and isinstance(row.attack["seed"], int)
        if not row.attack or row.attack["name"] in {attack.name for attack in find(["text"])}:
            with Image.open(row.images[0]) as picture:
                assert picture.tobytes() == old.images[0].tobytes()
    assert len(plain) == 66 and len(result) == 3 * 66
    places = [list(by_id).index(row.attack["source_id"] if row.attack else row.id) for row in result[:132]]
    assert places == sorted(places) and all(row.attack is None for row in result[:132:2])  # each row, then its attack
    assert {path.suffix for path in (out / "images").iterdir()} == {".png"}
    used = {Path(image).name for row in result for image in row.images}
    assert used == {path.name for path in (out / "images").iterdir()}
    assert sorted(path.name for path in out.iterdir()) == ["contact_sheet.png", "heldout.jsonl", "images", "rows.jsonl"]


def test_heldout_attacks_never_leak(made):
    out, _ = made
    names = {}
    for file in ("rows", "heldout"):
        result = load_rows([out / f"{file}.jsonl"], max_image_pixels=LIMIT)
        names[file] = {row.attack["name"] for row in result if row.attack}
    assert names["heldout"] == {"base64", "caesar", "rot13", "rotate"}
    assert names["rows"] == {attack.name for attack in find(["text", "image"])} - names["heldout"]


def test_the_table_counts_labels_by_attack(made):
    out, done = made
    table = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert "66 rows, 33.3% unsafe" in done.stdout and f"132 rows to {out}" in done.stdout
    lines = [json.loads(line) for file in ("rows", "heldout") for line in (out / f"{file}.jsonl").open()]
    for attack in find(["text", "image"]):
        hit = [row["tags"]["combined"] for row in lines if row.get("attack", {}).get("name") == attack.name]
        file = "heldout" if attack.name in ("base64", "caesar", "rot13", "rotate") else "rows"
        assert table[attack.name] == [attack.name, attack.kind, file, str(len(hit)), str(hit.count("unsafe")),
                                      str(hit.count("safe")), "33.3", "0"]


def test_contact_sheet_shows_every_attack(made):
    with Image.open(made[0] / "contact_sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))[:, ::4].astype(np.int16)
    half = pixels.shape[1] // 2
    headings = [(pixels[:, column] == (232, 236, 242)).all(axis=1) for column in (half - 20, 2 * half - 20)]
    assert sum(int((np.diff(heading.astype(int)) == 1).sum()) for heading in headings) == 22
    assert (pixels.max(axis=2) - pixels.min(axis=2) > 60).mean() > 0.1  # pictures
    assert ((pixels < 60).all(axis=2)).mean() > 0.005  # words


def test_contact_sheet_takes_both_labels_and_no_more_than_it_shows(rows):
    sheet = ContactSheet()
    for row in rows:
        sheet.add(row)  # plain: left out
        sheet.add(attack_row(row, "flip"))
    samples = sheet._samples["flip"]
    assert [sample.unsafe for sample in samples] == [True, False, False]
    benign = ContactSheet()
    for row in [row for row in rows if row.tags["combined"] == "safe"]:
        benign.add(attack_row(row, "zero_width"))
    assert len(benign._samples["zero_width"]) == 2 and benign.draw().width == sheet.draw().width


def files(folder):
    return {str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


def test_the_same_bytes_in_another_order(made, source, tmp_path):
    turned = source.with_name("turned.jsonl")
    turned.write_text("\n".join(reversed(source.read_text().splitlines())))
    assert main(["--in", str(turned), "--out", str(tmp_path / "turned"), *MADE]) == 0
    for file in ("rows.jsonl", "heldout.jsonl"):
        assert sorted((tmp_path / "turned" / file).open()) == sorted((made[0] / file).open())
    assert {name: digest for name, digest in files(tmp_path / "turned").items() if name.startswith("images")} == \
        {name: digest for name, digest in files(made[0]).items() if name.startswith("images")}


def test_every_attack_of_every_row_and_another_file_name(triplet, tmp_path, capsys):
    assert main(["--in", str(triplet), "--out", str(tmp_path / "train.jsonl"), "--per-row", "all", "--seed", "5",
                 *SMALL, "caesar.shift=7",
                 "--contact-sheet", str(tmp_path / "look" / "here.png")]) == 0
    result = load_rows([tmp_path / "train.jsonl"], max_image_pixels=LIMIT)
    assert len(result) == 3 * 22 and (tmp_path / "look" / "here.png").exists()
    assert "66 rows to" in capsys.readouterr().out
    params = {row.attack["name"]: row.attack["params"] for row in result}
    assert params["figstep"]["size"] == 280 and params["caesar"]["shift"] == 7
    assert params["distractor_grid"]["size"] == 480
    assert {row.attack["name"]: Image.open(row.images[-1]).size for row in result}["figstep"] == (280, 280)
    assert [row.id for row in result[:22]] == [f"{result[0].attack['source_id']}+{a.name}"
                                               for a in find(["text", "image"])]


def test_parquet_with_encoded_pictures(source, tmp_path):
    records = [json.loads(line) for line in source.open()][:6]
    for record in records:
        path = source.parent / record["images"][0]
        Image.open(path).save(tmp_path / "x.jpg")
        record["images"] = [{"bytes": (tmp_path / "x.jpg").read_bytes(), "path": None}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")
    assert main(["--in", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "out"), "--attacks", "flip", "mirror",
                 "--per-row", "2", "--keep-plain"]) == 0
    before = load_rows([tmp_path / "rows.parquet"], max_image_pixels=LIMIT)
    after = load_rows([tmp_path / "out" / "rows.jsonl"], max_image_pixels=LIMIT)
    plain = [row for row in after if row.attack is None]
    assert [Path(row.images[0]).read_bytes() for row in plain] == [row.images[0] for row in before]
    assert index_rows(plain, max_image_pixels=LIMIT).fingerprint == before.fingerprint
    assert {Path(row.images[0]).suffix for row in plain} == {".jpg"} and len(after) == 18


def test_dropped_rows_are_counted_with_their_twins(rows, tmp_path, capsys):
    long = {"messages": [{"role": "user", "content": [{"type": "image"},
                                                      {"type": "text", "text": "throw the cup " * 900}]}]}
    path = write_rows(tmp_path / "in", rows[:6], changed={1: long})
    args = ["--in", str(path), "--out", str(tmp_path / "out"), *TWINS, "--attacks", "figstep", "flip", "--per-row", "2"]
    assert main(args) == 1
    assert f"row {rows[1].id}, attack figstep: 12608 characters do not fit" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*args, "--drop-illegible"]) == 0
    shown = capsys.readouterr().out
    assert next(line.split() for line in shown.splitlines() if line.split()[:1] == ["figstep"])[3:] == \
        ["3", "1", "2", "33.3", "3"]
    assert f"dropped 3 of figstep, as: row {rows[1].id}" in shown
    assert len(load_rows([tmp_path / "out" / "rows.jsonl"], max_image_pixels=LIMIT)) == 9
    args[1] = str(write_rows(tmp_path / "all", rows[:6], changed=dict.fromkeys(range(6), long)))
    args[args.index("flip")] = "mirror"
    assert main([*args, "--drop-illegible", "--overwrite"]) == 1
    assert "no row is left" in capsys.readouterr().err
    assert len(load_rows([tmp_path / "out" / "rows.jsonl"], max_image_pixels=LIMIT)) == 9  # the old ones, untouched


def test_nothing_is_overwritten_unasked(triplet, tmp_path, capsys):
    args = ["--in", str(triplet), "--out", str(tmp_path / "out"), *TWINS, "--attacks", "text", "--per-row", "all"]
    assert main([*args, "--holdout", "cipher"]) == 0
    for name in ("heldout.jsonl", "contact_sheet.png", "rows.jsonl"):  # as they are asked for
        before = files(tmp_path / "out")
        assert main(args) == 1
        assert f"{name} is there already; name another --out, or replace it with --overwrite" in capsys.readouterr().err
        assert files(tmp_path / "out") == before
        (tmp_path / "out" / name).rename(tmp_path / name)
    (tmp_path / "heldout.jsonl").rename(tmp_path / "out" / "heldout.jsonl")
    assert main([*args, "--overwrite"]) == 0
    assert not (tmp_path / "out" / "heldout.jsonl").exists()  # of another run: it would not belong to these rows
    result = load_rows([tmp_path / "out" / "rows.jsonl"], max_image_pixels=LIMIT)
    assert {"base64", "flip"} < {row.attack["name"] for row in result}


@pytest.mark.parametrize("when", ["add", "commit", "rename"])
def test_a_run_that_dies_leaves_nothing(triplet, tmp_path, monkeypatch, capsys, when):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if when == "rename":
        monkeypatch.setattr(writer.os, "replace", full)
    elif when == "commit":
        monkeypatch.setattr(writer, "fsync", full)
    else:
        monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["--in", str(triplet), "--out", str(tmp_path / "a" / "b"), *TWINS, "--attacks", "flip"]) == 1
    assert "No space left on device; free space" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.jsonl")) and not list(tmp_path.rglob(".rows*"))
    assert not (tmp_path / "a").exists()


def test_an_interrupt_leaves_nothing(triplet, tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(ContactSheet, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["--in", str(triplet), "--out", str(tmp_path / "out"), *TWINS, "--attacks", "flip"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("args", "message"), [
    (["--attacks", "figstp"], "unknown attack 'figstp'; did you mean figstep"),
    (["--holdout", "ciphers"], "unknown attack 'ciphers'; did you mean cipher"),
    (["--attacks", "text", "--holdout", "text"], "holds out every attack"),
    (["--attacks", "flip", "leet", "--per-row", "3"], "--per-row is 3, of 2 attacks"),
    (["--twin-by", "("], "no regular expression"),
    (["--twin-by", "zebra"], "finds no twins"),
    (["--seed", "-1"], "--seed is -1"),
    (["--param", "caesar.shift"], "write NAME.KEY=VALUE"),
    (["--param", "caesar.shift=x"], "'caesar.shift=x' is no int; give one, as 3"),
    (["--param", "caesar.shift=99"], "caesar.shift is 99; give 1 to 25"),
    (["--param", "cesar.shift=3"], "attack 'cesar' is not among those of this run; did you mean caesar"),
    (["--param", "sise=336"], "no parameter 'sise'"),
    (["--attacks", "flip", "--param", "size=336"], "no parameter 'size'; there are none"),
    (["--param", "resize_pixels=9999"], "give --resize-pixels instead"),
    (["--resize-pixels", "10"], "resize_pixels is 10; give 3136"),
    (["--contact-sheet", "{out}/rows.jsonl"], "is a file of --out"),
    (["--out", "{in}"], "is an input; name another --out"),
    (["--out", "{in}/deeper"], "cannot write"),
    (["--out", "{tmp}/heldout.jsonl"], "is the file of the held-out attacks"),
    (["--in", "{tmp}/gone.jsonl"], "there is no such file or folder"),
    (["--in", "{tmp}/empty.jsonl"], "there are no rows in it"),
    (["--in", "{tmp}/bad.jsonl"], "bad.jsonl:1: field `task`: unknown task 'safty'"),
    (["--in", "{tmp}/attacked.jsonl"], "is already the work of attack 'flip'; give plain rows"),
    (["--in"], "--in names no file"),
])
def test_mistakes_are_one_line_with_the_mend(triplet, tmp_path, capsys, args, message):
    first = json.loads(triplet.open().readline()) | {"images": [], "prompt": "throw the cup"}
    first.pop("messages")
    note = {"name": "flip", "params": {}, "seed": 0, "source_id": "1"}
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text(json.dumps(first | {"task": "safty"}))
    (tmp_path / "attacked.jsonl").write_text(json.dumps(first | {"attack": note}))
    out = tmp_path / "out"
    args = [arg.format(out=out, tmp=tmp_path, **{"in": triplet}) for arg in args]
    there = triplet.read_bytes()
    assert main([*([] if "--in" in args else ["--in", str(triplet)]), *([] if "--out" in args else ["--out", str(out)]),
                 *args]) == 1
    error = capsys.readouterr().err
    assert error.startswith("augment: ")
    assert message in error and error.count("\n") == 1
    assert not out.exists() and triplet.read_bytes() == there


def test_an_unknown_option_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--in", "x", "--out", "y", "--atacks", "flip"])
    assert stop.value.code != 0 and "--atacks" in capsys.readouterr().err


def test_a_transform_that_writes_a_reserved_token_is_refused(rows, tmp_path, capsys):
    """ROT13 of <|vz_fgneg|> opens a turn: the trainer would refuse the row."""
    changed = {0: {"messages": [{"role": "user", "content": "a cup <|vz_fgneg|>"}], "images": []}}
    path = write_rows(tmp_path / "in", rows[:1], changed=changed)
    assert main(["--in", str(path), "--out", str(tmp_path / "out"), "--attacks", "rot13"]) == 1
    assert f"row {rows[0].id}+rot13: field `messages[0].content`: holds the reserved token" in capsys.readouterr().err


def test_ids_that_would_meet_are_named(rows, tmp_path, capsys):
    path = write_rows(tmp_path / "in", rows[:2], changed={1: {"id": f"{rows[0].id}+flip"}})
    assert main(["--in", str(path), "--out", str(tmp_path / "out"), "--attacks", "flip", "--keep-plain"]) == 1
    assert f"two rows would have the id '{rows[0].id}+flip'" in capsys.readouterr().err


def test_an_embedded_picture_is_written_as_it_is(rows, tmp_path):
    rows[0].images[0].save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    for source in (content, str(tmp_path / "x.png")):  # a file beside the rows is copied too
        with writer.row_writer(tmp_path, "images") as out:
            name = out.image(source)
        assert name.startswith("images/") and (tmp_path / name).read_bytes() == content


def test_resize_pixels_reaches_every_attack_that_draws():
    attacks = find(["text", "image"])
    params = read_params(("size=336", "overlay.opacity=0.5"), attacks, 200_704)
    assert params["flip"] == {} and params["caesar"] == {}
    for attack in find(["image"]):
        assert params[attack.name]["resize_pixels"] == 200_704 and params[attack.name]["size"] == 336
    assert params["overlay"]["opacity"] == 0.5 and "opacity" not in params["figstep"]
