import json
import os
import pickle
import random
import re
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

from cosmo_rl.cpgd.config import EvalConfig
from cosmo_rl.cpgd.run import checkpoint
from cosmo_rl.cpgd.run.checkpoint import check_state, load_latest, restore, save
from cosmo_rl.cpgd.run.guard import Guard
from cosmo_rl.cpgd.run.watch import Watch
from cosmo_rl.data import disk
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.sampler import PromptSampler

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STATE = {"sampler": {"epoch": 1, "cursor": 7, "carry": [0.1, 0.2]}, "trained_s": 0.1 + 0.2}


class Net(nn.Module):
    """Tied embedding and head, a frozen part, a buffer, a bias of one element (an empty shard on the second rank)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.score = nn.Linear(width, 1)
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.embed(x))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x).square().mean() + self.score(x).mean()


def make(width: int = 8, sharded: bool = False) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net(width)
    if sharded:
        for layer in net.layers:
            fully_shard(layer)
        fully_shard(net, ignored_params=set(net.frozen.parameters()))
    return net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)


def train(net: Net, optimizer: torch.optim.Optimizer, steps: int, noisy: bool = False) -> list[float]:
    """Losses; `noisy` draws the batch from torch's, numpy's and Python's global generators."""
    losses = []
    for _ in range(steps):
        x = torch.arange(6)
        if noisy:
            x = (torch.randint(10, (6,)) + int(np.random.randint(10)) + random.randrange(10)) % 10
        loss = net(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def full(net: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for name, value in net.state_dict().items()
    }


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@contextmanager
def disk_full_after(num_bytes: int):
    """Writes beyond `num_bytes` in any file fail as the kernel makes them fail."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_four_steps_are_two_and_two(tmp_path):
    net, optimizer = make()  # conftest has seeded the generators
    expected = train(net, optimizer, 4, noisy=True)

    random.seed(0)
    np.random.seed(0)
    first, first_optimizer = make()
    losses = train(first, first_optimizer, 2, noisy=True)
    path = save(tmp_path, 2, first, first_optimizer, STATE, keep=2)
    assert path.name == "step-000002"
    assert (tmp_path / "latest").read_text() == "step-000002\n"
    random.seed(99)
    np.random.seed(99)
    second, second_optimizer = make()
    train(second, second_optimizer, 1, noisy=True)
    assert load_latest(tmp_path, second, second_optimizer) == {**STATE, "step": 2}
    losses += train(second, second_optimizer, 2, noisy=True)
    assert losses == expected
    assert_equal(full(second), full(net))
    assert second.head.weight is second.embed.weight


def test_nothing_yet(tmp_path):
    net, optimizer = make()
    assert load_latest(tmp_path / "checkpoints", net, optimizer) is None


def test_optimizer_without_a_step_stays_fresh(tmp_path):
    """All steps so far were skipped: AdamW must not come back one step older."""
    net, optimizer = make()
    save(tmp_path, 3, net, optimizer, {}, keep=1)
    other, other_optimizer = make()
    train(other, other_optimizer, 1)
    load_latest(tmp_path, other, other_optimizer)
    assert not other_optimizer.state
    assert train(other, other_optimizer, 2) == train(net, optimizer, 2)


def test_keeps_the_newest(tmp_path):
    net, optimizer = make()
    for step in (1, 2, 3):
        save(tmp_path, step, net, optimizer, {}, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000002", "step-000003"]
    stamp = (tmp_path / "step-000003" / "state.json").stat().st_mtime_ns
    save(tmp_path, 3, net, optimizer, {}, keep=2)  # the latest is never taken apart
    assert (tmp_path / "step-000003" / "state.json").stat().st_mtime_ns == stamp
    (tmp_path / "latest").write_text("step-000002\n")  # a user goes back
    save(tmp_path, 3, net, optimizer, {"again": 1}, keep=2)
    state = load_latest(tmp_path, net, optimizer)
    assert state == {"again": 1, "step": 3}


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.mark.parametrize("module, name, after", [
    (checkpoint, "dcp_save", False),
    (checkpoint, "dcp_save", True),
    (checkpoint, "_commit", False),
    (disk, "fsync", False),
    (Path, "replace", False),
    (Path, "replace", True),
    (checkpoint, "replace_file", False),
    (checkpoint, "replace_file", True),
    (shutil, "rmtree", False),
])
def test_killed_while_saving(tmp_path, monkeypatch, module, name, after):
    """The run then continues from step 2 or from step 4, never from a mixture, and saves again."""
    net, optimizer = make()
    expected = {}
    for step in (2, 4):
        train(net, optimizer, 2)
        expected[step] = full(net)
        if step == 2:
            save(tmp_path, 2, net, optimizer, {}, keep=1)
    real = getattr(module, name)

    def killed(*args, **kwargs):
        if after:
            real(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(module, name, killed)
    with pytest.raises(Killed):
        save(tmp_path, 4, net, optimizer, {}, keep=1)
    monkeypatch.undo()

    again, again_optimizer = make()
    state = load_latest(tmp_path, again, again_optimizer)
    assert state is not None
    # Only once `latest` is written does the new one count.
    assert state["step"] == (4 if name == "rmtree" or (name == "replace_file" and after) else 2)
    assert_equal(full(again), expected[state["step"]])
    train(again, again_optimizer, 4 - state["step"])
    assert_equal(full(again), expected[4])
    save(tmp_path, 4, again, again_optimizer, {}, keep=1)
    save(tmp_path, 6, again, again_optimizer, {}, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000006"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize("file, harm", [
    (SHARD, _cut), (SHARD, _flip), (SHARD, Path.unlink),
    ("state.json", _cut), ("state.json", _flip), ("state.json", Path.unlink),
    ("manifest.json", _cut), ("manifest.json", Path.unlink),
])
def test_a_damaged_one_is_set_aside_for_the_one_before(tmp_path, file, harm, caplog):
    """The run goes on without anybody's choice, and says so; nothing that could be mended is lost."""
    net, optimizer = make()
    save(tmp_path, 1, net, optimizer, {"mark": "first"}, keep=2)
    first = full(net)
    train(net, optimizer, 1)
    save(tmp_path, 2, net, optimizer, {"mark": "second"}, keep=2)
    harm(tmp_path / "step-000002" / file)
    assert load_latest(tmp_path, net, optimizer) == {"mark": "first", "step": 1}
    assert_equal(full(net), first)
    said = "\n".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert re.search(rf"step-000002/{re.escape(file)} is (missing|damaged).*; set aside as .*/damaged-000002\n", said)
    assert f"CONTINUING FROM {tmp_path / 'step-000001'} INSTEAD" in said

    save(tmp_path, 2, net, optimizer, {"mark": "again"}, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["damaged-000002", "latest", "step-000002"]
    caplog.clear()
    assert load_latest(tmp_path, net, optimizer) == {"mark": "again", "step": 2}
    assert "CONTINUING" not in caplog.text

    harm(tmp_path / "step-000002" / file)  # now the only one
    with pytest.raises(UserError, match=rf"no whole checkpoint is left: .*step-000002/{file} is (missing|damaged).*: "
                                        rf"restore it, or remove {tmp_path.parent}"):
        load_latest(tmp_path, net, optimizer)
    assert (tmp_path / "step-000002").exists(), "not set aside: there is nothing to go on from"


def _rewritten(path: Path, **changes) -> None:
    """A state.json of another content, with the manifest made to agree: as by hand, or by another version."""
    state = json.loads((path / "state.json").read_text()) | changes
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | checkpoint._checksums([path / "state.json"])))


