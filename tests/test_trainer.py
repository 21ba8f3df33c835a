"""Whole runs of a small Stage 2: killed and repeated, on 1 and 2 ranks, with gradients and engines that go wrong."""

# Methods of the trainer are replaced here, in the processes that the tests start.
# pyright: reportAttributeAccessIssue=false

import errno
import functools
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from cosmo_rl.cpgd import trainer, update
from cosmo_rl.cpgd.rollout import collect
from cosmo_rl.cpgd.rollout.hf import HFEngine
from cosmo_rl.cpgd.run.metrics import MetricsWriter, read_metrics
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.prepare.mini import general_rows, safety_rows
from cosmo_rl.model.parallel import rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def data(folder):
    """Options that name the rows of all runs here."""
    rows = runs.write_rows(folder / "data" / "rows.jsonl", runs.small_rows())
    held = runs.write_rows(folder / "held" / "rows.jsonl", runs.held_rows())
    return [*runs.from_file(rows), "--data.eval-path", held, "--eval.every", 4]


@pytest.fixture(scope="module")
def reference(folder, data):
    """An uninterrupted run of one process."""
    runs.train(runs.small(*data, "--run-dir", folder / "reference"), folder / "logs").check()
    return folder / "reference"


@pytest.fixture(scope="module")
def reference_of_two(folder, data):
    """An uninterrupted run of two processes."""
    runs.train(runs.small(*data, "--run-dir", folder / "two"), folder / "logs", ranks=2).check()
    return folder / "two"


def same_results(run: Path, other: Path) -> None:
    """Everything that a run leaves and that is not a time."""
    assert runs.lines_of(run) == runs.lines_of(other)
    left, right = run / "stage2", other / "stage2"
    for name in ("samples.jsonl", "evals.jsonl"):
        assert (left / name).read_bytes() == (right / name).read_bytes(), name
    assert read_metrics(left / "warnings.jsonl") == read_metrics(right / "warnings.jsonl")
    weights, others = (load_file(stage / "hf" / "model.safetensors") for stage in (left, right))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    reports = [json.loads((stage / "report.json").read_text()) for stage in (left, right)]
    for report in reports:
        del report["seconds"]
    assert reports[0] == reports[1]


def test_the_reference_trains(reference):
    """What the comparisons below rest on: gradients, moving weights, samples of each rollout, a whole folder."""
    lines = runs.lines_of(reference)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["iteration"] for line in lines] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert not any(line["skipped"] for line in lines)
    timed = read_metrics(reference / "stage2" / "metrics.jsonl")
    assert all(line["seconds"].keys() - line["tokens_per_second"].keys() <= {"data"} for line in timed)
    for line, after in zip(timed[::2], timed[1::2], strict=True):
        counts = {k: rate * line["seconds"][k] for k, rate in line["tokens_per_second"].items()}
        assert counts["update"] == pytest.approx(line["response_tokens"], rel=0.02)
        assert counts["rollout"] == pytest.approx(line["response_tokens"] + after["response_tokens"], rel=0.02)
        assert counts.keys() == {"rollout", "reward", "old_logprobs", "update"}
    assert sum(line["grad_norm"] > 0.05 for line in lines) >= 6
    assert all(line["drift"] == 0 for line in lines[::2]), "the ratio is 1 in a rollout's first update"
    assert sum(line["drift"] > 0 and line["loss"] != 0 for line in lines[1::2]) >= 3
    samples = read_metrics(reference / "stage2" / "samples.jsonl")
    assert [s["step"] for s in samples] == [step for step in (1, 3, 5, 7) for _ in range(8)]
    assert len({(s["step"], s["id"]) for s in samples}) == len(samples)
    assert [entry["step"] for entry in read_metrics(reference / "stage2" / "evals.jsonl")] == [4, 8]
    assert sorted(os.listdir(reference / "stage2" / "checkpoints")) == ["latest", "step-000006", "step-000008"]
    start, end = (load_file(path / "model.safetensors") for path in (runs.MODEL, reference / "stage2" / "hf"))
    assert max((start[name] - end[name]).abs().max() for name in start) > 1e-4
    assert any((reference / "stage2" / "tensorboard").iterdir())


