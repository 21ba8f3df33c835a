"""What a stage trains on: a user's rows, read once a host and checked whole, less those of an evaluation set."""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import runs

from cosmo_rl.cpgd.config import DataConfig
from cosmo_rl.cpgd.run import plan as planning
from cosmo_rl.cpgd.run.plan import model_fingerprint, plan
from cosmo_rl.data.disk import replace_file
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.prepare.mini import safety_rows
from cosmo_rl.model.parallel import init_distributed


@pytest.fixture
def files(tmp_path):
    rows = safety_rows("validation")[:6]
    return (runs.write_rows(tmp_path / "train" / "rows.jsonl", rows),
            runs.write_rows(tmp_path / "held" / "rows.jsonl", rows[:2]))


def settings(path, stage=2, batch_tokens=16_384, **data):
    config = runs.config()
    path = str(path).replace("/RANK/", f"/{os.environ.get('RANK')}/")
    return replace(config, stage=stage, batch=replace(config.batch, max_tokens=batch_tokens),
                   data=replace(config.data, path=(path,), mix=(), **data))


def load(path, **changes):
    return plan(settings(path, **changes), runs.policy_processor()).rows


def test_rows_of_an_evaluation_set_are_dropped(files, caplog):
    train, held = files
    assert len(load(train)) == 6
    for named in ({"evaluation_sets": (f"siuo={held}",)}, {"eval_path": (str(held),)}):
        caplog.clear()
        kept = load(train, **named)
        # The third row is the twin with another text: it has the first one's picture.
        assert [row.id for row in kept] == [row.id for row in safety_rows("validation")[3:6]]
        assert safety_rows("validation")[0].id in caplog.text
    assert len(load(train, evaluation_sets=(f"siuo={held}",), contaminated="report")) == 6
    with pytest.raises(ValueError, match=r"all 6 training rows are in an evaluation set \(siuo\)"):
        load(train, evaluation_sets=(f"siuo={train}",))
    with pytest.raises(ValueError, match=r"--data\.evaluation-sets holds 'siuo'; write NAME=FILE"):
        DataConfig(evaluation_sets=("siuo",))


def test_lengths_are_checked_at_load(files):
    train, _ = files
    with pytest.raises(ValueError, match=r"is over the budget of 12; raise --data\.max-prompt-tokens"):
        load(train, max_prompt_tokens=12)
    with pytest.raises(ValueError, match=r"up to \d+ of response do not fit into --batch\.max-tokens 40"):
        load(train, batch_tokens=40)  # each alone fits
    with pytest.raises(ValueError, match=r"stage 0 imitates `chosen`, which is missing"):
        load(train, stage=0)


def counted_plans(cases: list[tuple[str, str, str]], folder: Path) -> None:
    """On a rank of two: prints what `plan` gives for each case (rows, evaluation rows, who shares a host), how many
    records and images this process has read for it, and what the index files were called.

    Who shares: "host" both ranks, "none" neither, "unknown" where the launcher does not say."""
    from cosmo_rl.data import index

    counts: dict[str, int] = {}

    def counted(name, real):
        def call(*args):
            counts[name] = counts.get(name, 0) + 1
            return real(*args)
        return call

    for name in ("parse_row", "opened"):
        setattr(index, name, counted(name, getattr(index, name)))
    init_distributed()
    written: list[str] = []

    def write(path, content):
        written.append(path.name)
        replace_file(path, content)

    planning.replace_file = write
    for path, held, share in cases:
        rank = os.environ["RANK"]
        os.environ.pop("LOCAL_RANK", None)
        if share != "unknown":
            os.environ |= {"LOCAL_RANK": rank, "GROUP_RANK": "0"} if share == "host" else {
                "LOCAL_RANK": "0", "GROUP_RANK": rank}
        counts.clear()
        written.clear()
        try:
            planned = plan(settings(path, eval_path=(held,)), runs.policy_processor(), folder)
        except UserError as error:
            print(json.dumps({"error": str(error)}))
            continue
        print(json.dumps({
            "counts": counts.copy(), "written": written, "domains": planned.domains,
            "rows": [row.id for row in planned.rows], "evaluation": len(planned.eval_rows),
            "fingerprint": planned.fingerprint, "needs": planned.needs.state_dict(),
            "tokens": planned.rows.records["tokens"].tolist()}))


