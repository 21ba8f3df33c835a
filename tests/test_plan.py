"""What a stage trains on: a user's rows are checked whole at load, and those of an evaluation set are left out."""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import hashlib
import shutil
from dataclasses import replace

import pytest
import runs

from cosmo_rl.cpgd.config import DataConfig
from cosmo_rl.cpgd.run.plan import model_fingerprint, plan
from cosmo_rl.data.prepare.mini import safety_rows


@pytest.fixture
def files(tmp_path):
    rows = safety_rows("validation")[:6]
    return (runs.write_rows(tmp_path / "train" / "rows.jsonl", rows),
            runs.write_rows(tmp_path / "held" / "rows.jsonl", rows[:2]))


def load(path, stage=2, batch_tokens=16_384, **data):
    config = runs.config()
    config = replace(config, stage=stage, batch=replace(config.batch, max_tokens=batch_tokens),
                     data=replace(config.data, path=(str(path),), mix=(), **data))
    return plan(config, runs.policy_processor()).rows


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