MOMENTS = [
    # where, at how many lines of metrics, after the call instead of before it; steps of the checkpoints then there
    ("cosmo_rl.cpgd.rollout.hf:HFEngine._generate_batch", 0, True, []),  # while measuring before training
    ("cosmo_rl.cpgd.rollout.hf:HFEngine._generate_batch", 2, True, [2]),  # in a rollout
    ("cosmo_rl.cpgd.update:clip_grad_norm", 3, True, [2]),  # in an update, line 3 already written
    ("cosmo_rl.cpgd.run.checkpoint:_write_shards", 4, True, [2]),  # while a checkpoint is written
    ("cosmo_rl.cpgd.run.checkpoint:replace_file", 4, False, [2, 4]),  # it is there, `latest` does not name it yet
    ("cosmo_rl.data.sampler:PromptSampler.take", 6, False, [4, 6]),  # between two rollouts
    ("cosmo_rl.cpgd.trainer:save_pretrained", 8, False, [6, 8]),  # after the last step
    ("cosmo_rl.cpgd.run.measure:write_measured", 8, False, [6, 8]),  # hf/ is there, the report is not
]


def test_killed_at_any_moment(folder, data, reference):
    """One run, SIGKILLed eight times and always started again with the same command."""
    run = folder / "killed"
    stage, command = run / "stage2", runs.small(*data, "--run-dir", run)
    for target, lines, after, checkpoints in MOMENTS:
        kill = functools.partial(runs.kill_when, target, lines, stage / "metrics.jsonl", after)
        done = runs.train(command, folder / "logs", before=kill)
        assert done.code == -signal.SIGKILL, f"{target} was not reached: {done.code}\n{done.err[0]}"
        found = sorted(int(path.name[5:]) for path in (stage / "checkpoints").glob("step-*"))
        assert found == checkpoints, target
        half = [path.name for path in (stage / "checkpoints").glob(".tmp-*")]
        assert half == ([".tmp-000004"] if target.endswith("_write_shards") else []), target
        if not checkpoints:  # left by a try with another model, say; measured again while no checkpoint binds
            foreign = {"sampled": {"safe_rate": 0.123}, "greedy": {}, "shown": []}
            (stage / "before.json").write_text(json.dumps(foreign))
        if target.endswith("clip_grad_norm"):
            assert len(read_metrics(stage / "metrics.jsonl")) == 3, "a line beyond the checkpoint, to be cut back"
    runs.train(command, folder / "logs").check()
    same_results(run, reference)


def test_two_ranks_against_one(reference, reference_of_two):
    one, two = runs.lines_of(reference), runs.lines_of(reference_of_two)
    assert len(one) == len(two) == 8
    assert [line["response_tokens"] for line in one] == [line["response_tokens"] for line in two]
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    for left, right in zip(one, two, strict=True):
        assert abs(left["loss"] - right["loss"]) <= 1e-4 * (abs(left["loss"]) + 1e-2), left["step"]
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-3), left["step"]
        assert right["rewards"] == left["rewards"]
        assert right["sampler_z"] == pytest.approx(left["sampler_z"], abs=1e-3) and left["sampler_z"] != 0
        assert all(0 < line["engine_gap"]["mean"] < 1e-6 for line in (left, right))


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_launcher_killed(folder, data, reference_of_two):
    """Under torchrun the launcher alone, then both workers; finished by two ranks, and by one."""
    run = folder / "launched"
    stage, command = run / "stage2", runs.small(*data, "--run-dir", run)
    metrics = stage / "metrics.jsonl"
    count = lambda: metrics.read_text().count("\n") if metrics.exists() else 0

    launcher = runs.torchrun(command)
    runs.wait_until(lambda: count() >= 3 or launcher.poll() is not None, "step 3")
    workers = runs.children(launcher.pid)
    assert len(workers) == 2, launcher.communicate()[0]
    launcher.kill()
    launcher.wait()
    runs.wait_until(lambda: gone(workers), "the workers to die with their launcher", 10)
    assert not (stage / "report.json").exists()

    again = runs.start(command, folder / "logs", ranks=2)
    saving = lambda: count() >= 5 and (list((stage / "checkpoints").glob(".tmp-*")) or count() >= 7)
    runs.wait_until(lambda: saving() or again.processes[0].exitcode is not None, "a checkpoint")
    for process in again.processes:
        process.kill()
    assert set(again.wait().codes) == {-signal.SIGKILL}
    assert not (stage / "report.json").exists()

    other = folder / "launched-then-one"
    shutil.copytree(run, other)
    both = [runs.start(runs.small(*data, "--run-dir", path), folder / "logs", ranks=ranks)
            for path, ranks in ((run, 2), (other, 1))]
    for running in both:
        running.wait().check()
    same_results(run, reference_of_two)
    one, two = runs.lines_of(other), runs.lines_of(reference_of_two)
    assert [line["response_tokens"] for line in one] == [line["response_tokens"] for line in two]
    for left, right in zip(one, two, strict=True):
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)


