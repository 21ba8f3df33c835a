"""FSDP2 on 1 and 2 gloo ranks against the unsharded module: gradients, norms, clipping, steps, saved weights.

One launch of 2 ranks runs every case (starting the processes is most of the time); the tests then look at what it left.
"""

import os
import socket
import time
from typing import Any

import pytest
import tiny_case
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from cosmo_rl.model.parallel import (
    clip_grad_norm,
    close_distributed,
    init_distributed,
    rank,
    shard,
    together,
    world,
)
from cosmo_rl.model.weights import full_state_dict, save_pretrained

TOTAL = 40  # tokens of the update that the weights are normalised by
MAX_NORM = 0.05
# case -> (sequences of each micro-batch, by rank; freeze_vision). Sequences 2 and 3 have no image.
CASES = {
    "images": ([[[0, 5], [2, 6]], [[1, 4], [3, 7]]], False),
    "text_only_rank": ([[[0, 4], [6]], [[2], [3]]], False),
    "idle_rank": ([[[0, 2]], [[]]], False),
    "frozen": ([[[0, 4], [6]], [[2], [3]]], True),
}


def run_case(policy, microbatches) -> float:
    """Forward and backward over this rank's micro-batches; returns the sum of their losses."""
    sequences, loss = tiny_case.sequences(), 0.0
    for number, chosen in enumerate(microbatches):
        batch = tiny_case.batch([sequences[i] for i in chosen], ("packed", "padded")[number % 2])
        output = policy(batch, cpgd=tiny_case.cpgd_inputs(batch, chosen, TOTAL))
        output.loss.backward()
        loss += output.loss.item()
    return loss


@torch.no_grad()
def logprobs(policy) -> torch.Tensor:
    return policy.eval()(tiny_case.batch(tiny_case.sequences(), "padded")).logprobs


def full_gradients(policy) -> dict[str, torch.Tensor]:
    found = tiny_case.gradients(policy)
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def of_all(value) -> list:
    """By rank."""
    return together(lambda: value)


def run_all(device, folder) -> dict:
    """Every case on this rank's share of CASES; with one rank, on all shares."""
    results = {}
    for name, (shares, freeze_vision) in CASES.items():
        mine = shares[rank()] if world() == 2 else [members for share in shares for members in share]
        policy = tiny_case.policy(freeze_vision=freeze_vision)
        shard(policy, device=device, dtype=torch.float32, freeze_vision=freeze_vision).train()
        loss = sum(of_all(run_case(policy, mine)))
        gradients = full_gradients(policy)
        norms = [clip_grad_norm(policy, limit) for limit in (1e9, MAX_NORM)]
        results[name] = {"loss": loss, "gradients": gradients, "norms": norms, "clipped": full_gradients(policy),
                         "norms_of_ranks": of_all(norms),
                         "local": sum(p.to_local().numel() for p in policy.parameters() if isinstance(p, DTensor))}

    # A log-prob pass between backward and step must not leave old weights behind.
    policy = shard(tiny_case.policy(), device=device, dtype=torch.float32, freeze_vision=False).train()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    shares = CASES["images"][0]
    run_case(policy, shares[rank()] if world() == 2 else [members for share in shares for members in share])
    before = logprobs(policy)
    optimizer.step()
    results["step"] = {"before": before, "after": logprobs(policy),
                       "weights": {n: t.clone() for n, t in full_state_dict(policy)}}
    save_pretrained(policy, tiny_case.processor(), folder)

    policy = shard(tiny_case.policy(), device=device, dtype=torch.bfloat16, freeze_vision=False).train()
    results["bfloat16"] = {"logprobs": logprobs(policy), "masters": str({p.dtype for p in policy.parameters()})}
    return results


