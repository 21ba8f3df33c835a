"""linear_logprob against a dense float64 log_softmax: values, every gradient, tiles, edges and bad input."""

# Tests unpack inputs of mixed types, and a `leaf.grad` that is None fails them anyway.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportUnusedExpression=false

import math

import pytest
import torch
from close import assert_no_worse
from torch.utils._python_dispatch import TorchDispatchMode

from cosmo_rl.kernels import reference
from cosmo_rl.kernels.linear_cpgd import linear_cpgd
from cosmo_rl.kernels.linear_kl import linear_kl
from cosmo_rl.kernels.linear_logprob import _LinearLogprob, linear_logprob
from cosmo_rl.kernels.reference import IGNORE_INDEX, dense_linear_logprob

SHAPES = [
    (16, 32, 64),  # aligned
    (252, 123, 507),  # nothing divides anything
    (1, 8, 40),  # one token
    (3, 5, 1),  # one token to choose from: log-prob and entropy are 0
]
# Absolute slack beside twice torch's own error, by dtype: (values, gradients).
SLACK = {torch.float32: (1e-6, 2e-6), torch.float16: (1e-4, 1e-4), torch.bfloat16: (1e-4, 1e-4)}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of at most 32 tokens x 64 words, so that small inputs span many, the last ones ragged."""
    monkeypatch.setattr(reference, "TILE_ROWS", 32)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 32 * 64)


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


def run(function, hidden, weight, targets, temperature, bias, dtype):
    """(logprobs, entropy, dhidden, dweight, dbias) for fixed random incoming gradients."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
    leaves.append(bias.detach().to(dtype if dtype == torch.float64 else torch.float32).requires_grad_())
    generator = torch.Generator().manual_seed(1)
    dlogprobs, dentropy = torch.randn(2, len(targets), generator=generator, dtype=torch.float64)
    logprobs, entropy = function(*leaves[:2], targets, temperature=temperature, bias=leaves[2])[:2]
    ((logprobs * dlogprobs).sum() + (entropy * dentropy).sum()).backward()
    return [logprobs.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients(shape, dtype, temperature, small_tiles, poisoned_empty):
    hidden, weight, targets = make_inputs(*shape, dtype)
    bias = torch.randn(shape[2])
    actual = run(linear_logprob, hidden, weight, targets, temperature, bias, dtype)
    same = run(dense_linear_logprob, hidden, weight, targets, temperature, bias, dtype)
    exact = run(dense_linear_logprob, hidden, weight, targets, temperature, bias, torch.float64)
    slack = SLACK[dtype]
    for index, (a, s, e) in enumerate(zip(actual, same, exact, strict=True)):
        assert_no_worse(a, s, e, atol=slack[index > 1] * (1 + e.abs().max().item()))
    assert actual[0].dtype == actual[1].dtype == torch.float32
    assert actual[2].dtype == actual[3].dtype == dtype
    assert (actual[0] <= 0).all() and (actual[1] >= 0).all()


def test_statistics_are_float32_whatever_the_input_dtype():
    """bfloat16 inputs lose nothing beyond their own rounding: torch's bfloat16 log_softmax is 1000 times worse."""
    hidden, weight, targets = make_inputs(64, 48, 300, torch.bfloat16)
    exact, exact_entropy = dense_linear_logprob(hidden.double(), weight.double(), targets)
    got = linear_logprob(hidden, weight, targets)
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
        function = lambda h, w, b, t=temperature: _LinearLogprob.apply(h, w, targets, t, b)[:2]
        assert torch.autograd.gradcheck(function, leaves)
        definition = lambda h, w, b, t=temperature: dense_linear_logprob(h, w, targets, t, b)
        assert torch.autograd.gradcheck(definition, leaves)


def test_lse(small_tiles):
    hidden, weight, targets = make_inputs(50, 16, 200, ignore=False)
    stats = linear_logprob(hidden.requires_grad_(), weight, targets, temperature=0.5)
    exact = torch.logsumexp(hidden.double() @ weight.double().T / 0.5, dim=1)
    torch.testing.assert_close(stats.lse.double(), exact, rtol=1e-6, atol=1e-5)
    assert stats.logprobs.requires_grad and stats.entropy.requires_grad and not stats.lse.requires_grad


@pytest.mark.parametrize("size", [80.0, 1e4])
def test_extreme_logits(size, small_tiles):
    """Logits of exactly +-size: the float32 answer is the float64 one to the last bits, in values and gradients."""
    v = 300
    pattern = torch.where(torch.arange(v) % 3 == 0, size, -size)
    pattern[7] = size - 1.0
    hidden, weight = torch.ones(4, 1, requires_grad=True), pattern[:, None].clone().requires_grad_()
    targets = torch.tensor([0, 1, 7, v - 1])
    stats = linear_logprob(hidden, weight, targets)
    exact, entropy = dense_linear_logprob(torch.ones(4, 1).double(), pattern[:, None].double(), targets)
    torch.testing.assert_close(stats.logprobs.double(), exact, rtol=3e-7, atol=0)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=3e-7, atol=0)
    stats.logprobs.sum().backward()
    p = torch.softmax(pattern.double(), 0)
    onehot = torch.zeros(v).double().index_add_(0, targets, torch.ones(4).double())
    torch.testing.assert_close(weight.grad[:, 0].double(), onehot - 4 * p, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(hidden.grad).all()


def test_ignored_rows_take_no_part():
    hidden, weight, targets = make_inputs(20, 8, 30, ignore=False)
    targets[::3] = IGNORE_INDEX
    hidden[::3] = float("nan")  # a NaN in an ignored row must reach nothing
    bias = torch.full((30,), 100.0)
    hidden.requires_grad_(), weight.requires_grad_()
    stats = linear_logprob(hidden, weight, targets, bias=bias)
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
    keep = targets != IGNORE_INDEX
    assert all((t[~keep] == 0).all() for t in stats)
    assert (hidden.grad[~keep] == 0).all() and (hidden.grad[keep] != 0).any()
    alone = weight.detach().clone().requires_grad_()
    part = linear_logprob(hidden.detach()[keep], alone, targets[keep], bias=bias)
    (part.logprobs.sum() + part.entropy.sum()).backward()
    torch.testing.assert_close(stats.logprobs[keep], part.logprobs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weight.grad, alone.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [0, 5])
def test_nothing_to_score(n):
    """No tokens, and only ignored ones: zeros, and zero gradients that still exist (FSDP needs the graph)."""
    hidden, weight = torch.randn(n, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    stats = linear_logprob(hidden, weight, torch.full((n,), IGNORE_INDEX))
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
    assert all(t.shape == (n,) and (t == 0).all() for t in stats)
    assert torch.equal(hidden.grad, torch.zeros(n, 4)) and torch.equal(weight.grad, torch.zeros(9, 4))


def test_bias_bans_tokens(small_tiles):
    """-1e30 gives the softmax over the other tokens, at any temperature, and no gradient to the banned row."""
    hidden, weight, targets = make_inputs(40, 8, 100, ignore=False)
    banned = torch.arange(64, 100)  # all of the last tile among them
    targets = targets.clamp(max=63)
    bias = torch.zeros(100).index_fill_(0, banned, -1e30)
    weight.requires_grad_()
    stats = linear_logprob(hidden, weight, targets, bias=bias, temperature=0.5)
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
    logprobs, entropy = dense_linear_logprob(hidden.double(), weight[:64].double(), targets, 0.5)
    torch.testing.assert_close(stats.logprobs.double(), logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    assert (weight.grad[64:] == 0).all() and torch.isfinite(weight.grad).all()


def test_unchecked_bad_target_gives_nan_and_reads_nothing():
    hidden, weight, targets = make_inputs(6, 8, 10, ignore=False)
    good = linear_logprob(hidden, weight, targets)
    for value in (10, -1, 2**40):
        bad = targets.clone()
        bad[4] = value
        leaf = weight.clone().requires_grad_()
        stats = linear_logprob(hidden, leaf, bad, check=False)
        assert all(torch.isnan(t[4]) for t in stats)
        others = torch.arange(6) != 4
        assert all(torch.equal(a[others], b[others]) for a, b in zip(stats, good, strict=True))
        stats.logprobs[others].sum().backward()
        assert torch.isnan(leaf.grad).all()  # loud even when the caller drops the bad row


def test_same_bits_in_any_layout_mode_and_run():
    hidden, weight, targets = make_inputs(256, 512, 256)  # large enough for oneDNN to take its fast path
    first = linear_logprob(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = linear_logprob(hidden, weight, targets)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # oneDNN would multiply float32 in bfloat16
        medium = linear_logprob(hidden, weight.clone().requires_grad_(), targets)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"  # the caller's settings are back
    finally:
        torch.set_float32_matmul_precision(before)
    for other in (linear_logprob(hidden, weight, targets), mixed, medium):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    strided = linear_logprob(hidden.T.contiguous().T, weight.repeat(1, 2)[:, :512], targets.repeat_interleave(2)[::2])
    torch.testing.assert_close(strided, first, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("kernel", ["linear_logprob", "linear_cpgd", "linear_kl"])
def test_no_tensor_of_all_logits(kernel, monkeypatch):
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1 << 16)
    monkeypatch.setattr(reference, "TILE_ROWS", 64)
    n, d, v = 300, 8, 5000
    hidden, weight, targets = make_inputs(n, d, v)
    hidden.requires_grad_(), weight.requires_grad_()
    vector = torch.ones(n)
    with LargestTensor() as seen:
        if kernel == "linear_logprob":
            stats = linear_logprob(hidden, weight, targets)
            (stats.logprobs.sum() + stats.entropy.sum()).backward()
        elif kernel == "linear_cpgd":
            linear_cpgd(hidden, weight, targets, -vector, vector, vector).loss.backward()
        else:
            linear_kl(hidden * 0.9, weight, hidden, weight).sum().backward()
    assert v * d <= seen.largest <= 1 << 16 < n * v


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
    for value in (0.0, -1.0, math.nan, math.inf):
        yield f"temperature {value}", dict(temperature=value), str(value)
    yield "no Triton yet", dict(backend="triton"), "no Triton backend.*'torch'"
    yield "unknown backend", dict(backend="cuda"), "'cuda'.*'torch'"
    yield "unknown backward", dict(backward="tiles"), "'tiles'.*'exact'"
    yield "tile_threshold", dict(tile_threshold=-1.0), "-1.0"


@pytest.mark.parametrize("change, message", [pytest.param(c, m, id=i) for i, c, m in bad_calls()])
def test_bad_input(change, message):
    call = dict(hidden=torch.randn(4, 8), weight=torch.randn(10, 8), targets=torch.tensor([0, 1, 2, 9])) | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**call)