def _note_images(path: str) -> None:
    """Each rank writes how many dummy images its micro-batches hold."""
    real = update.collate

    def noted(*args, **kwargs):
        batch = real(*args, **kwargs)
        with open(f"{path}-{rank()}", "a") as file:
            file.write(f"{batch.num_dummy_images}\n")
        return batch

    update.collate = noted


def test_one_rank_without_an_image(folder):
    """Long rows with an image, short ones without: in every update one of the two ranks sees text only."""
    images = [replace(row, domain="image") for row in safety_rows("validation")[:4]]
    texts = [replace(runs.text_only(row), domain="text") for row in general_rows("validation")[:120:30]]
    rows = runs.write_rows(folder / "mixed" / "rows.jsonl", [*images, *texts])
    args = runs.small("--data.path", rows, "--data.mix", "image=0.5", "text=0.5", "--run-dir", folder / "mixed" / "run",
                      "--steps", 2, "--rollout.prompts", 2, "--optim.updates-per-rollout", 1,
                      "--rollout.max-new-tokens", 4)
    note = functools.partial(_note_images, str(folder / "mixed" / "dummies"))
    runs.train(args, folder / "logs", ranks=2, before=note).check()
    dummies = [(folder / "mixed" / f"dummies-{number}").read_text().split() for number in (0, 1)]
    assert dummies == [["0", "0"], ["1", "1"]]
    assert len(runs.lines_of(folder / "mixed" / "run")) == 2


def _note_rest(path: str) -> None:
    """In the run's own process: when its engine is told to rest and given weights, and the steps."""
    def noted(word, found):
        with open(path, "a") as file:
            file.write(word + "\n")
        return found

    HFEngine.rest = lambda self: noted("rest", True)
    for owner, name, word in ((HFEngine, "sync", "sync"), (trainer, "optimizer_step", "step")):
        real = getattr(owner, name)
        setattr(owner, name, lambda *args, _real=real, _word=word: noted(_word, _real(*args)))


@pytest.mark.parametrize("stage", [0, 2])
def test_an_engine_rests_while_the_policy_is_trained(folder, stage):
    """One on the trainer's own GPU: its memory is free in every step, those of stage 0 too."""
    path = folder / f"rests{stage}"
    rows = [replace(row, chosen="<think>so</think>yes") for row in runs.small_rows()[:6]]
    args = runs.small(*runs.from_file(runs.write_rows(folder / "chosen" / "rows.jsonl", rows)), "--stage", stage,
                      "--steps", 4, "--optim.sft-batch", 4, "--run-dir", folder / f"rest{stage}")
    runs.train(args, folder / "logs", before=functools.partial(_note_rest, str(path))).check()
    asleep, words = False, path.read_text().split()
    assert words.count("step") == 4 and words[0] == "sync"
    for word in words:
        assert word != "step" or asleep, words
        asleep = word == "rest" or (asleep and word != "sync")