def worker(number: int, port: int, folder: str) -> None:
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    tiny_case.folder()  # before the group: transformers saves on rank 0 only
    device = init_distributed()
    results = run_all(device, f"{folder}/hf")
    if rank() == 0:
        torch.save(results, f"{folder}/results.pt")
    close_distributed()
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """(results, folder) of each number of ranks."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context: Any = spawn(worker, (port, str(folder)), nprocs=2, join=False)
    deadline = time.monotonic() + 240
    try:
        one = tmp_path_factory.mktemp("one")
        device = init_distributed()
        assert (rank(), world()) == (0, 1)
        results = run_all(device, one / "hf")
        dist.destroy_process_group()
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        for process in context.processes:
            process.kill()
    return {1: (results, one), 2: (torch.load(folder / "results.pt", weights_only=True), folder)}


@pytest.fixture(scope="module")
def unsharded():
    results = {}
    for name, (shares, freeze_vision) in CASES.items():
        policy = tiny_case.policy(freeze_vision=freeze_vision).train()
        loss = sum(run_case(policy, share) for share in shares)
        gradients = tiny_case.gradients(policy)
        norm = torch.cat([g.flatten().double() for g in gradients.values()]).norm().item()
        results[name] = {"loss": loss, "gradients": gradients, "norm": norm}
    policy = tiny_case.policy().train()
    for share in CASES["images"][0]:
        run_case(policy, share)
    before = logprobs(policy)
    torch.optim.SGD(policy.parameters(), lr=1.0).step()
    results["step"] = {"before": before, "after": logprobs(policy), "weights": dict(full_state_dict(policy))}
    return results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_equal_the_unsharded_sum(launched, unsharded, ranks, name):
    got, expected = launched[ranks][0][name], unsharded[name]
    assert got["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert got["gradients"].keys() == expected["gradients"].keys()
    assert max(g.abs().max() for g in expected["gradients"].values()) > 0.01
    for key, gradient in expected["gradients"].items():
        torch.testing.assert_close(got["gradients"][key], gradient, atol=1e-6, rtol=1e-5,
                                   msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_clipping_goes_by_the_global_norm(launched, unsharded, ranks, name):
    got, norm = launched[ranks][0][name], unsharded[name]["norm"]
    assert norm > MAX_NORM
    assert got["norms"] == pytest.approx([norm, norm], rel=1e-5), "the first limit, 1e9, must not have scaled anything"
    assert all(norms == got["norms"] for norms in got["norms_of_ranks"]), "bitwise the same on all ranks"
    for key, gradient in got["gradients"].items():
        torch.testing.assert_close(got["clipped"][key], gradient * (MAX_NORM / norm), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_step_after_inference_is_seen(launched, unsharded, ranks):
    got, expected = launched[ranks][0]["step"], unsharded["step"]
    assert (expected["after"] - expected["before"]).abs().max() > 0.01
    torch.testing.assert_close(got["before"], expected["before"], atol=1e-5, rtol=0)
    torch.testing.assert_close(got["after"], expected["after"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_full_weights_and_saved_folder(launched, unsharded, ranks):
    results, folder = launched[ranks]
    weights, expected = results["step"]["weights"], unsharded["step"]["weights"]
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-4)
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "hf", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_parameters_are_really_split(launched):
    count = sum(p.numel() for p in tiny_case.policy().parameters())
    assert launched[1][0]["images"]["local"] == count
    assert count // 2 <= launched[2][0]["images"]["local"] < 0.51 * count
    # Frozen blocks are replicated, so they are no DTensors at all.
    frozen = sum(p.numel() for p in tiny_case.policy(freeze_vision=True).parameters() if not p.requires_grad)
    assert launched[1][0]["frozen"]["local"] == count - frozen


@pytest.mark.parametrize("ranks", [1, 2])
def test_bfloat16_compute_keeps_float32_masters(launched, unsharded, ranks):
    got = launched[ranks][0]["bfloat16"]
    assert got["masters"] == "{torch.float32}"
    error = (got["logprobs"] - unsharded["step"]["before"]).abs()
    assert 1e-4 < error.max() < 0.5, "computed in bfloat16, and not far off"


def test_norm_that_is_not_finite_changes_nothing():
    policy = tiny_case.policy()
    parameters: list[Any] = list(policy.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parameters[3].grad.view(-1)[0] = float("nan")
    assert clip_grad_norm(policy, 1.0) != clip_grad_norm(policy, 1.0)
    assert (parameters[0].grad == 1).all()
    parameters[3].grad.view(-1)[0] = float("inf")
    assert clip_grad_norm(policy, 1.0) == float("inf")
    assert (parameters[0].grad == 1).all()


@pytest.fixture
def two_gpus(monkeypatch):
    """A host that seems to have two; the calls that would touch them, in order."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("device", str(device))))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: calls.append(("group", backend)))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield calls
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_gpu_for_each_rank(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert init_distributed() == torch.device("cuda", 1)
    assert two_gpus == [("device", "cuda:1"), ("group", "cpu:gloo,cuda:nccl")], "NCCL takes the current device"
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_more_ranks_than_gpus(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"LOCAL_RANK is 2, .* shows 2 GPUs; give --nproc-per-node 2"):
        init_distributed()
    assert not two_gpus
