"""What a user gets wrong: one message that names the thing and the mend, exit code not 0, nothing lost, none hanging.

Each case is a process that runs train.py; the last ones are the plain interpreter and torchrun.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import runs
from conftest import ROOT
from PIL import Image

from cosmo_rl.cpgd.run.recipes import recipe
from cosmo_rl.cpgd.update import learning_rate
from cosmo_rl.data.prepare.mini import safety_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("command")


@pytest.fixture(scope="module")
def rows(folder):
    return runs.write_rows(folder / "data" / "rows.jsonl", runs.small_rows())


def stopped_run(folder, rows, run):
    """The command of a run that died at step 5 of 8, with checkpoints at steps 2 and 4."""
    metrics = run / "stage2" / "metrics.jsonl"
    model = run.parent / "model"
    shutil.copytree(runs.MODEL, model, dirs_exist_ok=True)
    command = runs.small(*runs.from_file(rows), "--run-dir", run, "--model.path", model)
    kill = functools.partial(runs.kill_when, "cosmo_rl.cpgd.update:clip_grad_norm", 5, metrics)
    assert runs.train(command, folder / "logs", before=kill).code == -9
    assert (run / "stage2" / "checkpoints" / "latest").read_text() == "step-000004\n"
    return command


@pytest.fixture(scope="module")
def stopped(folder, rows):
    return folder / "stopped", stopped_run(folder, rows, folder / "stopped")


@pytest.fixture(scope="module")
def whole(folder, stopped):
    """metrics.jsonl of the stopped run, gone on with to its end."""
    run = folder / "whole"
    shutil.copytree(stopped[0], run)
    runs.train([*stopped[1], "--run-dir", run], folder / "logs").check()
    return runs.lines_of(run)


def complaint(done) -> str:
    """The one message of a run that failed; what a run on rows of a user's says once it goes on is no part of it."""
    assert done.code not in (0, -9), done
    assert "Traceback" not in done.err[0], done.err[0]
    lines = [line for line in done.err[0].splitlines()
             if line.strip() and not line.startswith(("resumed at step", "WARNING: rewarded by word rules: "))]
    assert len(lines) == 1 and lines[0].startswith("train.py: "), done.err[0]
    return lines[0]


def bad_row(folder, name, **changes):
    """A data file whose second row is changed; `images` of it may be replaced as text."""
    path = runs.write_rows(folder / name / "rows.jsonl", safety_rows("validation")[:3])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[1] |= changes
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