def _local(tensor):
    """This rank's part; a frozen tower is replicated, not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _poison(first: int) -> None:
    """From call `first` on, one element of one gradient on the last rank is NaN."""
    real, calls = update.clip_grad_norm, []

    def poisoned(policy, max_norm):
        calls.append(1)
        if len(calls) >= first and (rank() == 1):
            gradient = next(p.grad for p in policy.parameters() if p.grad is not None and _local(p.grad).numel())
            _local(gradient).view(-1)[0] = float("nan")
        before = [_local(p).clone() for p in policy.parameters()] if len(calls) >= first else []
        norm = real(policy, max_norm)
        policy.before_skip = before
        return norm

    update.clip_grad_norm = poisoned
    finish = trainer.Trainer._finish_step

    def checked(self, result, *args):
        if not result.finite:
            held = zip(self.policy.parameters(), self.policy.before_skip, strict=True)
            assert all(torch.equal(_local(p), old) for p, old in held), "the weights moved"
        finish(self, result, *args)

    trainer.Trainer._finish_step = checked


def test_gradients_that_are_not_finite(folder, data):
    """NaN on one of two ranks from step 4 on: both skip, the samples are named, the third skip stops the run."""
    run = folder / "nonfinite"
    args = runs.small(*data, "--run-dir", run, "--optim.max-nonfinite", 3)
    done = runs.train(args, folder / "logs", ranks=2, before=functools.partial(_poison, 4))
    assert done.codes == [1, 1], done.err
    message = "train.py: gradients were not finite in 3 steps in a row (--optim.max-nonfinite), the last at step 6"
    assert done.err[0].count(message) == 1 and "Traceback" not in "".join(done.err), done.err

    lines = runs.lines_of(run)
    assert [line["skipped"] for line in lines] == [False] * 3 + [True] * 3
    assert lines[3]["grad_norm"] is None
    named = read_metrics(run / "stage2" / "nonfinite.jsonl")
    assert [entry["step"] for entry in named] == [4, 5, 6]
    assert all(len(entry["samples"]) == 8 and all("#" in name for name in entry["samples"]) for entry in named)
    # The same command goes on from the checkpoint before (step 4, itself skipped), and cuts what came after it.
    # (hf/ may be in another dtype than it was asked for at first)
    done = runs.train([*args, "--model.export-dtype", "bfloat16"], folder / "logs", ranks=2).check()
    assert {tensor.dtype for tensor in load_file(run / "stage2" / "hf" / "model.safetensors").values()} == {
        torch.bfloat16}
    assert [err.count(f"saved to {run / 'stage2' / 'hf'}\n") for err in done.err] == [1, 0]
    assert [entry["step"] for entry in read_metrics(run / "stage2" / "nonfinite.jsonl")] == [4]
    assert [line["skipped"] for line in runs.lines_of(run)] == [False] * 3 + [True] + [False] * 4


def _spoil_engine() -> None:
    """One weight of the engine is off after every sync."""
    real = HFEngine.sync

    def spoiled(self, weights, version):
        real(self, weights, version)
        self.model.model.language_model.layers[0].mlp.down_proj.weight.data[3] += 2

    HFEngine.sync = spoiled


@pytest.mark.parametrize("updates", [1, 2])
def test_canary_stops_a_run(folder, data, updates):
    """Before the first line is written and the first checkpoint made, however many updates a rollout has."""
    args = runs.small(*data, "--run-dir", folder / f"canary{updates}", "--optim.updates-per-rollout", updates)
    done = runs.train(args, folder / "logs", before=_spoil_engine)
    assert done.code == 1
    assert done.err[0].count("train.py: engine and trainer disagree on") == 1 and "#" in done.err[0], done.err
    assert "Traceback" not in done.err[0] and not runs.lines_of(folder / f"canary{updates}"), "before the first line"


FAULTS = {
    # name: (class and method, the rank that fails, the error)
    "an image that one host lacks": (collect, "encode_prompt", 1, UserError("row x: its image is gone; restore it")),
    "logits": (HFEngine, "_generate_batch", 1, UserError("prompt x: weights give NaN; lower the learning rate")),
    "the main rank's disk": (MetricsWriter, "append", 0, OSError(errno.ENOSPC, "No space left on device", "metrics")),
}


def _fail_alone(name: str) -> None:
    owner, method, number, error = FAULTS[name]
    real = getattr(owner, method)

    def failing(*args, **kwargs):
        if rank() == number:
            raise error
        return real(*args, **kwargs)

    setattr(owner, method, failing)


@pytest.mark.parametrize("name", FAULTS)
def test_one_rank_fails_alone(folder, data, name):
    """The other one neither hangs nor dies of a broken connection: both end with the same message."""
    args = runs.small(*data, "--run-dir", folder / name.replace(" ", "-"), "--log.tensorboard", "False")
    done = runs.train(args, folder / "logs", ranks=2, before=functools.partial(_fail_alone, name))
    assert done.codes == [1, 1], done.err
    messages = [[line for line in err.splitlines() if line.startswith("train.py: ")] for err in done.err]
    assert len(messages[0]) == 1 and messages[0] == messages[1], done.err
    assert str(FAULTS[name][3].args[-1]) in messages[0][0]
    assert "Traceback" not in "".join(done.err), done.err


def test_a_run_that_learns_nothing_says_so(folder, data):
    """Responses of one token: no reward differs. Killed and repeated, it says what an uninterrupted run does."""
    whole, cut = (runs.small(*data, "--rollout.max-new-tokens", 1, "--run-dir", folder / name)
                  for name in ("nothing", "nothing-cut"))
    metrics = folder / "nothing-cut" / "stage2" / "metrics.jsonl"
    kill = functools.partial(runs.kill_when, "cosmo_rl.cpgd.update:clip_grad_norm", 5, metrics)
    both = [runs.start(whole, folder / "logs", ranks=2), runs.start(cut, folder / "logs", before=kill)]
    done, killed = (running.wait() for running in both)
    assert killed.code == -signal.SIGKILL
    said = [line for line in done.check().err[0].splitlines() if line.startswith("step ")]
    assert len(said) == 3 and done.err[1] == "", said
    assert said[0].startswith("step 1: all 4 groups of the rollout have equal rewards and advantage 0")
    assert said[1].startswith("step 1: 16 of 16 responses of the rollout were cut off at --rollout.max-new-tokens 1")
    assert said[2] == "step 4: the gradient was 0 in the last 4 steps: nothing is learnt"
    told = read_metrics(folder / "nothing" / "stage2" / "warnings.jsonl")
    assert [f"step {line['step']}: {line['warning']}" for line in told] == said
    again = runs.train(cut, folder / "logs").check()
    assert not [line for line in again.err[0].splitlines() if line.startswith("step ")], "said before"
    assert read_metrics(folder / "nothing-cut" / "stage2" / "warnings.jsonl") == told


def test_finished_stage(folder, data, reference):
    """The same command prints the table again, trains nothing and leaves all files as they are."""
    before = {path: path.stat().st_mtime_ns for path in (reference / "stage2").rglob("*")}
    done = runs.train(runs.small(*data, "--run-dir", reference), folder / "logs").check()
    assert "stage 2 is finished" in done.err[0] and "Unsafe rows refused" in done.out[0]
    assert "not done" not in done.err[0]
    assert {path: path.stat().st_mtime_ns for path in (reference / "stage2").rglob("*")} == before
    other = runs.small(*data, "--run-dir", reference, "--model.export-dtype", "bfloat16")
    done = runs.train(other, folder / "logs").check()
    assert ("not done, as the stage is finished: model.export_dtype 'float32' -> 'bfloat16'; remove "
            f"{reference / 'stage2' / 'report.json'} and repeat the command") in done.err[0]
    assert {path: path.stat().st_mtime_ns for path in (reference / "stage2").rglob("*")} == before


def test_embedded_data(folder):
    """Without --data.path: the tiny preset's own rows, and its table over all seven groups."""
    args = runs.small("--run-dir", folder / "embedded", "--steps", 2, "--eval.max-rows", 2)
    done = runs.train(args, folder / "logs").check()
    assert "Unseen attack: unsafe refused" in done.out[0]
    report = json.loads((folder / "embedded" / "stage2" / "report.json").read_text())
    assert report["before"].keys() == report["after_greedy"].keys() and len(report["before"]) == 9
    assert len(runs.lines_of(folder / "embedded")) == 2