HOSTILE = {
    "{}": ("manifest.json is damaged: it does not list", lambda path: (path / "manifest.json").write_text("{}")),
    "null": ("manifest.json is damaged: it does not list", lambda path: (path / "manifest.json").write_text("null")),
    "list": ("manifest.json is damaged: it does not list",
             lambda path: (path / "manifest.json").write_text('["state.json", "a.safetensors"]')),
    "deep": ("manifest.json is damaged: maximum recursion",
             lambda path: (path / "manifest.json").write_text("[" * 100_000)),
    "latin": ("manifest.json is damaged: 'utf-8'", lambda path: (path / "manifest.json").write_bytes(b'{"\xe9": 1}')),
    "entry": ("state.json is damaged", lambda path: _relisted(path, **{"state.json": "fine"})),
    "no_state": ("does not list state.json", lambda path: (path / "manifest.json").write_text(
        json.dumps(checkpoint._checksums([path / SHARD])))),
    "outside": ("it lists '../state.json', which is no file", lambda path: _relisted(path, **{"../state.json": {}})),
    "absolute": ("it lists '/etc/x.safetensors', which", lambda path: _relisted(path, **{"/etc/x.safetensors": {}})),
    "extra": ("another.safetensors is not listed",
              lambda path: shutil.copy(path / SHARD, path / "another.safetensors")),
    "link": ("x.safetensors is not listed", lambda path: (path / "x.safetensors").symlink_to(path / SHARD)),
    "folder": (f"{SHARD} is damaged", lambda path: ((path / SHARD).unlink(), (path / SHARD).mkdir())),
    "state_null": ("`state` is NoneType, not dict", lambda path: _rewritten(path, state=None)),
    "step_text": ("`step` is str, not int", lambda path: _rewritten(path, step="2")),
    "step_true": ("`step` is bool, not int", lambda path: _rewritten(path, step=True)),
    "step_other": ("its step is 7", lambda path: _rewritten(path, step=7)),
    "rng_object": ("`rng` is dict, not list", lambda path: _rewritten(path, rng={})),
    "counts": ("`optimizer_steps` are no counts", lambda path: _rewritten(path, optimizer_steps={"embed.weight": "1"})),
    "nan": ("`optimizer_steps` are no counts",
            lambda path: _rewritten(path, optimizer_steps={"embed.weight": float("nan")})),
}