CASES = {
    # name: (changes of the row, other options, what the message holds)
    "no image file": ({"images": ["nowhere.png"]}, [],
                      ["rows.jsonl:2: field `images[0]`", "nowhere.png does not exist", "correct the path"]),
    "corrupt image": ({"images": ["corrupt.png"]}, [],
                      ["rows.jsonl:2: field `images[0]`", "corrupt.png is corrupt or cut off", "replace it"]),
    "large image": ({"images": ["large.png"]}, ["--data.max-image-pixels", 10_000],
                    ["rows.jsonl:2", "large.png has 200 x 100 = 20000 pixels, more than 10000",
                     "--data.max-image-pixels"]),
    "unknown task": ({"task": "saftey"}, [],
                     ["rows.jsonl:2: field `task`: unknown task 'saftey'", "did you mean safety?"]),
    "long prompt": ({}, ["--data.max-prompt-tokens", 12],
                    ["prompt of", "is over the budget of 12; raise --data.max-prompt-tokens"]),
    "long sequence": ({}, ["--batch.max-tokens", 20],
                      ["a prompt of", "do not fit into --batch.max-tokens 20; raise it"]),
    "missing model": ({}, ["--model.path", "/nowhere/model"],
                      ["model folder /nowhere/model does not exist", "--model.path"]),
    "no rule for the task": ({"task": "value", "answer": None}, [],
                             ["there is no reward rule for task value without `answer`", "--reward.task-aware 0"]),
    "unknown domain": ({}, ["--data.mix", "safty=1"], ["--data.mix names domain 'safty', which no row has"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_data_and_settings(folder, name):
    changes, options, wanted = CASES[name]
    place = name.replace(" ", "-")
    path = bad_row(folder, place, **changes)
    Image.new("RGB", (200, 100)).save(path.parent / "large.png")
    (path.parent / "corrupt.png").write_bytes((path.parent / "large.png").read_bytes()[:60])
    done = runs.train(runs.small(*runs.from_file(path), "--run-dir", folder / place / "run", *options), folder / "logs")
    message = complaint(done)
    assert all(words in message for words in wanted), message


def test_the_mended_command_runs(folder):
    """The stage's folder is there already, with the settings of the failed try."""
    path = bad_row(folder, "mended")
    command = runs.small(*runs.from_file(path), "--run-dir", folder / "mended" / "run", "--steps", 2)
    complaint(runs.train([*command, "--data.max-prompt-tokens", 12], folder / "logs"))
    runs.train(command, folder / "logs").check()


def test_empty_data(folder):
    empty = folder / "empty.jsonl"
    empty.write_text("\n")
    done = runs.train(runs.small(*runs.from_file(empty), "--run-dir", folder / "empty"), folder / "logs")
    assert "empty.jsonl: there are no rows in it; add rows" in complaint(done)


@pytest.mark.parametrize("args, wanted", [
    (["--objective.drift-coeff", 0.1], ["--objective.drift-coeff", "--objective.drift-coef"]),
    (["--preset", "8b"], ["unknown preset '8b'; choose one of tiny, 3b, 7b, 72b"]),
    (["--stage", 3], ["unknown stage 3; choose 0 "]),
    (["--steps", 0], ["--steps is 0; give at least 1"]),
    (["--objective.name", "dpo"], ["dpo", "cpgd"]),
    (["--optim.updates-per-rollout", 5], ["--optim.updates-per-rollout is 5 and --rollout.prompts is 4"]),
    (["--preset", "7b", "--data.path", "rows.jsonl"], ["preset 7b has no weights of its own", "with --model.path"]),
])
def test_bad_options(folder, args, wanted):
    """tyro frames its messages, so they span lines; the others are one line."""
    run = folder / "options"
    shutil.rmtree(run, ignore_errors=True)
    done = runs.train(runs.small("--run-dir", run, *args), folder / "logs")
    assert done.code not in (0, -9) and "Traceback" not in done.err[0] and not done.out[0].strip(), done
    message = " ".join(done.err[0].replace("\u2502", " ").split())
    assert all(words in message for words in wanted), message


def test_run_directory_that_cannot_be_written(folder, rows):
    (folder / "file").write_text("")  # root may write everywhere, but not below a file
    done = runs.train(runs.small(*runs.from_file(rows), "--run-dir", folder / "file" / "run"), folder / "logs")
    message = complaint(done)
    assert f"cannot write to run directory {folder}/file/run: Not a directory; make it writable or give" in message


def test_other_settings(folder, stopped):
    run, command = stopped
    before = sorted(run.rglob("*"))
    message = complaint(runs.train([*command, "--objective.drift-coef", 0.5, "--seed", 3], folder / "logs"))
    assert "belongs to a run with other settings" in message and "or remove the folder" in message
    assert "objective.drift_coef is 0.01 there and 0.5 here; seed is 0 there and 3 here" in message
    message = complaint(runs.train([*command, "--resume", "never"], folder / "logs"))
    assert "--resume never" in message and "is not empty" in message
    assert sorted(run.rglob("*")) == before


def test_settings_that_may_change(folder, stopped):
    """What an error has told to raise, sizes of batches, and steps: the run goes on with them, and keeps them."""
    run = folder / "changed"
    shutil.copytree(stopped[0], run)
    command = [*stopped[1], "--run-dir", run]
    saved = run / "stage2" / "config.json"
    before = saved.read_text()
    message = complaint(runs.train([*command, "--steps", 3], folder / "logs"))
    assert "--steps is 3, and step 4 is done in" in message and "give at least 4, or another --run-dir" in message
    assert saved.read_text() == before, "a refused try changes nothing"
    options = ["--steps", 10, "--rollout.batch-size", 4, "--batch.max-tokens", 200, "--reward.failure-budget", 0.5,
               "--checkpoint.keep", 1, "--log.samples", 2]
    done = runs.train([*command, *options], folder / "logs").check()
    (said,) = [line for line in done.err[0].splitlines() if line.startswith("settings changed since the last start: ")]
    assert said.endswith("batch.max_tokens 16384 -> 200, checkpoint.keep 2 -> 1, log.samples 8 -> 2, "
                         "reward.failure_budget 0.1 -> 0.5, rollout.batch_size 8 -> 4, steps 8 -> 10; the learning "
                         "rate now falls to step 10")
    settings = json.loads(saved.read_text())
    assert (settings["steps"], settings["rollout"]["batch_size"], settings["seed"]) == (10, 4, 0)
    assert os.listdir(run / "stage2" / "checkpoints") and len(runs.lines_of(run)) == 10
    assert len(list((run / "stage2" / "checkpoints").glob("step-*"))) == 1
    assert json.loads((run / "stage2" / "report.json").read_text())["steps"] == 10
    assert runs.lines_of(run)[:4] == runs.lines_of(stopped[0])[:4], "what was done stays"
    rates = [line["lr"] for line in runs.lines_of(run)]
    optim = replace(recipe("tiny", 2).optim, learning_rate=5e-4)
    assert rates == [learning_rate(i, 8 if i < 4 else 10, optim) for i in range(10)]


def test_settings_that_leave_every_bit_alone(folder, stopped, whole):
    """Checkpoints, logging and budgets: the same metrics as without."""
    run = folder / "logged"
    shutil.copytree(stopped[0], run)
    options = ["--checkpoint.every", 1, "--checkpoint.keep", 3, "--log.samples", 1, "--log.tensorboard", "False",
               "--reward.failure-budget", 1, "--optim.max-nonfinite", 9, "--rollout.canary-limit", 9]
    runs.train([*stopped[1], "--run-dir", run, *options], folder / "logs").check()
    assert runs.lines_of(run) == whole


def test_half_written_checkpoint(folder, stopped, whole):
    run = folder / "half"
    shutil.copytree(stopped[0], run)
    command = [*stopped[1], "--run-dir", run]
    (shard,) = (run / "stage2" / "checkpoints" / "step-000004").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:5000])
    done = runs.train(command, folder / "logs").check()
    assert f"{shard} is damaged; set aside as" in done.err[0], done.err[0]
    assert f"CONTINUING FROM {shard.parent.with_name('step-000002')} INSTEAD" in done.err[0]
    assert "resumed at step 2" in done.err[0]
    assert (run / "stage2" / "checkpoints" / "damaged-000004").is_dir()
    assert runs.lines_of(run) == whole, "as if it had been stopped there"


def test_changed_data(folder, rows, stopped):
    """The rows of a stopped run must be the same when it goes on."""
    content = rows.read_text()
    try:
        rows.write_text(content.replace('"licence": "MIT"', '"licence": "MIT-0"'))
        message = complaint(runs.train(stopped[1], folder / "logs"))
    finally:
        rows.write_text(content)
    assert "the data changed" in message and "restore the data or give another --run-dir" in message


def test_changed_model_folder(folder, stopped):
    """The weights come from the checkpoint, the rest from the folder: test_sources.py changes each file of it."""
    path = folder / "model" / "tokenizer.json"
    content = path.read_text()
    try:
        path.write_text(content + "\n")
        message = complaint(runs.train(stopped[1], folder / "logs"))
    finally:
        path.write_text(content)
    assert f"the model folder changed: the checkpoint in {stopped[0]}" in message
    assert path.name in message and f"of {path.parent} now have" in message
    assert "restore them or give another" in message


@pytest.fixture
def little_disk(folder):
    """A mounted disk of 100 MB."""
    place = folder / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(place)]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no right to mount a small disk ({made.stderr.strip()})")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_full_disk_while_saving(folder, stopped, little_disk):
    run = little_disk / "run"
    shutil.copytree(stopped[0], run)
    free = shutil.disk_usage(little_disk).free
    (little_disk / "filler").write_bytes(b"\0" * (free - 8_000_000))  # a checkpoint takes twice that
    command = [*stopped[1], "--run-dir", run]
    message = complaint(runs.train(command, folder / "logs"))
    assert "cannot write checkpoint" in message and "step-000006: No space left on device" in message
    assert "earlier checkpoints are kept" in message
    assert sorted(os.listdir(run / "stage2" / "checkpoints")) == ["latest", "step-000002", "step-000004"]

    free = shutil.disk_usage(little_disk).free
    with (little_disk / "filler").open("ab") as file:  # now not even a line fits
        file.write(b"\0" * (free - 65_536))
    message = complaint(runs.train(command, folder / "logs"))
    assert "cannot write" in message and "No space left on device" in message and "repeat the command" in message

    (little_disk / "filler").unlink()  # the mend works
    runs.train(command, folder / "logs").check()
    assert len(runs.lines_of(run)) == 8


