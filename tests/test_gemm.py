"""Chunks, float32 products and the gradients of head and hidden states from those of the logits.

test_gpu.py calls the functions that need no fixture of this suite, under torch.device("cuda").
"""

# Tests unpack inputs of mixed types, and a `leaf.grad` that is None fails them anyway.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportUnusedExpression=false

import math

import pytest
import torch
from memory import Allocations
from torch._subclasses.fake_tensor import FakeTensorMode

from cosmo_rl.kernels import gemm
from cosmo_rl.kernels.gemm import INNER_ROWS, SCRATCH_BYTES, add_matmul, head_gradients, matmul, plan_chunks

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("vocab", [1, 507, 151936, 152064, 10**9])
def test_chunks(vocab, itemsize):
    """They cover all tokens, each outer chunk in whole inner ones, within the memory if one token fits at all."""
    for size in (1, 2, 511, 512, 513, 3000, 32768, 10**6):
        outer, inner = plan_chunks(size, vocab, itemsize)
        assert 1 <= inner <= outer <= size and inner <= INNER_ROWS
        assert outer % inner == 0 or outer == size
        assert 4 * inner * vocab + itemsize * outer * vocab <= SCRATCH_BYTES or outer == inner == 1


@pytest.mark.parametrize("vocab", [151936, 152064])
def test_chunks_of_a_real_head_are_large(vocab):
    """Each further one reads and writes the float32 gradient of the head, 2 GB, once more."""
    outer, inner = plan_chunks(32768, vocab, 2)
    assert inner == 512 and outer >= 3072


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_float32(dtype):
    a, b = torch.randn(40, 96).to(dtype), torch.randn(96, 30).to(dtype)
    exact = a.double() @ b.double()
    # Sums of 96 up to 35, where float32 has steps of 4e-6 and bfloat16 of 0.25; tensor cores truncate one every 16.
    close = dict(rtol=0, atol=1e-4)
    out = torch.full((40, 30), math.nan)
    assert matmul(a, b, out) is out
    torch.testing.assert_close(out.double(), exact, **close)
    transposed = torch.full((40, 30), math.nan)
    matmul(a.T.contiguous().T, b.T.contiguous().T, transposed)
    torch.testing.assert_close(transposed.double(), exact, **close)
    start = torch.randn(40, 30)
    out = start.clone()
    assert add_matmul(out, a, b) is out
    torch.testing.assert_close(out.double(), start.double() + exact, **close)
    add_matmul(out, a, b)
    torch.testing.assert_close(out.double(), start.double() + 2 * exact, **close)


def trivial(n, d, v, dtype):
    """(hidden, weight, fill, expected dhidden, expected dweight) for dlogits = logits / 8."""
    hidden, weight = torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype)
    exact = hidden.double(), weight.double()
    dlogits = (exact[0] @ exact[1].T / 8).to(dtype).double()

    def fill(rows, logits, out):
        torch.testing.assert_close(logits.double(), exact[0][rows] @ exact[1].T, rtol=1e-5, atol=1e-5)
        if out is not None:
            out.copy_(dlogits[rows])
        logits.fill_(math.nan)  # it may overwrite them

    return hidden, weight, fill, dlogits @ exact[1], dlogits.T @ exact[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunks", [None, (7, 4 * 7 * 30 + 4 * 21 * 30), (50, 1)], ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_gradients(dtype, chunks, monkeypatch):
    """In one chunk, in several of several, and in chunks of one token."""
    if chunks:
        monkeypatch.setattr(gemm, "INNER_ROWS", chunks[0])
        monkeypatch.setattr(gemm, "SCRATCH_BYTES", chunks[1])
    hidden, weight, fill, dhidden, dweight = trivial(50, 12, 30, dtype)
    found = head_gradients(hidden, weight, fill, needs=(True, True))
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), dhidden, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    torch.testing.assert_close(found[1].double(), dweight, rtol=1e-5, atol=1e-4)
    wide = head_gradients(hidden, weight, fill, needs=(True, False), dtype=torch.float32)[0]
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), dhidden, rtol=1e-5, atol=1e-4)


