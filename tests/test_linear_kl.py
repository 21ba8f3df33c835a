"""linear_kl against dense float64 softmaxes, in value and gradient.

test_gpu.py calls the functions that need no fixture of this suite, under torch.device("cuda").
"""

# Tests unpack inputs of mixed types, and a `leaf.grad` that is None fails them anyway.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportUnusedExpression=false

import math

import pytest
import torch
from close import assert_no_worse

import cosmo_rl.kernels.linear_kl as module
from cosmo_rl.kernels import launch, reference
from cosmo_rl.kernels.linear_kl import Tiles, _LinearKL, linear_kl
from cosmo_rl.kernels.reference import dense_linear_kl

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_inputs(n, d, v, dtype=torch.float32, apart=0.3, old_d=None):
    """[old_hidden, old_weight, hidden, weight]; an old policy of another width has nothing to do with the new one."""
    hidden, weight = torch.randn(n, d), torch.randn(v, d) * 3 / math.sqrt(d)
    old = hidden + apart * torch.randn(n, d), weight + apart / math.sqrt(d) * torch.randn(v, d)
    if old_d is not None:
        old = torch.randn(n, old_d), torch.randn(v, old_d) * 3 / math.sqrt(old_d)
    return [t.to(dtype) for t in (*old, hidden, weight)]


def run(function, inputs, dtype, shared=False, **keywords):
    """(kl, dhidden, dweight) for a fixed incoming gradient; shared: the old head is the new one."""
    old_hidden, old_weight, hidden, weight = (t.detach().to(dtype) for t in inputs)
    hidden.requires_grad_(), weight.requires_grad_()
    kl = function(old_hidden, weight.detach() if shared else old_weight, hidden, weight, **keywords)
    (kl * torch.linspace(-1.0, 2.0, len(kl), dtype=torch.float64)).sum().backward()
    return kl.detach(), hidden.grad, weight.grad


def check(backend, inputs, dtype, **keywords):
    """KL and gradients err at most twice as much as torch in the same dtype."""
    actual = run(linear_kl, inputs, dtype, backend=backend, **keywords)
    same, exact = (run(dense_linear_kl, inputs, t, **keywords) for t in (dtype, torch.float64))
    for a, s, e in zip(actual, same, exact, strict=True):
        assert_no_worse(a, s, e, atol=2e-6 * (1 + e.abs().max().item()))
    assert (actual[0] >= 0).all() and actual[0].dtype == torch.float32
    assert actual[1].dtype == actual[2].dtype == dtype
    assert (actual[0] - exact[0]).abs().max() < 1e-5 * (1 + exact[0].max())  # whatever the inputs' dtype


def check_values(inputs, dtype):
    """Those of the kernel that walks tiles, which has no part in the backward."""
    same, exact = (dense_linear_kl(*(t.to(kind) for t in inputs)) for kind in (dtype, torch.float64))
    assert_no_worse(linear_kl(*inputs, backend="triton"), same, exact, atol=2e-6 * (1 + exact.abs().max().item()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, temperature, biased", [
    ((70, 43, 150), 0.5, True), ((16, 32, 64), 1.0, False), ((1, 8, 40), 2.0, True)], ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_values_and_gradients(shape, temperature, biased, dtype, backend):
    bias = torch.randn(shape[2]) if biased else None
    check(backend, make_inputs(*shape, dtype), dtype, temperature=temperature, bias=bias)


@pytest.mark.parametrize("shared, old_d, dtype", [
    *((True, None, dtype) for dtype in DTYPES), (False, 56, torch.bfloat16), (False, 24, torch.float32)], ids=str)
@pytest.mark.usefixtures("small_tiles", "poisoned_empty")
def test_many_tiles(shared, old_d, dtype, backend):
    """Groups, splits, tiles and chunks, all ragged; one head for both policies, or an old one of another width."""
    check(backend, make_inputs(70, 40, 200, dtype, old_d=old_d), dtype, shared=shared, temperature=0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "two heads"])
