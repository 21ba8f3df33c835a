"""Shared fixtures. `python -m pytest` puts the checkout on sys.path; it is taken off before any other import."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

import os

# No test may reach the network through the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py
os.environ.setdefault("OMP_NUM_THREADS", "1")  # `make test` gives each core a pytest; of the children too

import random

import numpy as np
import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run on the CPU, in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "alone: of the gpu tests, those that nothing may run beside")
    config.addinivalue_line("markers", "vllm: needs the environment that `make test-vllm` installs")
    # The interpreter computes with numpy, which warns of the infinities that a kernel means to have.
    config.addinivalue_line("filterwarnings", r"ignore::RuntimeWarning:triton\.runtime\.interpreter")


def pytest_collection_modifyitems(items):
    """The file with the longest runs first: of two processes one would end with it alone."""
    items.sort(key=lambda item: item.path.name != "test_trainer.py")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same global random state, so a failure repeats alone."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def interpreter():
    """Skips where Triton's kernels cannot run on CPU tensors; test_gpu.py has its own and runs these tests there."""
    from cosmo_rl.kernels import launch

    if not launch.INTERPRET or isinstance(launch.triton, launch._Absent):
        pytest.skip("TRITON_INTERPRET is not 1, or there is no Triton")


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """Both backends of a kernel."""
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    return request.param


@pytest.fixture
def as_on_a_gpu(interpreter, monkeypatch):
    """The interpreter rounds as a GPU does."""
    import gpu_arithmetic

    gpu_arithmetic.install(monkeypatch)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles and chunks so small that small inputs span many, the last ones ragged; more items than programs."""
    from cosmo_rl.kernels import gemm, linear_kl, linear_logprob, reference

    monkeypatch.setattr(reference, "TILE_ROWS", 32)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 32 * 64)
    tiles = linear_logprob.Tiles(32, 64, 16, num_warps=4, num_stages=2, group=2)
    for module, name in ((linear_logprob, "forward_tiles"), (linear_kl, "kl_tiles")):
        monkeypatch.setattr(module, name, lambda *_: tiles)
    monkeypatch.setattr(gemm, "INNER_ROWS", 24)
    monkeypatch.setattr(gemm, "SCRATCH_BYTES", 40_000)


@pytest.fixture
def products(monkeypatch):
    """Shapes of the operands of every product that the Triton backends leave to torch, in order."""
    from cosmo_rl.kernels import gemm, linear_kl

    seen = []

    def counted(function, first):
        def call(*args):
            seen.append((tuple(args[first].shape), tuple(args[first + 1].shape)))
            return function(*args)

        return call

    matmul = counted(gemm.matmul, 0)
    monkeypatch.setattr(gemm, "matmul", matmul)
    monkeypatch.setattr(linear_kl, "matmul", matmul)
    monkeypatch.setattr(gemm, "add_matmul", counted(gemm.add_matmul, 1))
    return seen


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty and its kin return NaN, so that reading memory nobody wrote shows."""

    def poisoned(make):
        def call(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
