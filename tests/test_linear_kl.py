"""linear_kl against dense float64 softmaxes, in value and gradient."""

# Tests unpack inputs of mixed types, and a `leaf.grad` that is None fails them anyway.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportUnusedExpression=false

import math

import pytest
import torch
from close import assert_no_worse

from cosmo_rl.kernels import reference
from cosmo_rl.kernels.linear_kl import _LinearKL, linear_kl
from cosmo_rl.kernels.reference import dense_linear_kl


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(reference, "TILE_ROWS", 32)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 32 * 64)


def make_inputs(n, d, v, dtype=torch.float32, apart=0.3):
    hidden, weight = torch.randn(n, d), torch.randn(v, d) * 3 / math.sqrt(d)
    old = hidden + apart * torch.randn(n, d), weight + apart / math.sqrt(d) * torch.randn(v, d)
    return [t.to(dtype) for t in (*old, hidden, weight)]


def run(function, inputs, dtype, **keywords):
    """(kl, dhidden, dweight) for a fixed incoming gradient."""
    old_hidden, old_weight, hidden, weight = (t.detach().to(dtype) for t in inputs)
    hidden.requires_grad_(), weight.requires_grad_()
    kl = function(old_hidden, old_weight, hidden, weight, **keywords)
    (kl * torch.linspace(-1.0, 2.0, len(kl), dtype=torch.float64)).sum().backward()
    return kl.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(252, 123, 507), (16, 32, 64), (1, 8, 40)], ids=str)
def test_values_and_gradients(shape, dtype, small_tiles, poisoned_empty):
    inputs = make_inputs(*shape, dtype)
    keywords = dict(temperature=0.7, bias=torch.randn(shape[2]))
    actual, same, exact = (run(f, inputs, t, **keywords) for f, t in (
        (linear_kl, dtype), (dense_linear_kl, dtype), (dense_linear_kl, torch.float64)))
    for a, s, e in zip(actual, same, exact, strict=True):
        assert_no_worse(a, s, e, atol=2e-6 * (1 + e.abs().max().item()))
    assert (actual[0] >= 0).all() and actual[0].dtype == torch.float32
    assert actual[1].dtype == actual[2].dtype == dtype
    if dtype == torch.bfloat16:
        assert (actual[0] - exact[0]).abs().max() < 2e-5


def test_gradcheck_in_float64(monkeypatch):
    monkeypatch.setattr(reference, "TILE_ROWS", 2)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 6)
    old_hidden, old_weight, hidden, weight = make_inputs(5, 4, 7, torch.float64)
    bias = torch.randn(7, dtype=torch.float64)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: _LinearKL.apply(old_hidden, old_weight, h, w, 0.7, bias), leaves)
    assert torch.autograd.gradcheck(lambda h, w: dense_linear_kl(old_hidden, old_weight, h, w, 0.7, bias), leaves)


def test_equal_policies_have_none(small_tiles):
    _, _, hidden, weight = make_inputs(50, 16, 200)
    hidden.requires_grad_(), weight.requires_grad_()
    kl = linear_kl(hidden.detach().clone(), weight.detach().clone(), hidden, weight)
    kl.sum().backward()
    assert (kl == 0).all() and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_small_divergences_keep_their_size():
    """Logits near 80 in a flat softmax: the error of lse alone is 4e-6 nats, that of the sum must not be."""
    _, _, hidden, weight = make_inputs(200, 16, 300)
    weight[:, 0], hidden[:, 0] = 8.0, 10.0
    old = hidden + 1e-3 * torch.randn_like(hidden)
    exact = dense_linear_kl(*(t.double() for t in (old, weight, hidden, weight)))
    got = linear_kl(old, weight, hidden, weight)
    plain = dense_linear_kl(old, weight, hidden, weight)
    assert (got - exact).abs().max() < 2e-7 < (plain - exact).abs().max()
    assert (got >= 0).all()


def test_far_policies_stay_finite():
    """All mass on one token in each policy, another one, +-80: KL = 160 + the mass of the rest, which is nil."""
    old_weight, weight = torch.full((40, 1), -80.0), torch.full((40, 1), -80.0)
    old_weight[3], weight[20] = 80.0, 80.0
    hidden = torch.ones(2, 1, requires_grad=True)
    kl = linear_kl(torch.ones(2, 1), old_weight, hidden, weight)
    kl.sum().backward()
    assert kl.tolist() == pytest.approx([160.0, 160.0], rel=1e-6) and torch.isfinite(hidden.grad).all()


def test_bias_bans_tokens(small_tiles):
    inputs = make_inputs(30, 8, 100)
    bias = torch.zeros(100)
    bias[60:] = -1e30
    kl, _, dweight = run(linear_kl, inputs, torch.float32, temperature=0.5, bias=bias)
    old_hidden, old_weight, hidden, weight = (t.double() for t in inputs)
    exact = dense_linear_kl(old_hidden, old_weight[:60], hidden, weight[:60], 0.5)
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=1e-6)
    assert (dweight[60:] == 0).all() and torch.isfinite(dweight).all()


def test_old_policy_is_a_constant_and_may_be_of_another_width():
    old_hidden, old_weight = torch.randn(5, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4, requires_grad=True)
    kl = linear_kl(old_hidden, old_weight, hidden, weight)
    kl.sum().backward()
    assert old_hidden.grad is None and old_weight.grad is None and weight.grad is not None
    exact = dense_linear_kl(*(t.detach().double() for t in (old_hidden, old_weight, hidden, weight)))
    torch.testing.assert_close(kl.detach().double(), exact, rtol=1e-5, atol=1e-6)


def test_no_tokens():
    weight = torch.randn(9, 4, requires_grad=True)
    linear_kl(torch.zeros(0, 4), torch.randn(9, 4), torch.zeros(0, 4), weight).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(9, 4))


@pytest.mark.parametrize("change, message", [
    (dict(old_hidden=torch.zeros(3, 8)), r"\(3, 8\).*\(4, 8\).*same tokens"),
    (dict(old_weight=torch.zeros(9, 8)), r"\(9, 8\).*\(10, 8\).*same vocabulary"),
    (dict(old_weight=torch.zeros(10, 7)), r"old_hidden.*\(4, 8\).*old_weight.*\(10, 7\)"),
    (dict(hidden=torch.zeros(4)), r"hidden.*\(4,\)"),
    (dict(old_hidden=torch.zeros(4, 8).half(), old_weight=torch.zeros(10, 8).half()), "torch.float16.*torch.float32"),
    (dict(bias=torch.zeros(3)), r"bias.*\(3,\).*\(10, 8\)"),
    (dict(temperature=-1.0), "temperature is -1.0"),
    (dict(backend="triton"), "no Triton backend"),
])
def test_bad_input(change, message):
    call = dict(old_hidden=torch.randn(4, 8), old_weight=torch.randn(10, 8), hidden=torch.randn(4, 8),
                weight=torch.randn(10, 8)) | change
    with pytest.raises(ValueError, match=message):
        linear_kl(**call)
