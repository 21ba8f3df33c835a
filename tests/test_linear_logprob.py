"""linear_logprob against a dense float64 log_softmax: values, every gradient, tiles, edges and bad input.

test_gpu.py calls the functions that need no fixture of this suite, under torch.device("cuda").
"""

# Tests unpack inputs of mixed types, and a `leaf.grad` that is None fails them anyway.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportUnusedExpression=false

import math

import pytest
import torch
from close import assert_no_worse

import cosmo_rl.kernels.linear_logprob as module
from cosmo_rl.kernels import launch, reference
from cosmo_rl.kernels.linear_logprob import Tiles, _LinearLogprob, linear_logprob, plan_splits
from cosmo_rl.kernels.reference import IGNORE_INDEX, dense_linear_logprob

CASES = [  # shape, temperature, with bias
    ((16, 32, 64), 1.0, True),  # aligned: TMA
    ((70, 43, 150), 0.5, True),  # nothing divides anything: pointers; the interpreter takes 15 ms for a tile
    ((40, 72, 90), 2.0, False),
    ((1, 8, 40), 2.0, True),  # one token
    ((3, 5, 1), 0.5, True),  # one token to choose from: log-prob and entropy are 0
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Absolute slack beside twice torch's own error, by dtype: (values, gradients).
SLACK = {torch.float32: (1e-6, 2e-6), torch.float16: (1e-4, 1e-4), torch.bfloat16: (1e-4, 1e-4)}


def make_inputs(n, d, v, dtype=torch.float32, ignore=True):
    """hidden, weight, targets with peaked softmaxes, targets at both ends of the vocabulary and ignored rows."""
    hidden, weight = torch.randn(n, d), torch.randn(v, d) * 4 / math.sqrt(d)
    targets = torch.randint(0, v, (n,))
    if n > 3:
        targets[0], targets[1] = 0, v - 1
        hidden[2] = weight[targets[2]] * 2
        if ignore:
            targets[3::7] = IGNORE_INDEX
    return hidden.to(dtype), weight.to(dtype), targets


def run(function, hidden, weight, targets, temperature, bias, dtype, upstream=("logprobs", "entropy"), **keywords):
    """[logprobs, entropy, dhidden, dweight, dbias] for fixed incoming gradients; dbias only if there is a bias."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
    if bias is not None:
        leaves.append(bias.detach().to(dtype if dtype == torch.float64 else torch.float32).requires_grad_())
    given = leaves[2] if bias is not None else None
    values = function(*leaves[:2], targets, temperature=temperature, bias=given, **keywords)[:2]
    at = torch.arange(len(targets), dtype=torch.float64)
    incoming = {"logprobs": torch.cos(3 * at) + 0.2, "entropy": torch.sin(5 * at)}
    torch.stack([(value * incoming[name]).sum() for name, value in zip(incoming, values, strict=True)
                 if name in upstream]).sum().backward()
    return [*(t.detach() for t in values), *(leaf.grad for leaf in leaves)]


def check(backend, inputs, dtype, temperature=1.0, bias=None, **keywords):
    """Values and gradients err at most twice as much as torch in the same dtype; returns them."""
    settings = (*inputs, temperature, bias)
    actual = run(linear_logprob, *settings, dtype, backend=backend, **keywords)
    same = run(dense_linear_logprob, *settings, dtype, **keywords)
    exact = run(dense_linear_logprob, *settings, torch.float64, **keywords)
    for index, (a, s, e) in enumerate(zip(actual, same, exact, strict=True)):
        assert_no_worse(a, s, e, atol=SLACK[dtype][index > 1] * (1 + e.abs().max().item()))
    assert actual[0].dtype == actual[1].dtype == torch.float32
    assert actual[2].dtype == actual[3].dtype == dtype
    assert (actual[0] <= 0).all() and (actual[1] >= 0).all()
    return actual


def check_values(inputs, dtype):
    """Those of the kernel that walks tiles, which has no part in the backward."""
    actual = linear_logprob(*inputs, backend="triton")[:2]
    hidden, weight, targets = inputs
    same, exact = (dense_linear_logprob(hidden.to(kind), weight.to(kind), targets) for kind in (dtype, torch.float64))
    for a, s, e in zip(actual, same, exact, strict=True):
        assert_no_worse(a, s, e, atol=SLACK[dtype][0] * (1 + e.abs().max().item()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, temperature, biased", CASES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_values_and_gradients(shape, temperature, biased, dtype, backend):
    inputs = make_inputs(*shape, dtype)
    check(backend, inputs, dtype, temperature, torch.randn(shape[2]) if biased else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_tiles", "poisoned_empty")
def test_many_tiles(dtype, backend):
    """Several groups of token blocks, splits of the vocabulary, tiles and chunks of the backward, all ragged."""
    check(backend, make_inputs(80, 40, 330, dtype), dtype, 0.6, torch.randn(330))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("as_on_a_gpu", "small_tiles", "poisoned_empty")
def test_the_rounding_of_a_gpu(dtype):
    """At a temperature that divides with a rounding; of rows that are sure of their target no log-prob is above 0."""
    hidden, weight, targets = make_inputs(40, 40, 330, dtype)
    hidden[10:30] = weight[targets[10:30].clamp(min=0)] * 2
    check("triton", (hidden, weight, targets), dtype, 0.6, torch.randn(330))


@pytest.mark.parametrize("upstream", ["logprobs", "entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_from_one_output_alone(upstream, dtype, backend):
    check(backend, make_inputs(40, 16, 90, dtype), dtype, 0.8, torch.randn(90), upstream=(upstream,))


@pytest.mark.parametrize("vocab", [152064, 151936])
def test_vocabularies_of_qwen(vocab, backend, monkeypatch):
    if launch.INTERPRET:  # a tile of the shipped shape takes it as long as one 30 times as wide
        monkeypatch.setattr(module, "forward_tiles", lambda *_: Tiles(16, 8192, 16, 4, 2))
        monkeypatch.setattr(module, "ROW_BLOCK", 8192)
    inputs = make_inputs(5, 16, vocab, torch.bfloat16)
    assert inputs[2][:2].tolist() == [0, vocab - 1]
    check(backend, inputs, torch.bfloat16)


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("interpreter")
def test_both_ways_to_load(tma, dtype, monkeypatch):
    inputs = make_inputs(130, 64, 264, dtype)
    assert launch.takes_tma(*inputs[:2]) or launch.capability(inputs[0].device) < (9, 0)
    if not tma:
        monkeypatch.setattr(launch, "takes_tma", lambda *tensors: False)
    check_values(inputs, dtype)


@pytest.mark.parametrize("programs", [1, 2, 50])
@pytest.mark.usefixtures("interpreter")
def test_any_number_of_programs(programs, monkeypatch):
    """One split and several, fewer items than programs and more."""
    monkeypatch.setattr(launch, "num_programs", lambda device: programs)
    monkeypatch.setattr(module, "forward_tiles", lambda *_: Tiles(16, 32, 16, 4, 2, group=2))
    assert plan_splits(3, 6, programs)[0] == {1: 1, 2: 2, 50: 6}[programs]
    check_values(make_inputs(40, 16, 190, torch.float16), torch.float16)


@pytest.mark.parametrize("vocab", [31, 65, 96])
@pytest.mark.usefixtures("interpreter")
def test_edges_of_tiles(vocab, monkeypatch):
    """Targets at both ends of each tile, and a last tile that lacks one column, has one, or is whole."""
    tiles, edges = Tiles(16, 32, 16, 4, 2, group=2), [0, 31, 32, 63, 64, vocab - 1]
    monkeypatch.setattr(module, "forward_tiles", lambda *_: tiles)
    monkeypatch.setattr(module, "ROW_BLOCK", 32)
    hidden, weight, targets = make_inputs(18, 16, vocab, ignore=False)
    targets = torch.tensor(edges * 3).clamp(max=vocab - 1)
    bias = torch.randn(vocab) - 20  # a column beyond the edge, whose logit is 0, would have all the mass
    for rows in (slice(0, 18), slice(1, 2), slice(2, 3)):  # many targets in a tile, and one alone
        check("triton", (hidden[rows], weight, targets[rows]), torch.float32, 0.7, bias)


@pytest.mark.parametrize("programs", [1, 3, 108, 132])
def test_splits_cover_the_vocabulary_once(programs):
    for blocks in (1, 2, 7, 100, 256, 5000):
        for tiles in (1, 2, 5, 63, 64, 65, 594, 2376):
            splits, per_split = plan_splits(blocks, tiles, programs)
            assert 1 <= splits <= 64 and (splits - 1) * per_split < tiles <= splits * per_split


def test_statistics_are_float32_whatever_the_input_dtype(backend):
    """bfloat16 inputs lose nothing beyond their own rounding: torch's bfloat16 log_softmax is 1000 times worse."""
    hidden, weight, targets = make_inputs(64, 48, 300, torch.bfloat16)
    exact, exact_entropy = dense_linear_logprob(hidden.double(), weight.double(), targets)
    got = linear_logprob(hidden, weight, targets, backend=backend)
    assert (got.logprobs - exact).abs().max() < 2e-5
    assert (got.entropy - exact_entropy).abs().max() < 2e-5
    assert (dense_linear_logprob(hidden, weight, targets)[0] - exact).abs().max() > 1e-2


@pytest.mark.parametrize("tiles", [False, True])
def test_gradcheck_in_float64(tiles, monkeypatch):
    if tiles:
        monkeypatch.setattr(reference, "TILE_ROWS", 2)
        monkeypatch.setattr(reference, "TILE_ELEMENTS", 6)
    hidden, weight, targets = make_inputs(5, 4, 7, torch.float64)
    bias = torch.randn(7, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    for temperature in (1.0, 0.7):
        function = lambda h, w, b, t=temperature: _LinearLogprob.apply(h, w, targets, t, b, False)[:2]
        assert torch.autograd.gradcheck(function, leaves)
        definition = lambda h, w, b, t=temperature: dense_linear_logprob(h, w, targets, t, b)
        assert torch.autograd.gradcheck(definition, leaves)


def test_lse(backend, small_tiles):
    hidden, weight, targets = make_inputs(50, 16, 200, ignore=False)
    stats = linear_logprob(hidden.requires_grad_(), weight, targets, temperature=0.5, backend=backend)
    exact = torch.logsumexp(hidden.double() @ weight.double().T / 0.5, dim=1)
    torch.testing.assert_close(stats.lse.double(), exact, rtol=1e-6, atol=1e-5)
    assert stats.logprobs.requires_grad and stats.entropy.requires_grad and not stats.lse.requires_grad


@pytest.mark.parametrize("size", [80.0, 1e4])
def test_extreme_logits(size, backend):
    """Logits of exactly +-size: the float32 answer is the float64 one to the last bits, in values and gradients."""
    v = 600
    pattern = torch.where(torch.arange(v) % 3 == 0, size, -size)
    pattern[7] = size - 1.0
    hidden, weight = torch.ones(4, 1, requires_grad=True), pattern[:, None].clone().requires_grad_()
    targets = torch.tensor([0, 1, 7, v - 1])
    stats = linear_logprob(hidden, weight, targets, backend=backend)
    exact, entropy = dense_linear_logprob(torch.ones(4, 1).double(), pattern[:, None].double(), targets)
    rtol = 3e-6 if hidden.is_cuda else 3e-7  # a GPU's exp and log are good to a few units in the last place
    torch.testing.assert_close(stats.logprobs.double(), exact, rtol=rtol, atol=0)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=rtol, atol=0)
    stats.logprobs.sum().backward()
    p = torch.softmax(pattern.double(), 0)
    onehot = torch.zeros(v).double().index_add_(0, targets, torch.ones(4).double())
    torch.testing.assert_close(weight.grad[:, 0].double(), onehot - 4 * p, rtol=rtol, atol=1e-6)
    assert torch.isfinite(hidden.grad).all()


def test_ignored_rows_take_no_part(backend):
    hidden, weight, targets = make_inputs(20, 8, 30, ignore=False)
    targets[::3] = IGNORE_INDEX
    hidden[::3] = float("nan")  # a NaN in an ignored row must reach nothing
    bias = torch.full((30,), 100.0)
    hidden.requires_grad_(), weight.requires_grad_()
    stats = linear_logprob(hidden, weight, targets, bias=bias, backend=backend)
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
    keep = targets != IGNORE_INDEX
    assert all((t[~keep] == 0).all() for t in stats)
    assert (hidden.grad[~keep] == 0).all() and (hidden.grad[keep] != 0).any()
    alone = weight.detach().clone().requires_grad_()
    part = linear_logprob(hidden.detach()[keep], alone, targets[keep], bias=bias, backend=backend)
    (part.logprobs.sum() + part.entropy.sum()).backward()
    # Logits of 100 have steps of 8e-6, and another number of tokens may sum in another order.
    torch.testing.assert_close(stats.logprobs[keep], part.logprobs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(weight.grad, alone.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [0, 5])
def test_nothing_to_score(n, backend):
    """No tokens, and only ignored ones: zeros, and zero gradients that still exist (FSDP needs the graph)."""
    hidden, weight = torch.randn(n, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    bias = torch.zeros(9, requires_grad=True)
    stats = linear_logprob(hidden, weight, torch.full((n,), IGNORE_INDEX), bias=bias, backend=backend)
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
    assert all(t.shape == (n,) and (t == 0).all() for t in stats)
    for leaf in (hidden, weight, bias):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.usefixtures("interpreter")
def test_rows_without_gradient_are_dropped_before_any_product(monkeypatch):
    """A zero advantage, a clipped token or an ignored one costs no product of the backward."""
    seen, head_gradients = [], module.head_gradients

    def spy(states, *args, **keywords):
        seen.append(states)
        return head_gradients(states, *args, **keywords)

    monkeypatch.setattr(module, "head_gradients", spy)
    hidden, weight, targets = make_inputs(40, 16, 90)
    coefficient = torch.where(torch.arange(40) % 4 == 1, 0.0, 1.0)
    grads = {}
    for backend in ("torch", "triton"):
        a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        (linear_logprob(a, b, targets, backend=backend).logprobs * coefficient).sum().backward()
        grads[backend] = a.grad, b.grad
    live = (targets != IGNORE_INDEX) & (coefficient != 0)
    assert 10 < live.sum() < 30 and len(seen) == 1 and torch.equal(seen[0], hidden[live])
    assert (grads["triton"][0][~live] == 0).all()
    for x, y in zip(*grads.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)  # logits of up to 40, with steps of 4e-6


def test_frozen_operands_cost_no_product(backend, products):
    hidden, weight, targets = make_inputs(20, 8, 30, ignore=False)
    bias = torch.zeros(30)

    def gradients(*learns):
        leaves = [t.clone().requires_grad_(learn) for t, learn in zip((hidden, weight, bias), learns, strict=True)]
        products.clear()
        stats = linear_logprob(*leaves[:2], targets, bias=leaves[2], backend=backend)
        assert not products
        (stats.logprobs.sum() + stats.entropy.sum()).backward()
        return [leaf.grad for leaf in leaves], list(products)

    logits, dhidden, dweight = ((20, 8), (8, 30)), ((20, 30), (30, 8)), ((30, 20), (20, 8))
    full, spent = gradients(True, True, True)
    assert backend == "torch" or spent == [logits, dhidden, dweight]
    for learns, needed in (((True, False, False), [logits, dhidden]), ((False, True, True), [logits, dweight]),
                           ((True, True, False), [logits, dhidden, dweight])):
        found, spent = gradients(*learns)
        assert backend == "torch" or spent == needed
        for grad, whole, learn in zip(found, full, learns, strict=True):
            assert torch.equal(grad, whole) if learn else grad is None


def test_float16_gradients_survive_small_coefficients(backend):
    """1e-6 x a probability is below float16's smallest number; the sum over tokens, scaled, is not."""
    hidden, weight, targets = make_inputs(40, 16, 300, torch.float16, ignore=False)
    found = []
    for coefficient in (1e-6, 1.0):
        leaf = (weight * 1.0).requires_grad_()
        (linear_logprob(hidden, leaf, targets, backend=backend).logprobs.sum() * coefficient).backward()
        found.append(leaf.grad.float() / coefficient)
    # The result itself is float16: half of its smallest number, 6e-8.
    torch.testing.assert_close(*found, rtol=2e-3, atol=3e-8 / 1e-6)
    assert (found[1].abs() > 1).any()


@pytest.mark.parametrize("temperature", [1e-5, 1e6])
def test_float16_gradients_at_any_temperature(temperature, backend):
    """Those of the logits, which 1 / temperature multiplies, neither overflow nor round to 0."""
    hidden, weight, targets = make_inputs(20, 16, 90)
    hidden, weight = (t.mul(math.sqrt(temperature)).half() for t in (hidden, weight))
    found, exact = (run(function, hidden, weight, targets, temperature, None, dtype, **keywords)[2:] for
                    function, dtype, keywords in ((linear_logprob, torch.float16, {"backend": backend}),
                                                  (dense_linear_logprob, torch.float64, {})))
    for a, e in zip(found, exact, strict=True):
        assert (a - e).norm() < 1e-3 * e.norm()


def test_bias_bans_tokens(backend, small_tiles):
    """-1e30 gives the softmax over the other tokens, at any temperature, and no gradient to the banned row."""
    hidden, weight, targets = make_inputs(40, 8, 200, ignore=False)
    banned = torch.cat((torch.arange(64), torch.arange(164, 200)))  # all of the first and of the last tile among them
    targets = targets.clamp(64, 163)
    bias = torch.zeros(200).index_fill_(0, banned, -1e30)
    weight.requires_grad_()
    stats = linear_logprob(hidden, weight, targets, bias=bias, temperature=0.5, backend=backend)
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
    logprobs, entropy = dense_linear_logprob(hidden.double(), weight[64:164].double(), targets - 64, 0.5)
    torch.testing.assert_close(stats.logprobs.double(), logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    assert (weight.grad[banned] == 0).all() and torch.isfinite(weight.grad).all()


def test_unchecked_bad_target_gives_nan_and_reads_nothing(backend):
    hidden, weight, targets = make_inputs(6, 8, 10, ignore=False)
    good = linear_logprob(hidden, weight, targets, backend=backend)
    others = torch.arange(6) != 4
    for value in (10, -1, 2**40, -(2**62)):
        bad = targets.clone()
        bad[4] = value
        leaf = weight.clone().requires_grad_()
        stats = linear_logprob(hidden, leaf, bad, check=False, backend=backend)
        assert all(torch.isnan(t[4]) for t in stats)
        assert all(torch.equal(a[others], b[others]) for a, b in zip(stats, good, strict=True))
        stats.logprobs.sum().backward()
        assert torch.isnan(leaf.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_every_run(dtype, backend):
    """Two calls, and two backward passes of one graph."""
    inputs = make_inputs(6, 16, 300, dtype)
    first, second = (run(linear_logprob, *inputs, 0.7, torch.zeros(300), dtype, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    leaf = inputs[0].clone().requires_grad_()
    loss = linear_logprob(leaf, *inputs[1:], backend=backend).logprobs.sum()
    loss.backward(retain_graph=True)
    once, leaf.grad = leaf.grad, None
    loss.backward()
    assert torch.equal(leaf.grad, once)


def test_same_bits_in_any_mode(backend):
    size = (256, 512, 256) if backend == "torch" else (64, 48, 130)  # oneDNN takes its fast path only when large
    hidden, weight, targets = make_inputs(*size)
    first = linear_logprob(hidden, weight, targets, backend=backend)
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        mixed = linear_logprob(hidden, weight, targets, backend=backend)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # oneDNN would multiply float32 in bfloat16
        leaf = weight.clone().requires_grad_()
        medium = linear_logprob(hidden, leaf, targets, backend=backend)
        medium.logprobs.sum().backward()
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"  # the caller's settings are back
    finally:
        torch.set_float32_matmul_precision(before)
    plain = weight.clone().requires_grad_()
    linear_logprob(hidden, plain, targets, backend=backend).logprobs.sum().backward()
    assert torch.equal(leaf.grad, plain.grad)
    for other in (mixed, medium):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_any_layout(backend):
    """Transposed and strided hidden, weight and targets."""
    hidden, weight, targets = make_inputs(20, 32, 70)
    bias = torch.randn(70)
    plain = run(linear_logprob, hidden, weight, targets, 1.0, bias, torch.float32, backend=backend)
    layouts = {
        "transposed": lambda t: t.T.contiguous().T,
        "strided rows": lambda t: t.repeat(1, 3)[:, 32:64],
        "every second row": lambda t: t.repeat_interleave(2, 0)[1::2],
        "off the 16 bytes": lambda t: torch.cat((t[:, :1], t), 1)[:, 1:],
    }
    for name, layout in layouts.items():
        h, w = layout(hidden), layout(weight)
        assert not h.is_contiguous() and not w.is_contiguous()
        found = run(linear_logprob, h, w, targets.repeat_interleave(2)[::2], 1.0, bias, torch.float32, backend=backend)
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_strided_bias(backend):
    inputs, bias = make_inputs(20, 8, 30), torch.randn(60)
    plain = linear_logprob(*inputs, bias=bias[::2].clone(), backend=backend)
    assert torch.equal(linear_logprob(*inputs, bias=bias[::2], backend=backend).logprobs, plain.logprobs)


def bad_calls():
    h, w, y = torch.randn(4, 8), torch.randn(10, 8), torch.tensor([0, 1, 2, 9])
    yield "hidden shape", dict(hidden=torch.randn(2, 2, 8)), r"\(2, 2, 8\)"
    yield "weight shape", dict(weight=torch.randn(10)), r"\(10,\)"
    yield "dims disagree", dict(weight=torch.randn(10, 7)), r"\(4, 8\).*\(10, 7\)"
    yield "empty vocabulary", dict(weight=torch.randn(0, 8)), r"\(0, 8\)"
    yield "integer hidden", dict(hidden=torch.ones(4, 8, dtype=torch.int64)), "torch.int64"
    yield "float64 hidden", dict(hidden=h.double(), weight=w.double()), "torch.float64"
    yield "dtypes disagree", dict(weight=w.half()), "torch.float32.*torch.float16"
    yield "devices disagree", dict(weight=w.to("meta")), "cpu.*meta"
    yield "targets shape", dict(targets=y[:3]), r"\(3,\).*\(4, 8\)"
    yield "targets dtype", dict(targets=y.int()), "torch.int32.*torch.int64"
    yield "target too large", dict(targets=torch.tensor([0, 10, 2, 9])), r"targets\[1\] is 10 .*10 rows.*-100"
    yield "target negative", dict(targets=torch.tensor([0, 1, -1, 9])), r"targets\[2\] is -1 .*\[0, 10\)"
    yield "bias shape", dict(bias=torch.zeros(9)), r"\(9,\).*\(10, 8\)"
    yield "bias dtype", dict(bias=torch.zeros(10).half()), "torch.float16"
    yield "bias infinite", dict(bias=torch.full((10,), -math.inf)), r"bias\[0\] is -inf.*-1e30"
    yield "bias lowest", dict(bias=torch.full((10,), torch.finfo(torch.float32).min)), r"bias\[0\] is -3\.4.*-1e30"
    for value in (0.0, -1.0, math.nan, math.inf):
        yield f"temperature {value}", dict(temperature=value), str(value)
    yield "unknown backend", dict(backend="cuda"), "'cuda'.*'torch'"
    yield "unknown backward", dict(backward="tiles"), "'tiles'.*'exact'"
    yield "tile_threshold", dict(tile_threshold=-1.0), "-1.0"


@pytest.mark.parametrize("change, message", [pytest.param(c, m, id=i) for i, c, m in bad_calls()])
def test_bad_input(change, message):
    """Of the reference; test_launch.py compares the backends."""
    call = dict(hidden=torch.randn(4, 8), weight=torch.randn(10, 8), targets=torch.tensor([0, 1, 2, 9])) | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**call)