def test_needs(products):
    hidden, weight, fill, dhidden, dweight = trivial(20, 12, 30, torch.float32)
    logits, to_hidden, to_weight = ((20, 12), (12, 30)), ((20, 30), (30, 12)), ((30, 20), (20, 12))
    for needs, spent in (((True, False), [logits, to_hidden]), ((False, True), [logits, to_weight]),
                         ((False, False), [logits])):
        products.clear()
        found = head_gradients(hidden, weight, fill, needs=needs)
        assert products == spent
        for grad, exact, need in zip(found, (dhidden, dweight), needs, strict=True):
            assert (grad is None) != need
            if grad is not None:
                torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-5)


def test_scale_is_applied_in_float32():
    """dlogits of 1 and scale of 1e-7: in float16 each gradient would be 1e-7 rounded to 1.2e-7."""
    hidden, weight = torch.ones(6, 4).half(), torch.ones(5, 4).half()
    scale = torch.tensor(1e-7)
    fill = lambda rows, logits, out: out.fill_(1.0)
    dhidden, dweight = head_gradients(hidden, weight, fill, needs=(True, True), scale=scale, dtype=torch.float32)
    torch.testing.assert_close(dhidden, torch.full((6, 4), 5e-7))
    torch.testing.assert_close(dweight, torch.full((5, 4), 6e-7))


@pytest.mark.usefixtures("small_tiles")
def test_nan_of_ignored_rows_goes_nowhere():
    hidden, weight, _, dhidden, _ = trivial(60, 12, 30, torch.float32)
    ignored = torch.arange(60) % 3 == 0
    clean = hidden.masked_fill(ignored[:, None], 0.0)
    hidden[ignored] = math.nan
    dlogits = clean @ weight.T / 8
    found = head_gradients(hidden, weight, lambda rows, logits, out: out.copy_(dlogits[rows]), needs=(True, True),
                           ignored=ignored)
    assert (found[0][ignored] == 0).all()
    torch.testing.assert_close(found[0][~ignored].double(), dhidden[~ignored], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[1], dlogits.T @ clean, rtol=1e-5, atol=1e-4)


def test_no_tokens():
    fill = lambda *args: pytest.fail("nothing to fill")
    dhidden, dweight = head_gradients(torch.zeros(0, 4), torch.randn(9, 4), fill, needs=(True, True))
    assert torch.equal(dhidden, torch.zeros(0, 4)) and torch.equal(dweight, torch.zeros(9, 4))
    assert head_gradients(torch.zeros(0, 4), torch.randn(9, 4), fill, needs=(False, False)) == (None, None)


@pytest.mark.parametrize("dim, vocab", [(3584, 152064), (2048, 151936)])
def test_memory(dim, vocab, monkeypatch):
    """As the docstring has it, and the masked copy of a chunk's hidden states; nothing is computed."""
    # As on CUDA, where they make no float32 copies.
    monkeypatch.setattr(gemm, "matmul", lambda a, b, out: out)
    monkeypatch.setattr(gemm, "add_matmul", lambda out, a, b: out)
    size = 32768
    with FakeTensorMode():
        hidden, weight = (torch.empty(rows, dim, dtype=torch.bfloat16) for rows in (size, vocab))
        ignored = torch.empty(size, dtype=torch.bool)
        with Allocations(hidden, weight, ignored) as seen:
            results = head_gradients(hidden, weight, lambda *args: None, needs=(True, True), ignored=ignored)
    gradients = sum(t.untyped_storage().nbytes() for t in results)
    outer = plan_chunks(size, vocab, 2)[0]
    assert seen.live < gradients + 1000
    assert seen.peak < gradients + SCRATCH_BYTES + (4 + 2) * outer * dim + 1000
