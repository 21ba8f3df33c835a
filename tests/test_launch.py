"""Which backend is taken and why, and what all four ops have in common: layouts, memory and messages."""

# Tests unpack inputs of mixed types, and a `leaf.grad` that is None fails them anyway.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportUnusedExpression=false

import os
import subprocess
import sys
import warnings

import pytest
import torch
from memory import Allocations

from cosmo_rl.kernels import gemm, launch, reference
from cosmo_rl.kernels.cpgd_objective import cpgd_objective
from cosmo_rl.kernels.launch import takes_tma, use_triton
from cosmo_rl.kernels.linear_cpgd import linear_cpgd
from cosmo_rl.kernels.linear_kl import linear_kl
from cosmo_rl.kernels.linear_logprob import linear_logprob

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """A machine with an H100, Triton, and no interpreter; nothing is launched on it."""
    monkeypatch.setattr(launch, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100")
    launch._warn_once.cache_clear()
    yield monkeypatch
    launch._warn_once.cache_clear()


def test_none_takes_triton_on_cuda_only(machine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_triton(None, GPU) and use_triton("triton", GPU) and not use_triton("torch", GPU)
        assert not use_triton(None, CPU) and not use_triton("torch", CPU)


def test_interpreter_is_taken_by_name_only(machine):
    machine.setattr(launch, "INTERPRET", True)
    assert use_triton("triton", CPU) and not use_triton(None, CPU)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_unknown_backend(device):
    with pytest.raises(ValueError, match="backend is 'cuda'; give None, 'triton' or 'torch'"):
        use_triton("cuda", device)


def test_triton_on_the_cpu(machine):
    with pytest.raises(ValueError, match="backend is 'triton', but the tensors are on cpu, not on a GPU; give None or"):
        use_triton("triton", CPU)


def falls_back(reason):
    """backend=None: the reference, and one warning; "triton": an error that says the same."""
    with pytest.warns(UserWarning, match=reason) as seen:
        assert not use_triton(None, GPU) and not use_triton(None, GPU)
    assert len(seen) == 1
    with pytest.raises(ValueError, match=f"backend is 'triton', but .*{reason}.*; give None or 'torch'"):
        use_triton("triton", GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not use_triton("torch", GPU) and not use_triton(None, CPU)


def test_missing_triton(machine):
    machine.setattr(launch, "triton", launch._Absent())
    falls_back("triton is not installed .pip install triton.")


def test_old_gpu(machine):
    machine.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    falls_back(r"Tesla V100 has compute capability \(7, 0\), below \(8, 0\)")


WITHOUT_TRITON = """
import sys, torch
sys.modules["triton"] = None
from cosmo_rl.kernels import cpgd_objective, gemm, launch, linear_cpgd, linear_kl, linear_logprob, reference
hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
targets, ones = torch.tensor([0, 1, 4, -100]), torch.ones(4)
stats = linear_logprob.linear_logprob(hidden, weight, targets)
stats.logprobs.sum().backward()
exact = torch.log_softmax(hidden.double() @ weight.double().T, 1)
torch.testing.assert_close(stats.logprobs[:3].double(), exact[[0, 1, 2], [0, 1, 4]], rtol=1e-5, atol=1e-5)
linear_cpgd.linear_cpgd(hidden, weight, targets, -ones, ones, ones).loss.backward()
linear_kl.linear_kl(hidden.detach(), weight.detach(), hidden, weight).sum().backward()
cpgd_objective.cpgd_objective(-ones, -ones, ones)
try:
    linear_logprob.linear_logprob(hidden, weight, targets, backend="triton")
except ValueError as error:
    print(error)
"""


def test_kernels_without_triton():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-P", "-c", WITHOUT_TRITON], env=environment, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed (pip install triton)" in done.stdout


def test_tma_needs_hopper_and_16_bytes(monkeypatch):
    monkeypatch.setattr(launch, "capability", lambda device: (9, 0))
    storage = torch.zeros(64 * 40).bfloat16()
    assert storage.data_ptr() % 16 == 0
    for view, fits in (((64, 40), True), ((64, 36), False), ((16, 64), True)):
        assert takes_tma(storage[:view[0] * view[1]].view(view)) == fits  # row strides of 80, 72 and 128 bytes
    tensor = storage.view(64, 40)
    assert takes_tma(tensor, tensor[:, 8:], tensor[::3]) and not takes_tma(tensor, tensor[:, 1:])
    assert not takes_tma(tensor, storage.view(40, 64).T)
    monkeypatch.setattr(launch, "capability", lambda device: (8, 9))
    assert not takes_tma(tensor)


@pytest.mark.parametrize("op", ["linear_logprob", "linear_cpgd", "linear_kl"])
def test_no_tensor_of_all_logits(op, backend, monkeypatch):
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1 << 15)
    monkeypatch.setattr(reference, "TILE_ROWS", 64)
    n, d, v = 100, 8, 3000
    monkeypatch.setattr(gemm, "SCRATCH_BYTES", 2 * 10 * v * 4)  # 10 tokens and their gradients
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    targets, vector = torch.randint(0, v, (n,)), torch.ones(n)
    with Allocations() as seen:
        if op == "linear_logprob":
            stats = linear_logprob(hidden, weight, targets, backend=backend)
            (stats.logprobs.sum() + stats.entropy.sum()).backward()
        elif op == "linear_cpgd":
            linear_cpgd(hidden, weight, targets, -vector, vector, vector, backend=backend).loss.backward()
        else:
            linear_kl(hidden * 0.9, weight, hidden, weight, backend=backend).sum().backward()
    assert 4 * v * d <= seen.largest <= 4 << 15 < 4 * n * v


@pytest.mark.usefixtures("interpreter")
def test_errors_are_the_same_on_both_backends():
    """The checks of every op come before the backend runs, so that no kernel meets what it cannot read."""
    hidden, weight, targets, ones = torch.randn(4, 8), torch.randn(10, 8), torch.tensor([0, 1, 2, 9]), torch.ones(4)
    head = (hidden, weight, targets)
    calls = [
        (linear_logprob, head, [dict(temperature=0.0), dict(bias=torch.zeros(9)), dict(bias=torch.zeros(10).double())]),
        (linear_logprob, (hidden[0], weight, targets), [{}]),
        (linear_logprob, (hidden.double(), weight.double(), targets), [{}]),
        (linear_logprob, (hidden, weight.to("meta"), targets), [{}]),
        (linear_logprob, (hidden, weight, targets.int()), [{}]),
        (linear_logprob, (hidden, weight, targets + 1), [{}]),
        (linear_cpgd, (*head, ones, ones, ones), [dict(temperature=-1.0), dict(drift_coef=-1.0)]),
        (linear_cpgd, (*head, ones[:3], ones, ones), [{}]),
        (linear_cpgd, (*head, ones, ones.to("meta"), ones), [{}]),
        (linear_cpgd, (*head, ones, ones, ones.half()), [{}]),
        (linear_kl, (hidden, weight, hidden, weight), [dict(temperature=float("nan")), dict(bias=torch.zeros(4))]),
        (linear_kl, (hidden[:3], weight, hidden, weight), [{}]),
        (linear_kl, (hidden.half(), weight.half(), hidden, weight), [{}]),
        (linear_kl, (hidden.to("meta"), weight.to("meta"), hidden, weight), [{}]),
        (cpgd_objective, (ones, ones, ones), [dict(clip_eps_low=2.0), dict(clip_eps_high=-ones)]),
        (cpgd_objective, (ones, ones[:2], ones), [{}]),
        (cpgd_objective, (ones.half(), ones, ones), [{}]),
    ]
    for op, args, settings in calls:
        for keywords in settings:
            texts = []
            for backend in ("torch", "triton"):
                with pytest.raises(ValueError) as error:
                    op(*args, **keywords, backend=backend)
                texts.append(str(error.value))
            assert texts[0] == texts[1] and "backend" not in texts[0]