def test_rows_are_read_once_a_host(tmp_path, files):
    """By the rank that reads: the others load what it found, or are told what it met."""
    train, held = files
    (tmp_path / "0").symlink_to(train.parent)
    runs.write_rows(tmp_path / "1" / "rows.jsonl", safety_rows("validation")[:5])  # what another host has
    broken = train.parent / "broken.jsonl"
    broken.write_text(train.read_text() + "{")
    cases = [(str(train), str(held), "host"), (str(broken), str(held), "host"),
             (str(tmp_path / "RANK" / "rows.jsonl"), str(held), "none"),
             (str(train), str(held), "none"), (str(train), str(held), "unknown")]
    done = runs.Running(counted_plans, (cases, tmp_path), 2, tmp_path / "logs").wait().check()
    first, second = ([json.loads(line) for line in out.splitlines() if line.startswith("{")] for out in done.out)
    # each row once, of three matches both rows, and the three that are left for their needs; each picture once
    counts = {"parse_row": 6 + 2 + 3 * 2 + 3, "opened": 6 + 2}
    assert first[0].pop("counts") == counts
    assert second[0].pop("counts") == {}
    assert len(first[0].pop("written")) == 2 and not second[0].pop("written")
    names = [set(planned[3].pop("written")) for planned in (first, second)]
    assert len(names[0] | names[1]) == 4, "hosts of one name, or launchers on one host, do not share a file"
    assert first[4].pop("written") == second[4].pop("written") == []
    assert all(planned[i].pop("counts") == counts for planned in (first, second) for i in (3, 4))
    assert first == second and first[3] == first[4] == first[0]
    assert first[0]["evaluation"] == 2 and first[0]["needs"]["tasks"] == ["safety"]
    assert first[0]["rows"] == [row.id for row in safety_rows("validation")[3:6]]
    assert first[1]["error"].startswith(f"{broken}:7: it is not one JSON object")
    assert first[2]["error"].startswith("the rows of --data.path, or their images, are not the same on all hosts; copy")
    assert not list(tmp_path.glob(".*.npz")), "nothing is left"
    alone = plan(settings(train, eval_path=(str(held),)), runs.policy_processor())
    assert (alone.fingerprint, alone.needs.state_dict()) == (first[0]["fingerprint"], first[0]["needs"])
    assert alone.rows.records["tokens"].tolist() == first[0]["tokens"] and min(first[0]["tokens"][0]) > 0


def test_the_fingerprint_is_of_all_that_decides_a_prompt(tmp_path):
    folder = shutil.copytree(runs.MODEL, tmp_path / "model")
    seen = {model_fingerprint(folder)}
    for count, name in enumerate(("tokenizer.json", "preprocessor_config.json", "config.json", "chat_template.jinja",
                                  "generation_config.json", "tokenizer_config.json"), start=2):
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        seen.add(model_fingerprint(folder))
        assert len(seen) == count, name
    (folder / "chat_template.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")  # its values are in the checkpoint
    assert model_fingerprint(folder) not in seen


def test_the_fingerprint_of_a_folder_without_templates_is_the_old_one(tmp_path):
    """So that its runs can be resumed."""
    expected = hashlib.blake2b(digest_size=8)
    for name in ("tokenizer.json", "preprocessor_config.json", "config.json"):
        (tmp_path / name).write_text(name)
        expected.update(hashlib.blake2b(name.encode()).digest())
    assert model_fingerprint(tmp_path) == expected.hexdigest()
