"""Each published layout, in rows made up for the test: what becomes of every field, and how another layout is told."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Sequence, Value
from datasets import Image as ImageFeature
from published import BUILDERS, HINT, IMAGE, LIMIT, lines, parquet, picture, png, source_of

from cosmo_rl.cpgd.rewards.build import RowNeeds
from cosmo_rl.cpgd.run.recipes import recipe
from cosmo_rl.data.files import KINDS, read_records
from cosmo_rl.data.index import load_rows
from cosmo_rl.data.prepare import convert as conversion
from cosmo_rl.data.prepare.__main__ import main
from cosmo_rl.data.prepare.adapters.reading import LayoutError, Record, options
from cosmo_rl.data.prepare.adapters.registry import NAMES, adapter
from cosmo_rl.data.prepare.convert import convert
from cosmo_rl.data.prepare.options import Convert
from cosmo_rl.data.schema import RowError, open_image, parse_row


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, tuple[Path, list[dict]]]:
    """Each set in its layout: its folder, and what its rows must hold."""
    made = {}
    for name, build in BUILDERS.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder, build(folder)
    return made


def test_every_adapter_is_here_and_documented():
    assert tuple(sorted(BUILDERS)) == NAMES
    for name in NAMES:
        text = adapter(name).mapping.__doc__ or ""
        assert all(word in text for word in ("ayout", "Licence: ", "Mapping: ")) and "read" in text.lower(), name
    with pytest.raises(ValueError, match="did you mean vlguard"):
        adapter("VL-Guard")


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_of_a_published_layout(published, name):
    folder, expected = published[name]
    rows = list(adapter(name)(source_of(name, folder)))
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert {field: row.get(field) for field in wanted} == wanted
        as_text = lambda constraints: json.dumps(constraints, sort_keys=True)  # 9 is 9.0, and written as 9
        assert as_text(row.get("constraints")) == as_text(wanted.get("constraints"))
        assert row["source"] and row["licence"] and parse_row(row, "x").domain == row["domain"]
    assert len({row["id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_conversion_loads_with_the_same_pictures_and_the_rewards_take_it(published, tmp_path, name, capsys):
    folder, expected = published[name]
    source, out = source_of(name, folder), tmp_path / "rows.jsonl"
    main(["convert", "--name", name, "--in", str(source), "--out", str(out)])
    rows = load_rows([out], max_image_pixels=LIMIT)
    assert [row.id for row in rows] == [row["id"] for row in adapter(name)(source)]
    for row, wanted in zip(rows, adapter(name)(source), strict=True):
        left, right = ([np.asarray(open_image(image, LIMIT, "")) for image in images]
                       for images in (row.images, wanted.get("images", [])))
        assert len(left) == len(right) and all(map(np.array_equal, left, right))
        assert all(Path(str(image)).is_relative_to(tmp_path) for image in row.images)
    table = capsys.readouterr().out
    assert f"total{len(expected):>42}" in table and "rejected" not in table
    assert not [path for path in tmp_path.rglob(".*")]
    assert {row.task for row in rows} <= {*adapter(name).tasks}
    needs = RowNeeds(replace(recipe("tiny", 2).reward, task_aware=1.0))
    ruled = [row for row in rows if row.task != "value" or row.answer]  # tasks with a rule: nothing may be refused
    assert not any(map(needs.problem, ruled))


@pytest.mark.parametrize("name", NAMES)
def test_another_layout_is_named_with_file_row_and_field(published, name):
    for other, (folder, _) in published.items():
        path = next(path for path in sorted(folder.rglob("*")) if path.suffix in KINDS and "test" not in path.name
                    and "evaluation" not in path.name)
        record = next(read_records(path, kinds=KINDS))[1]
        if adapter(name).fit(record):
            assert other == name or {other, name} == {"llava", "mathv360k"}
            continue
        with pytest.raises(LayoutError) as caught:
            list(adapter(name)(path, reject=lambda error: None))  # a lenient caller is told all the same
        message = str(caught.value)
        assert message.startswith(f"{path}:1: field `") and f"layout {name} has" in message, message
        assert "this looks like" in message and other in message.rpartition("this looks like")[2], message


def test_a_record_of_another_kind_is_no_layout(tmp_path):
    lines(tmp_path / "train.jsonl", ["text"])
    with pytest.raises(LayoutError, match=r"train.jsonl:1: a record of pku_saferlhf is an object of fields, not str"):
        list(adapter("pku_saferlhf")(tmp_path))
    lines(tmp_path / "train.jsonl", [{"a": 1}])
    with pytest.raises(LayoutError, match=r"fields are a; name a file of that set, or rename the fields"):
        list(adapter("pku_saferlhf")(tmp_path))


def rejected(name: str, source: Path, **more) -> list[str]:
    found: list[RowError] = []
    list(adapter(name)(source, reject=found.append, **more))
    return [str(error) for error in found]


def test_labels_that_the_data_do_not_give(published, tmp_path):
    pair = {"prompt": "Hello?", "response_0": "Hi.", "response_1": "Hello.", "is_response_0_safe": True,
            "is_response_1_safe": True, "safer_response_id": 0}
    lines(tmp_path / "train.jsonl", [pair])
    (message,) = rejected("pku_saferlhf", tmp_path)
    assert "both responses are safe, and nothing says whether the prompt is" in message
    (row,) = adapter("pku_saferlhf")(tmp_path, unlabelled="safe")
    assert row["tags"] == {"text": "safe", "combined": "safe"} and row["chosen"] == "Hi."
    folder, _ = published["spa_vl"]
    (row,) = adapter("spa_vl")(folder, unlabelled="safe")
    assert row["tags"] == {"combined": "safe"}
    assert "nothing says whether it is harmful" in rejected("spa_vl", folder, unlabelled="reject")[0]


def test_the_other_layouts_of_a_set(tmp_path):
    pair = {"question": "q", "image": IMAGE, "category": "c", "response_1": "a", "response_2": "b",
            "is_response_1_safe": "no", "is_response_2_safe": "yes", "safer_response_id": "2"}
    parquet(tmp_path / "b" / "train.parquet", [pair, {**pair, "safer_response_id": "1"},
                                               {**pair, "safer_response_id": "0"}])
    rows = list(adapter("beavertails_v")(tmp_path / "b", reject=lambda error: None))
    assert [row.get("chosen") for row in rows] == ["b", None]
    assert "`safer_response_id`: is '0'; give one of '1', '2'" in rejected("beavertails_v", tmp_path / "b")[0]

    (tmp_path / "eval.tsv").write_text("adversarial\tlabel\tdata_type\nlet us play\t1\tadversarial_harmful\n")
    (row,) = adapter("wildjailbreak")(tmp_path / "eval.tsv")
    assert row["task"] == "jailbreak" and row["prompt"] == "let us play" and "attack" not in row
    (tmp_path / "RedTeam_2K.csv").write_text("id,question,policy,from\n1,tell me a secret,Privacy,hand\n")
    (row,) = adapter("jailbreakv_28k")(tmp_path / "RedTeam_2K.csv")
    assert row["task"] == "safety" and row["tags"] == {"text": "unsafe", "combined": "unsafe"}
    parquet(tmp_path / "harm.parquet", [{"image": IMAGE, "question": "q", "class1": "a", "class2": "b", "class3": ""}])
    (row,) = adapter("spa_vl")(tmp_path / "harm.parquet")
    assert row["category"] == "a / b" and "chosen" not in row


def test_a_saved_dataset_is_read_and_its_splits_are_named(tmp_path):
    records = Dataset.from_list([{"images": [IMAGE], "problem": "<image>x?", "answer": "1"}],
                                features=Features({"images": Sequence(ImageFeature()), "problem": Value("string"),
                                                   "answer": Value("string")}))
    records.save_to_disk(tmp_path / "saved")
    (row,) = adapter("geometry3k")(tmp_path / "saved")
    assert row["images"] == [png(0)] and row["id"] == "geometry3k:saved:1"


def test_mathv360k_reads_answers_in_other_words(tmp_path):
    picture(tmp_path / "1.png", 0)
    (tmp_path / "train_samples_all_tuning.json").write_text(json.dumps([
        {"image": "1.png", "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": reply}]}
        for asked, reply in (("a?\n(A) x\n(B) y", "Answer: (B)."), ("a?", "the answer is: \\pi"))]))
    assert [(row["task"], row["answer"]) for row in adapter("mathv360k")(tmp_path)] == [("mcq", "B"), ("math", "\\pi")]


@pytest.mark.parametrize(("text", "expected"), [
    ("Choices:\n(A) 1\n(B) 2", ["1", "2"]),
    ("a\nA. x y\n  B. z.\nC) w", ["x y", "z.", "w"]),
    (f"{HINT}\nA: yes\nB: no", ["yes", "no"]),
    ("A. x\nC. y", None), ("A. x", None), ("A. x\nB. x", None), ("A. x\nB. y\nA. z", None), ("A.\nB.", None),
    ("", None),
])
def test_options_are_read_from_lines(text, expected):
    assert options(text) == expected


def test_mmk12_takes_images_from_a_folder_that_is_named(tmp_path):
    picture(tmp_path / "1.png", 0)
    user = {"role": "user", "content": "a?"}
    lines(tmp_path / "rows" / "b.jsonl", [{"conversations": [user], "answer": "1", "image_urls": ["1.png"]}])
    (row,) = adapter("mmk12")(tmp_path / "rows" / "b.jsonl", images=tmp_path)
    assert row["images"] == [str(tmp_path / "1.png")]


def test_a_conversion_leaves_out_broken_images_and_says_why(tmp_path, capsys):
    for i in range(3):
        picture(tmp_path / "set" / "train" / f"{i}.png", i)
    (tmp_path / "set" / "train" / "1.png").write_bytes(png(1)[:60])
    pair = [{"instruction": "a", "response": "b"}]
    (tmp_path / "set" / "train.json").write_text(json.dumps(
        [{"image": f"{i % 3}.png", "safe": False, "instr-resp": pair} for i in range(6)]
        + [{"image": "7.png", "safe": False, "instr-resp": pair}]))
    out = tmp_path / "new" / "rows.jsonl"
    main(["convert", "--name", "vlguard", "--in", str(tmp_path / "set"), "--out", str(out), "--domain", "risk"])
    table = capsys.readouterr().out
    assert "risk            safety      unsafe            4\n" in table
    assert f"rejected{3:>39}\n" in table and f"{2:>9}  as row vlguard:train:2: field `images[0]`: " in table
    assert f"{1:>9}  as {tmp_path / 'set' / 'train.json'}:7: field `image`: the image file " in table
    rows = load_rows([out], max_image_pixels=LIMIT)
    assert [row.id for row in rows] == [f"vlguard:train:{i}" for i in (1, 3, 4, 6)]
    assert len({str(image) for row in rows for image in row.images}) == 2  # copied once each
    assert len(list((out.parent / "rows_images").iterdir())) == 2
    beside = tmp_path / "set" / "rows.jsonl"  # images below the row file stay where they are
    assert main(["convert", "--name", "vlguard", "--in", str(tmp_path / "set"), "--out", str(beside)]) == 0
    assert json.loads(beside.open().readline())["images"] == ["train/0.png"]
    assert not (tmp_path / "set" / "rows_images").exists()


def test_a_conversion_never_leaves_half_a_file(published, tmp_path, monkeypatch):
    folder, _ = published["vlguard"]
    out = tmp_path / "rows.jsonl"
    options = Convert(name="vlguard", in_=(str(folder),), out=str(out), limit=2)
    assert convert(options).rows.total() == 2 and len(out.read_text().splitlines()) == 2
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"rows.jsonl is there; give another --out, or --overwrite"):
        convert(options)

    def stop(image, *rest, seen=[]):  # noqa: B006  at the second image: rows are written by then
        seen.append(image)
        if len(seen) == 2:
            raise KeyboardInterrupt

    again = Convert(name="vlguard", in_=(str(folder),), out=str(out), overwrite=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(conversion, "open_image", stop)
        convert(again)
    assert out.read_bytes() == before and not list(tmp_path.glob(".*"))
    assert convert(again).rows.total() == 3 and len(out.read_text().splitlines()) == 3


@pytest.mark.parametrize(("change", "part"), [
    ({"name": "vlgard"}, "did you mean vlguard"),
    ({"out": "rows.csv"}, "give a name that ends in .jsonl"),
    ({"in_": ("nowhere",)}, "nowhere: there is no such file or folder; correct --in"),
    ({"unlabelled": "safe"}, "vlguard labels its prompts; leave --unlabelled out"),
    ({"name": "llava"}, "files of layout llava have no fixed names; name the file"),
    ({"name": "geometry3k"}, "there is no file train-*.parquet in it"),
    ({"max_image_pixels": 10}, "gave no row, so "),
])
def test_a_conversion_that_cannot_be(published, tmp_path, monkeypatch, capsys, change, part):
    monkeypatch.chdir(tmp_path)
    options = {"name": "vlguard", "in_": (str(published["vlguard"][0]),), "out": "rows.jsonl", **change}
    with pytest.raises(ValueError) as caught:
        convert(Convert(**options))
    assert part in str(caught.value)
    assert not list(tmp_path.rglob("*"))
    words = [word for name, value in options.items()
             for word in (f"--{name.rstrip('_').replace('_', '-')}", *(value if isinstance(value, tuple) else [value]))]
    assert main(["convert", *map(str, words)]) == 1 and capsys.readouterr().err.startswith("convert: ")


def test_a_record_reads_truth_values_and_images_strictly(tmp_path):
    record = Record({"a": 1, "b": {"bytes": b"", "path": None}, "c": [png(0), None]}, "f:1", (str(tmp_path),))
    assert record.choice("a", {1: "one"}) == "one" and record.images("d") == []
    for field in ("b", "c"):
        with pytest.raises(RowError, match="holds no image"):
            record.images(field)
    with pytest.raises(RowError, match="is None; give one of"):
        record.choice("none", {1: "one"})


def test_a_later_record_that_lacks_fields_is_left_out_and_the_others_stay(tmp_path):
    ask = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    lines(tmp_path / "c.jsonl", [ask, {"turns": []}, "text", ask])
    assert [row["id"] for row in adapter("llava")(tmp_path / "c.jsonl", reject=lambda error: None)] == [
        "llava:c:1", "llava:c:4"]
    first, second = rejected("llava", tmp_path / "c.jsonl")
    assert "c.jsonl:2: field `conversations`: is not there" in first and "c.jsonl:3: a record" in second
    with pytest.raises(LayoutError, match=r"c.jsonl:2"):
        list(adapter("llava")(tmp_path / "c.jsonl"))


def test_a_folder_gives_no_test_split_and_files_of_one_stem_have_their_own_ids(tmp_path):
    one = {"message": json.dumps([{"role": "user", "content": "a?"}]), "answer": "1"}
    for name in ("train", "other", "test", "mmk12_val", "a/eval-00000", "latest", "testing"):
        lines(tmp_path / f"{name}.jsonl", [one])
    parquet(tmp_path / "train.parquet", [{"question": "q", "image": IMAGE, "answer": "2"}])
    assert [row["id"] for row in adapter("mmk12")(tmp_path)] == [
        "mmk12:latest:1", "mmk12:other:1", "mmk12:testing:1", "mmk12:train.jsonl:1", "mmk12:train.parquet:1"]
    assert next(adapter("mmk12")(tmp_path / "test.jsonl"))["id"] == "mmk12:test:1"  # by its name it is read


def test_files_of_one_name_in_two_folders_have_their_own_ids(tmp_path, monkeypatch, capsys):
    talk = {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}
    files = [tmp_path / name for name in ("x/train.json", "y/deep/train.json", "y/other.json", "train.jsonl")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([talk] if file.suffix == ".json" else talk))
    ids = lambda *given: [row["id"] for row in adapter("llava")(given)]
    assert ids(*files[:3]) == ["llava:x/train:1", "llava:y/deep/train:1", "llava:other:1"]
    assert ids(files[2], *files[:2]) == ["llava:other:1", "llava:x/train:1", "llava:y/deep/train:1"], "in any order"
    assert ids(*files) == ["llava:x/train:1", "llava:y/deep/train:1", "llava:other:1", "llava:train.jsonl:1"]
    assert [ids(file) for file in files[:2]] == [["llava:train:1"]] * 2, "as they were: none clashes"
    assert ids(files[0], files[2]) == ["llava:train:1", "llava:other:1"]
    main(["convert", "--name", "llava", "--in", *map(str, files), "--out", str(tmp_path / "rows.jsonl")])
    assert len(load_rows([str(tmp_path / "rows.jsonl")], max_image_pixels=1)) == 4, "which refuses two of one id"
    assert main(["convert", "--name", "llava", "--in", *[str(files[0])] * 2, "--out", str(tmp_path / "x.jsonl")]) == 1
    assert "train.json: the file is given twice; name it once" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("x")
    for same in ("x/train.json", "y/../x/train.json", "link/train.json"):
        with pytest.raises(RowError, match="the file is given twice"):
            ids(files[0], same)


@pytest.mark.parametrize(("field", "part"), [("redteam_query", "field `redteam_query`: holds half of a character"),
                                             ("image_path", "field `image_path`: the image file ")])
def test_half_a_character_rejects_its_record_only(tmp_path, capsys, field, part):
    picture(tmp_path / "1.png", 0)
    good = {"jailbreak_query": "q", "redteam_query": "r", "format": "f", "policy": "p", "image_path": "1.png"}
    lines(tmp_path / "a.jsonl", [good, {**good, field: "\ud800.png"}])
    out = tmp_path / "rows.jsonl"
    main(["convert", "--name", "jailbreakv_28k", "--in", str(tmp_path / "a.jsonl"), "--out", str(out)])
    table = capsys.readouterr().out
    assert part in table and table.encode() and len(out.read_text().splitlines()) == 1


def test_names_of_files_do_not_steer_the_terminal(tmp_path, capsys):
    source, out = tmp_path / "\x1b[2J.jsonl", tmp_path / "\x1b]0;.jsonl"
    lines(source, [{"question": "q", "answer": "#### 3"}, {"question": "q", "answer": "none"}])
    main(["convert", "--name", "gsm8k", "--in", str(source), "--out", str(out)])
    table = capsys.readouterr().out
    assert "\\x1b[2J.jsonl:2: field `answer`" in table and table.startswith(str(tmp_path)) and "\x1b" not in table
    assert main(["convert", "--name", "hendrycks_math", "--in", str(source), "--out", str(tmp_path / "b.jsonl")]) == 1
    error = capsys.readouterr().err
    assert "\\x1b[2J.jsonl:1: field `level`" in error and "\x1b" not in error


@pytest.mark.parametrize(("safe", "safer", "chosen"), [
    ((True, False), 0, "zero"), ((False, True), 1, "one"), ((False, False), 0, None), ((False, False), 1, None),
    ((True, False), 1, None), ((False, True), 0, None)])
@pytest.mark.parametrize("name", ["pku_saferlhf", "beavertails_v"])
def test_chosen_is_the_safer_response_and_only_if_it_is_safe(tmp_path, name, safe, safer, chosen):
    if name == "pku_saferlhf":
        record = {"prompt": "q", "response_0": "zero", "response_1": "one", "safer_response_id": safer,
                  "is_response_0_safe": safe[0], "is_response_1_safe": safe[1]}
    else:
        picture(tmp_path / "1.png", 0)
        words = {True: "yes", False: "no"}
        record = {"question": "q", "image": "1.png", "category": "c", "response_1": "zero", "response_2": "one",
                  "is_response_1_safe": words[safe[0]], "is_response_2_safe": words[safe[1]],
                  "safer_response_id": str(safer + 1)}
    lines(tmp_path / "a.jsonl", [record])
    (row,) = adapter(name)(tmp_path / "a.jsonl")
    assert row.get("chosen") == chosen and row["tags"]["combined"] == "unsafe"


def test_a_conversion_does_not_replace_what_it_reads(published, tmp_path):
    build = tmp_path / "set"
    BUILDERS["pku_saferlhf"](build)
    path = build / "data" / "Alpaca-7B" / "train.jsonl"
    before = path.read_bytes()
    for source in (path, build):
        with pytest.raises(ValueError, match=r"train.jsonl is one of the files that --in names"):
            convert(Convert(name="pku_saferlhf", in_=(str(source),), out=str(path), overwrite=True))
    assert path.read_bytes() == before
    again = Convert(name="pku_saferlhf", in_=(str(build),), out=str(build / "rows.jsonl"), overwrite=True)
    assert convert(again).rows == convert(again).rows  # beside its images a row file may be replaced


@pytest.mark.parametrize(("change", "part"), [({"limit": -1}, "--limit is -1"), ({"domain": " "}, "--domain is blank"),
                                              ({"licence": "\t"}, "--licence is blank")])
def test_options_that_would_spoil_the_rows(published, tmp_path, change, part):
    with pytest.raises(ValueError, match=part):
        convert(Convert(name="vlguard", in_=(str(published["vlguard"][0]),), out=str(tmp_path / "r.jsonl"), **change))
    assert not list(tmp_path.iterdir())