def test_plain_python(folder):
    """Not forked: the interpreter itself, from another folder."""
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--preset", "huge"], capture_output=True, text=True,
                          cwd=folder, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "train.py: unknown preset 'huge'; choose one of tiny, 3b, 7b, 72b\n"


def test_two_ranks_complain_once(folder):
    done = runs.train(runs.small("--no-such-option", 1), folder / "logs", ranks=2)
    assert 0 not in done.codes and done.err[0].count("no-such-option") == 1 and done.err[1] == done.out[1] == ""


def test_under_torchrun(folder):
    """One message for all ranks, no rank is left, and the message is what torchrun ends with."""
    path = runs.write_rows(folder / "torchrun" / "rows.jsonl", safety_rows("validation")[:3])
    launcher = runs.torchrun(runs.small(*runs.from_file(path), "--run-dir", folder / "torchrun" / "run",
                                        "--data.max-prompt-tokens", 12))
    try:
        output, _ = launcher.communicate(timeout=runs.LIMIT_S)
    finally:
        launcher.kill()
    assert launcher.returncode == 1
    assert "Traceback" not in output.split("ChildFailedError")[0].split("elastic")[0], output
    *_, last, border = output.splitlines()
    assert set(border) == {"="}, output
    assert last.startswith("  traceback : train.py: row ") and "is over the budget of 12; raise --data.max-" in last
    assert sum(line.startswith("train.py: row ") for line in output.splitlines()) == 1, output