def _relisted(path: Path, **entries) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | entries))


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_content_is_damage(tmp_path, case):
    net, optimizer = make()
    path = save(tmp_path, 2, net, optimizer, {}, keep=1)
    message, harm = HOSTILE[case]
    harm(path)
    with pytest.raises(UserError, match=f"no whole checkpoint is left: .*{re.escape(message)}"):
        load_latest(tmp_path, net, optimizer)


@pytest.mark.parametrize("rng", [
    [{}], [None], ["text"], [{"torch": "*", "cuda": None, "numpy": [], "python": []}],
    [{"torch": "AAAA", "cuda": None, "numpy": ["MT19937", [1], 0, 0, 0.0], "python": [3, [], None]}],
])
def test_a_generator_state_that_is_none(tmp_path, rng):
    net, optimizer = make()
    _rewritten(save(tmp_path, 2, net, optimizer, {}, keep=1), rng=rng)
    with pytest.raises(UserError, match=r"step-000002/state\.json is damaged: the generators refuse its `rng`"):
        load_latest(tmp_path, net, optimizer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["weight", "moment"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value, what):
    """With keep=1 they would replace the last good ones."""
    net, optimizer = make()
    train(net, optimizer, 1)
    net.frozen.weight.data[0, 0] = float("nan")  # as it came: no fault of the training
    save(tmp_path, 1, net, optimizer, {}, keep=1)
    broken: Any = net.layers[1].weight
    (broken.data if what == "weight" else optimizer.state[broken]["exp_avg_sq"])[2, 3] = value
    name = {"weight": "model", "moment": "exp_avg_sq"}[what]
    with pytest.raises(UserError, match=rf"^{name}\.layers\.1\.weight is not finite after step 2: .*--optim\.l"):
        save(tmp_path, 2, net, optimizer, {}, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000001"]
    assert load_latest(tmp_path, net, optimizer) == {"step": 1}


def test_weights_that_are_not_finite_are_not_loaded(tmp_path, monkeypatch):
    """Of a version that still saved them."""
    net, optimizer = make()
    net.score.bias.data[0] = float("nan")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_not_finite", lambda *_: None)
        save(tmp_path, 1, net, optimizer, {}, keep=1)
    with pytest.raises(UserError, match=r"^model\.score\.bias in .*step-000001 is not finite: restore it, or remove"):
        load_latest(tmp_path, net, optimizer)


def test_what_else_may_lie_among_the_checkpoints(tmp_path):
    """Links, and files where folders are expected: what a link leads to is never removed."""
    net, optimizer = make()
    folder, away = tmp_path / "checkpoints", tmp_path / "away"
    save(away, 1, net, optimizer, {"mark": 1}, keep=1)
    folder.mkdir()
    (folder / "step-000001").symlink_to(away / "step-000001")
    (folder / ".tmp-000009").symlink_to(away)
    (folder / "step-000007").write_text("a file")
    (folder / f"step-{'9' * 5000}"[:250]).mkdir()
    assert load_latest(folder, net, optimizer) == {"mark": 1, "step": 1}, "moved to another disk"
    save(folder, 2, net, optimizer, {"mark": 2}, keep=1)
    assert not (folder / "step-000001").is_symlink() and (away / "step-000001" / SHARD).exists()
    assert load_latest(folder, net, optimizer) == {"mark": 2, "step": 2}


@pytest.mark.parametrize("content", [
    "step-000009", "../step-000001", "", "step-000001/..", "/", "step-000001\nstep-000001", "\0", "\x1b[31m",
    "step-" + "9" * 5000, "step-\u0661\u0661\u0661\u0661\u0661\u0661", b"\xff\xfe", Path.mkdir, os.mkfifo,
    lambda path: path.symlink_to("nowhere"),
])
def test_latest_names_a_missing_checkpoint(tmp_path, content):
    """Nobody knows what its writer wanted, so it is an error, with a command to go on by."""
    net, optimizer = make()
    path, pointer = save(tmp_path, 1, net, optimizer, {}, keep=1), tmp_path / "latest"
    pointer.unlink()
    if callable(content):
        content(pointer)
    else:
        pointer.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"latest names .*which is not there: restore it, or continue from step-000001: "
                                        rf"echo step-000001 > {pointer}$") as caught:
        load_latest(tmp_path, net, optimizer)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700
    shutil.rmtree(path)
    with pytest.raises(UserError, match="to start the stage again"):
        load_latest(tmp_path, net, optimizer)


def test_an_unreadable_file_is_no_damage(tmp_path, monkeypatch):
    """A disk that is away for an hour must not cost the steps since the checkpoint before."""
    net, optimizer = make()
    for step in (1, 2):
        save(tmp_path, step, net, optimizer, {}, keep=2)

    def denied(paths):
        raise PermissionError(13, "Permission denied", str(paths[0]))

    monkeypatch.setattr(checkpoint, "_checksums", denied)
    with pytest.raises(UserError, match=r"^cannot read .*step-000002/.*: Permission denied; make it readable, or "
                                        r"restore it, or continue from step-000001: echo"):
        load_latest(tmp_path, net, optimizer)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000001", "step-000002"]


def test_another_model_does_not_fit(tmp_path):
    save(tmp_path, 1, *make(), {}, keep=1)
    with pytest.raises(ValueError, match=r"step-000001 does not fit this model: .*--model\.path"):
        load_latest(tmp_path, *make(width=6))
    net, optimizer = make()
    train(net, optimizer, 1)
    save(tmp_path, 2, net, optimizer, {}, keep=1)
    frozen, frozen_optimizer = make()
    frozen.score.requires_grad_(False)
    with pytest.raises(ValueError, match=r"it has no trained parameter score\.bias"):
        load_latest(tmp_path, frozen, frozen_optimizer)


class Trap:
    def __reduce__(self):
        return (os.mkdir, (os.environ["TRAP"],))


def test_no_pickle_is_written_or_read(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    net, optimizer = make()
    path = save(tmp_path, 1, net, optimizer, {}, keep=1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    for name in (".metadata", "__0_0.distcp", "optimizer.pt"):
        (path / name).write_bytes(pickle.dumps(Trap()))
    load_latest(tmp_path, net, optimizer)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("num_bytes", [1000, 6000])  # the shard fails, or state.json after it
def test_disk_full_keeps_the_earlier_one(tmp_path, num_bytes):
    net, optimizer = make()
    save(tmp_path, 1, net, optimizer, {"mark": 1}, keep=1)
    complaint = r"cannot write checkpoint .*step-000002.*MB free.*kept"
    with disk_full_after(num_bytes), pytest.raises(ValueError, match=complaint):
        save(tmp_path, 2, net, optimizer, {"mark": 2, "text": "x" * 6000}, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000001"]
    assert load_latest(tmp_path, net, optimizer) == {"mark": 1, "step": 1}


def _two_ranks(rank: int, folder: str, expected: dict[str, torch.Tensor]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net, optimizer = make(sharded=True)
    state = load_latest(f"{folder}/one", net, optimizer)
    assert state == {**STATE, "step": 2}
    assert_equal(full(net), expected)
    train(net, optimizer, 2)
    with torch.no_grad():
        net(torch.arange(6))  # leaves the root's parameters gathered
    save(f"{folder}/two", 4, net, optimizer, STATE, keep=1)

    # One rank cannot write: both hear of it, and the checkpoint before stays.
    message = ""
    with disk_full_after(1000 if rank == 1 else 1 << 40):
        try:
            save(f"{folder}/two", 5, net, optimizer, STATE, keep=1)
        except ValueError as error:
            message = str(error)
    assert "cannot write checkpoint" in message and "step-000005" in message, message
    dist.barrier()
    assert sorted(os.listdir(f"{folder}/two")) == ["latest", "step-000004"]

    # Weights of one rank's part are not finite: both hear of it.
    kept = full(net)
    bias: Any = net.score.bias.data  # one element, on the first rank
    if rank == 0:
        bias.to_local().fill_(float("nan"))
    try:
        save(f"{folder}/two", 5, net, optimizer, STATE, keep=1)
    except UserError as error:
        message = str(error)
    assert message.startswith("model.score.bias is not finite after step 5"), message
    load_latest(f"{folder}/two", net, optimizer)

    # Damage that one rank sees, in its share of the files: both go back to the same one.
    save(f"{folder}/two", 6, net, optimizer, STATE, keep=2)
    if rank == 0:
        _flip(sorted(Path(f"{folder}/two/step-000006").glob("*.safetensors"))[1])
    dist.barrier()
    train(net, optimizer, 1)
    assert load_latest(f"{folder}/two", net, optimizer) == {**STATE, "step": 4}
    assert_equal(full(net), kept)
    assert sorted(os.listdir(f"{folder}/two")) == ["damaged-000006", "latest", "step-000004"]
    dist.destroy_process_group()


def test_one_rank_to_two_and_back(tmp_path):
    net, optimizer = make()
    train(net, optimizer, 2)
    save(tmp_path / "one", 2, net, optimizer, STATE, keep=1)
    mp.spawn(_two_ranks, (str(tmp_path), full(net)), nprocs=2)

    shards = sorted(path.name for path in (tmp_path / "two" / "step-000004").glob("*.safetensors"))
    assert [name[:11] for name in shards] == ["shard-00001", "shard-00002"]
    saved = json.loads((tmp_path / "two" / "step-000004" / "state.json").read_text())
    assert len(saved["rng"]) == 2 and set(saved["optimizer_steps"].values()) == {4.0}
    back, back_optimizer = make()
    load_latest(tmp_path / "two", back, back_optimizer)
    train(net, optimizer, 2)
    for name, value in full(back).items():
        torch.testing.assert_close(value, full(net)[name], rtol=1e-6, atol=1e-7, msg=name)
    for parameter, other in zip(net.parameters(), back.parameters(), strict=True):
        if parameter.requires_grad:
            mine, theirs = optimizer.state[parameter], back_optimizer.state[other]
            for moment in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(theirs[moment], mine[moment], rtol=1e-5, atol=1e-9)


def trained() -> tuple[dict, dict]:
    """A trainer's state, and the parts in it."""
    parts = {"sampler": PromptSampler(["a"], {"a": 1.0}, 0), "guard": Guard(EvalConfig()), "watch": Watch()}
    return {"step": 4, "iteration": 1, "skipped_in_row": 0, "trained_s": 0.5, "rows_fingerprint": "a",
            "model_fingerprint": "b", **{name: part.state_dict() for name, part in parts.items()}}, parts


@pytest.mark.parametrize(("changes", "message"), [
    ({}, ""), ({"guard": None, "watch": None, "trained_s": 1}, ""),
    ({"iteration": None}, "is without iteration as this"),
    ({"sampler": [], "rows_fingerprint": 3}, "is without sampler, rows_fingerprint as this"),
    ({"guard": "warn"}, "is without guard as"), ({"watch": [1]}, "is without watch as"),
    ({"trained_s": "1"}, "is without trained_s as"), ({"model_fingerprint": {}}, "is without model_fingerprint as"),
    ({"fingerprint": "c", "rows_fingerprint": None}, "is without rows_fingerprint as this"),  # of an older version
    ({"rows_fingerprint": "c"}, "^the data changed: .* with fingerprint c, the rows now have a; restore the data"),
    ({"model_fingerprint": "c"}, "^the model folder changed: .* with fingerprint c, x of y now have b; restore them"),
    ({"step": 5}, "^--steps is 4, and step 5 is done in .*; give at least 5, or another --run-dir$"),
])
def test_what_a_state_must_hold(tmp_path, changes, message):
    state, _ = trained()
    check = lambda: check_state(state | changes, tmp_path, steps=4, fingerprint="a", model_fingerprint="b",
                                model_files="x of y")
    if not message:
        return check()
    with pytest.raises(UserError, match=message):
        check()


@pytest.mark.parametrize(("changes", "named"), [
    ({"sampler": {}}, "sampler"), ({"sampler": {"cursor": {"a": None}, "epoch": {"a": 0}}}, "sampler"),
    ({"guard": {}}, "guard"), ({"watch": {}}, "watch"), ({"watch": {"on": 5}}, "watch")])
def test_parts_of_a_state_of_another_shape_are_named(tmp_path, changes, named):
    """As by another version: they are looked into where they are taken."""
    state, parts = trained()
    restore(state, tmp_path, **parts)
    with pytest.raises(UserError, match=rf"^state\.json of the checkpoint in {tmp_path} is without {named} as this"):
        restore(state | changes, tmp_path, **parts)
