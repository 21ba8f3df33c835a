import json
import os
import pickle
import random
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

from cosmo_rl.cpgd import checkpoint
from cosmo_rl.cpgd.checkpoint import load_latest, save

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
    (checkpoint, "fsync", False),
    (Path, "rename", False),
    (Path, "rename", True),
    (checkpoint, "write_atomic", False),
    (checkpoint, "write_atomic", True),
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
    assert state["step"] == (4 if name == "rmtree" or (name == "write_atomic" and after) else 2)
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
def test_damage_names_the_file_and_the_mend(tmp_path, file, harm):
    net, optimizer = make()
    save(tmp_path, 1, net, optimizer, {"mark": "first"}, keep=2)
    save(tmp_path, 2, net, optimizer, {"mark": "second"}, keep=2)
    harm(tmp_path / "step-000002" / file)
    mend = "restore it, or continue from step-000001"
    with pytest.raises(ValueError, match=rf"step-000002/{file} is (missing|damaged): {mend}"):
        load_latest(tmp_path, net, optimizer)
    (tmp_path / "latest").write_text("step-000001")
    state = load_latest(tmp_path, net, optimizer)
    assert state == {"mark": "first", "step": 1}


def test_latest_names_a_missing_checkpoint(tmp_path):
    net, optimizer = make()
    save(tmp_path, 1, net, optimizer, {}, keep=1)
    for name in ("step-000009", "../step-000001", ""):
        (tmp_path / "latest").write_text(name)
        with pytest.raises(ValueError, match=r"latest names .*which is not there: restore it, or continue"):
            load_latest(tmp_path, net, optimizer)
    shutil.rmtree(tmp_path / "step-000001")
    with pytest.raises(ValueError, match="to start the stage again"):
        load_latest(tmp_path, net, optimizer)


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