@pytest.mark.usefixtures("as_on_a_gpu", "small_tiles", "poisoned_empty")
def test_the_rounding_of_a_gpu(shared, dtype):
    """And none between equal policies, though a GPU's x / x is not always 1."""
    check("triton", make_inputs(40, 40, 200, dtype), dtype, shared=shared, temperature=0.6)
    hidden, weight = make_inputs(40, 40, 200, dtype, apart=0.0)[2:]
    assert (linear_kl(hidden, weight, hidden, weight.clone(), temperature=0.6, backend="triton") == 0).all()


@pytest.mark.parametrize("vocab", [152064, 151936])
def test_vocabularies_of_qwen(vocab, backend, monkeypatch):
    if launch.INTERPRET:  # a tile of the shipped shape takes it as long as one 60 times as wide
        monkeypatch.setattr(module, "kl_tiles", lambda *_: Tiles(16, 8192, 16, 4, 2))
        monkeypatch.setattr(module, "ROW_BLOCK", 8192)
    check(backend, make_inputs(3, 16, vocab, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("interpreter")
def test_both_ways_to_load(tma, dtype, monkeypatch):
    inputs = make_inputs(70, 64, 200, dtype)
    assert launch.takes_tma(*inputs) or launch.capability(inputs[0].device) < (9, 0)
    if not tma:
        monkeypatch.setattr(launch, "takes_tma", lambda *tensors: False)
    check_values(inputs, dtype)


@pytest.mark.parametrize("vocab", [31, 64, 65])
@pytest.mark.usefixtures("interpreter")
def test_edges_of_tiles(vocab, monkeypatch):
    """A last tile that lacks one column, has one, or is whole; two heads, and old states of another width."""
    monkeypatch.setattr(module, "kl_tiles", lambda *_: Tiles(16, 32, 16, 4, 2, group=2))
    monkeypatch.setattr(module, "ROW_BLOCK", 32)
    bias = torch.randn(vocab) - 20  # a column beyond the edge, whose logit is 0, would have all the mass
    for old_d in (None, 19):
        check("triton", make_inputs(18, 16, vocab, old_d=old_d), torch.float32, temperature=0.7, bias=bias)


@pytest.mark.parametrize("programs", [1, 2, 50])
@pytest.mark.usefixtures("interpreter")
def test_any_number_of_programs(programs, monkeypatch):
    monkeypatch.setattr(launch, "num_programs", lambda device: programs)
    monkeypatch.setattr(module, "kl_tiles", lambda *_: Tiles(16, 32, 16, 4, 2, group=2))
    check_values(make_inputs(40, 16, 190, torch.float16), torch.float16)


def test_frozen_operands_cost_no_product(backend, products):
    old_hidden, old_weight, hidden, weight = make_inputs(20, 8, 30)
    logits, dhidden, dweight = ((20, 8), (8, 30)), ((20, 30), (30, 8)), ((30, 20), (20, 8))
    full = None
    for learns, spent in (((True, True), [dhidden, dweight]), ((True, False), [dhidden]), ((False, True), [dweight])):
        leaves = [t.clone().requires_grad_(learn) for t, learn in zip((hidden, weight), learns, strict=True)]
        products.clear()
        linear_kl(old_hidden, old_weight, *leaves, backend=backend).sum().backward()
        assert backend == "torch" or products == [logits, logits, *spent]  # of both policies
        full = full or [leaf.grad for leaf in leaves]
        for leaf, whole, learn in zip(leaves, full, learns, strict=True):
            assert torch.equal(leaf.grad, whole) if learn else leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_every_run(dtype, backend):
    """Two calls, and two backward passes of one graph."""
    inputs = make_inputs(6, 16, 300, dtype)
    first, second = (run(linear_kl, inputs, dtype, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    leaf = inputs[2].clone().requires_grad_()
    loss = linear_kl(*inputs[:2], leaf, inputs[3], backend=backend).sum()
    loss.backward(retain_graph=True)
    once, leaf.grad = leaf.grad, None
    loss.backward()
    assert torch.equal(leaf.grad, once)


def test_float16_gradients_survive_small_coefficients(backend):
    """1e-6 x a probability is below float16's smallest number; the sum over tokens, scaled, is not."""
    old_hidden, old_weight, hidden, weight = make_inputs(40, 16, 300, torch.float16, apart=1.0)
    found = []
    for coefficient in (1e-6, 1.0):
        leaf = weight.clone().requires_grad_()
        (linear_kl(old_hidden, old_weight, hidden, leaf, backend=backend).sum() * coefficient).backward()
        found.append(leaf.grad.float() / coefficient)
    # The result itself is float16: half of its smallest number, 6e-8.
    torch.testing.assert_close(*found, rtol=2e-3, atol=3e-8 / 1e-6)
    assert (found[1].abs() > 1).any()


@pytest.mark.parametrize("temperature", [1e-5, 1e6])
def test_float16_gradients_at_any_temperature(temperature, backend):
    """Those of the logits, which 1 / temperature multiplies, neither overflow nor round to 0."""
    inputs = [t.mul(math.sqrt(temperature)).half() for t in make_inputs(20, 16, 90, apart=1.0)]
    found = run(linear_kl, inputs, torch.float16, temperature=temperature, backend=backend)
    exact = run(dense_linear_kl, inputs, torch.float64, temperature=temperature)
    for a, e in zip(found, exact, strict=True):
        assert a.sub(e).norm() < 1e-3 * e.norm()


def test_any_layout(backend):
    old_hidden, old_weight, hidden, weight = make_inputs(30, 8, 30)
    bias = torch.randn(30)
    plain = linear_kl(old_hidden, old_weight, hidden, weight, bias=bias, backend=backend)
    found = linear_kl(old_hidden.T.contiguous().T, old_weight.repeat(1, 2)[:, :8], hidden.repeat_interleave(2, 0)[::2],
                      torch.cat((weight[:, :1], weight), 1)[:, 1:], bias=bias, backend=backend)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


def test_strided_bias(backend):
    inputs, bias = make_inputs(20, 8, 30), torch.randn(60)
    plain = linear_kl(*inputs, bias=bias[::2].clone(), backend=backend)
    assert torch.equal(linear_kl(*inputs, bias=bias[::2], backend=backend), plain)


def test_heads_that_begin_at_one_address_are_not_one_head(backend):
    """Two views of one buffer, of one shape: rows of the one are not those of the other."""
    buffer = torch.randn(40, 16)
    old_weight, weight = buffer[:, :8], buffer.view(80, 8)[:40]
    hidden = torch.randn(6, 8)
    kl = linear_kl(hidden, old_weight, hidden, weight, backend=backend)
    exact = dense_linear_kl(*(t.double() for t in (hidden, old_weight, hidden, weight)))
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=1e-6)


def test_gradcheck_in_float64(monkeypatch):
    monkeypatch.setattr(reference, "TILE_ROWS", 2)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 6)
    old_hidden, old_weight, hidden, weight = make_inputs(5, 4, 7, torch.float64)
    bias = torch.randn(7, dtype=torch.float64)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    kernel = lambda h, w: _LinearKL.apply(False, old_hidden, old_weight, h, w, 0.7, bias)
    assert torch.autograd.gradcheck(kernel, leaves)
    assert torch.autograd.gradcheck(lambda h, w: dense_linear_kl(old_hidden, old_weight, h, w, 0.7, bias), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_equal_policies_have_none(shared, dtype, backend):
    _, _, hidden, weight = make_inputs(50, 16, 600, dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    old_weight = weight.detach() if shared else weight.detach().clone()
    kl = linear_kl(hidden.detach().clone(), old_weight, hidden, weight, temperature=0.7, backend=backend)
    kl.sum().backward()
    assert (kl == 0).all() and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_small_divergences_keep_their_size(backend):
    """Logits near 80 in a flat softmax: the error of lse alone is 4e-6 nats, that of the sum must not be."""
    _, _, hidden, weight = make_inputs(200, 16, 300)
    weight[:, 0], hidden[:, 0] = 8.0, 10.0
    old = hidden + 1e-3 * torch.randn_like(hidden)
    exact = dense_linear_kl(*(t.double() for t in (old, weight, hidden, weight)))
    got = linear_kl(old, weight, hidden, weight, backend=backend)
    error, plain = ((kl - exact).abs().max() for kl in (got, dense_linear_kl(old, weight, hidden, weight)))
    if backend == "torch":  # in one pass the sums of e^z cannot be compared term by term
        assert error < 2e-7 < plain
    assert error <= 2 * plain and (got >= 0).all()
    closer = hidden + 1e-6 * torch.randn_like(hidden)  # by less than the rounding of a sum
    assert (linear_kl(closer, weight, hidden, weight, backend=backend) >= 0).all()


def test_far_policies_stay_finite(backend):
    """All mass on one token in each policy, another one, +-80: KL = 160 + the mass of the rest, which is nil."""
    old_weight, weight = torch.full((600, 1), -80.0), torch.full((600, 1), -80.0)
    old_weight[3], weight[520] = 80.0, 80.0
    hidden = torch.ones(2, 1, requires_grad=True)
    kl = linear_kl(torch.ones(2, 1), old_weight, hidden, weight, backend=backend)
    kl.sum().backward()
    assert kl.tolist() == pytest.approx([160.0, 160.0], rel=1e-6) and torch.isfinite(hidden.grad).all()


def test_bias_bans_tokens(backend, small_tiles):
    inputs = make_inputs(30, 8, 200)
    bias = torch.zeros(200)
    bias[:70], bias[150:] = -1e30, -1e30  # the first tile whole
    kl, _, dweight = run(linear_kl, inputs, torch.float32, temperature=0.5, bias=bias, backend=backend)
    old_hidden, old_weight, hidden, weight = (t.double() for t in inputs)
    exact = dense_linear_kl(old_hidden, old_weight[70:150], hidden, weight[70:150], 0.5)
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=1e-6)
    assert (dweight[:70] == 0).all() and (dweight[150:] == 0).all() and torch.isfinite(dweight).all()


def test_old_policy_is_a_constant(backend):
    old_hidden, old_weight = torch.randn(5, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4, requires_grad=True)
    kl = linear_kl(old_hidden, old_weight, hidden, weight, backend=backend)
    kl.sum().backward()
    assert old_hidden.grad is None and old_weight.grad is None and weight.grad is not None
    exact = dense_linear_kl(*(t.detach().double() for t in (old_hidden, old_weight, hidden, weight)))
    torch.testing.assert_close(kl.detach().double(), exact, rtol=1e-5, atol=1e-6)


def test_no_tokens(backend):
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    linear_kl(torch.zeros(0, 4), torch.randn(9, 4), hidden, weight, backend=backend).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(9, 4)) and hidden.grad.shape == (0, 4)


@pytest.mark.parametrize("change, message", [
    (dict(old_hidden=torch.zeros(3, 8)), r"\(3, 8\).*\(4, 8\).*same tokens"),
    (dict(old_weight=torch.zeros(9, 8)), r"\(9, 8\).*\(10, 8\).*same vocabulary"),
    (dict(old_weight=torch.zeros(10, 7)), r"old_hidden.*\(4, 8\).*old_weight.*\(10, 7\)"),
    (dict(hidden=torch.zeros(4)), r"hidden.*\(4,\)"),
    (dict(old_hidden=torch.zeros(4, 8).half(), old_weight=torch.zeros(10, 8).half()), "torch.float16.*torch.float32"),
    (dict(bias=torch.zeros(3)), r"bias.*\(3,\).*\(10, 8\)"),
    (dict(temperature=-1.0), "temperature is -1.0"),
])
def test_bad_input(change, message):
    """Of the reference; test_launch.py compares the backends."""
    call = dict(old_hidden=torch.randn(4, 8), old_weight=torch.randn(10, 8), hidden=torch.randn(4, 8),
                weight=torch.randn(10, 8)) | change
    with pytest.raises(ValueError, match=message):
        linear_kl(**call)
