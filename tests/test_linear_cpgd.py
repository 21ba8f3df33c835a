"""linear_cpgd against linear_logprob followed by cpgd_objective, and against autograd of the dense definition.

test_gpu.py calls the functions that need no fixture of this suite, under torch.device("cuda").
"""

# Tests unpack inputs of mixed types, and a `leaf.grad` that is None fails them anyway.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportUnusedExpression=false

import math
import os
import subprocess
import sys

import pytest
import torch
from close import assert_no_worse
from memory import Allocations
from torch._subclasses.fake_tensor import FakeTensorMode

import cosmo_rl.kernels.linear_cpgd as module
from cosmo_rl.kernels import gemm, launch
from cosmo_rl.kernels.cpgd_objective import cpgd_objective
from cosmo_rl.kernels.linear_cpgd import linear_cpgd
from cosmo_rl.kernels.linear_logprob import linear_logprob
from cosmo_rl.kernels.reference import IGNORE_INDEX, dense_cpgd, dense_linear_logprob

SETTINGS = dict(clip_eps_low=0.2, clip_eps_high=0.3, drift_coef=0.05, drift_clip=1.0)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_inputs(n, d, v, dtype=torch.float32):
    """(hidden, weight, targets, old_logprobs, advantages, token_weights); old log-probs in and out of the clip."""
    hidden, weight = torch.randn(n, d).to(dtype), (torch.randn(v, d) * 3 / math.sqrt(d)).to(dtype)
    targets = torch.randint(0, v, (n,))
    if n > 4:
        targets[4::9] = IGNORE_INDEX
    old = linear_logprob(hidden, weight, targets).logprobs + 0.4 * torch.randn(n)
    return hidden, weight, targets, old, torch.randn(n), torch.rand(n) / max(n, 1)


def dense_run(hidden, weight, targets, old, advantages, token_weights, dtype, temperature=1.0, bias=None):
    """(loss, dhidden, dweight) by autograd through the whole N x V log_softmax, the objective itself in float64."""
    h, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
    logprobs = dense_linear_logprob(h, w, targets, temperature, bias)[0].double()
    per_token = dense_cpgd(logprobs, old.double(), advantages.double(), **SETTINGS)
    loss = (token_weights.double() * per_token).masked_fill(targets == IGNORE_INDEX, 0.0).sum()
    loss.backward()
    return loss.detach(), h.grad, w.grad


def check(backend, inputs, dtype, temperature=1.0, bias=None):
    """Loss and gradients err at most twice as much as torch in the same dtype."""
    hidden, weight = (t.clone().requires_grad_() for t in inputs[:2])
    out = linear_cpgd(hidden, weight, *inputs[2:], temperature=temperature, bias=bias, backend=backend, **SETTINGS)
    out.loss.backward()
    same = dense_run(*inputs, dtype, temperature, bias)
    exact = dense_run(*inputs, torch.float64, temperature, bias)
    # Half a unit in the last place of the largest gradient, which the result's dtype imposes.
    for actual, s, e in zip((out.loss.detach(), hidden.grad, weight.grad), same, exact, strict=True):
        assert_no_worse(actual, s, e, atol=e.abs().max().item() * torch.finfo(dtype).eps + 1e-7)
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    logprobs, entropy = dense_linear_logprob(*(t.double() for t in inputs[:2]), inputs[2], temperature, bias)
    # A few units in the last place of the largest logits, which are 30 to 80.
    torch.testing.assert_close(out.logprobs.double(), logprobs, rtol=0, atol=2e-5)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, temperature, biased", [
    ((70, 43, 150), 0.5, True), ((16, 32, 64), 1.0, False), ((1, 8, 40), 2.0, True)], ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_against_dense_autograd(shape, temperature, biased, dtype, backend):
    check(backend, make_inputs(*shape, dtype), dtype, temperature, torch.randn(shape[2]) if biased else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_tiles", "poisoned_empty")
def test_many_tiles(dtype, backend):
    check(backend, make_inputs(50, 40, 330, dtype), dtype, 0.8, torch.randn(330))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("as_on_a_gpu", "small_tiles", "poisoned_empty")
def test_the_rounding_of_a_gpu(dtype):
    check("triton", make_inputs(40, 40, 330, dtype), dtype, 0.6, torch.randn(330))


@pytest.mark.parametrize("vocab", [31, 64, 65])
@pytest.mark.usefixtures("interpreter")
def test_edges_of_blocks(vocab, monkeypatch):
    """Targets at both ends of each block of a row; the last block lacks one column, has one, or is whole."""
    monkeypatch.setattr(module, "ROW_BLOCK", 32)
    hidden, weight, _, old, advantages, token_weights = make_inputs(12, 16, vocab)
    targets = torch.tensor([0, 31, 32, 63, 64, vocab - 1] * 2).clamp(max=vocab - 1)
    bias = torch.randn(vocab) - 20  # a column beyond the edge, whose logit is 0, would have all the mass
    old = dense_linear_logprob(hidden, weight, targets, 0.7, bias)[0] + 0.4 * torch.randn(12)
    check("triton", (hidden, weight, targets, old, advantages, token_weights), torch.float32, 0.7, bias)


@pytest.mark.parametrize("vocab", [152064, 151936])
def test_vocabularies_of_qwen(vocab, backend, monkeypatch):
    if launch.INTERPRET:
        monkeypatch.setattr(module, "ROW_BLOCK", 8192)
    inputs = make_inputs(4, 16, vocab, torch.bfloat16)
    inputs[2][0], inputs[2][1] = 0, vocab - 1
    check(backend, inputs, torch.bfloat16)


def test_extreme_logits(backend):
    """Logits of exactly +-80, in both ends of the clip: values and gradients to the last bits of float32."""
    pattern = torch.where(torch.arange(600) % 3 == 0, 80.0, -80.0)
    hidden, weight = torch.ones(4, 1), pattern[:, None].clone()
    targets, ones = torch.tensor([0, 1, 7, 599]), torch.ones(4)
    old, advantages = torch.tensor([-5.0, -160.0, -170.0, -5.5]), torch.tensor([1.0, -1.0, 1.0, 2.0])
    check(backend, (hidden, weight, targets, old, advantages, ones), torch.float32)


def test_against_the_two_separate_calls(backend):
    inputs = make_inputs(50, 20, 70)
    targets, old, advantages, token_weights = inputs[2:]
    a, b = ([t.clone().requires_grad_() for t in inputs[:2]] for _ in range(2))
    out = linear_cpgd(*a, *inputs[2:], backend=backend, **SETTINGS)
    out.loss.backward()
    stats = linear_logprob(*b, targets, backend=backend)
    terms = cpgd_objective(stats.logprobs, old, advantages, backend=backend, **SETTINGS)
    keep = targets != IGNORE_INDEX
    loss = (token_weights * terms.loss)[keep].sum()
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=1e-7)
    # On the reference these are one computation; on Triton the products differ in the order of their sums.
    atol = 0.0 if backend == "torch" else 1e-5
    for one, other in ((out.logprobs, stats.logprobs), (out.entropy, stats.entropy),
                       (out.drift[keep], terms.drift[keep])):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)
    assert torch.equal(out.clipped, terms.clipped & keep) and out.clipped.any() and not out.clipped.all()
    assert (out.drift[~keep] == 0).all()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=atol / 100 + 1e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_with_and_without_gradient(dtype, backend):
    """On policy the ratio is exactly 1, whichever call made the old log-probs."""
    hidden, weight, *rest = make_inputs(30, 24, 300, dtype)
    plain = linear_cpgd(hidden, weight, *rest, backend=backend)
    trained = linear_cpgd(hidden.requires_grad_(), weight.requires_grad_(), *rest, backend=backend)
    with torch.no_grad():
        silent = linear_cpgd(hidden, weight, *rest, backend=backend)
        scored = linear_logprob(hidden, weight, rest[0], backend=backend)
    for other in (trained, silent):
        assert all(torch.equal(x, y) for x, y in zip(plain, other, strict=True))
    assert [t.requires_grad for t in trained] == [True, False, False, False, False]
    assert not any(t.requires_grad for t in (*plain, *silent))
    torch.testing.assert_close(scored.logprobs, plain.logprobs, rtol=0, atol=0 if backend == "torch" else 1e-5)


def test_ratio_is_one_without_old_logprobs(backend):
    """Exactly what old_logprobs = logprobs gives: loss 0, gradient of -A logprob, nothing clipped, no drift."""
    hidden, weight, targets, _, advantages, token_weights = make_inputs(30, 12, 50)
    a, b = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    first = linear_cpgd(*a, targets, None, advantages, token_weights, backend=backend)
    first.loss.backward()
    second = linear_cpgd(*b, targets, first.logprobs, advantages, token_weights, backend=backend)
    second.loss.backward()
    assert first.loss.item() == second.loss.item() == 0.0
    assert not first.clipped.any() and (first.drift == 0).all()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(a, b, strict=True))
    c = [t.clone().requires_grad_() for t in (hidden, weight)]
    (-token_weights * advantages * linear_logprob(*c, targets, backend=backend).logprobs).sum().backward()
    torch.testing.assert_close(a[1].grad, c[1].grad, rtol=1e-5, atol=2e-7)


def test_backward_scales_out_of_place(backend):
    hidden, weight, *rest = make_inputs(20, 8, 30)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cpgd(hidden, weight, *rest, backend=backend).loss
    first = torch.autograd.grad(loss * 3, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(x, y * 3) for x, y in zip(first, second, strict=True))


def test_frozen_operands_cost_no_product(backend, products):
    hidden, weight, *rest = make_inputs(20, 8, 30)
    logits, dhidden, dweight = ((20, 8), (8, 30)), ((20, 30), (30, 8)), ((30, 20), (20, 8))
    full = None
    for learns, spent in (((True, True), [logits, dhidden, dweight]), ((True, False), [logits, dhidden]),
                          ((False, True), [logits, dweight]), ((False, False), [logits])):
        leaves = [t.clone().requires_grad_(learn) for t, learn in zip((hidden, weight), learns, strict=True)]
        products.clear()
        loss = linear_cpgd(*leaves, *rest, backend=backend).loss
        assert backend == "torch" or products == spent
        if any(learns):
            loss.backward()
        full = full or [leaf.grad for leaf in leaves]
        for leaf, whole, learn in zip(leaves, full, learns, strict=True):
            assert torch.equal(leaf.grad, whole) if learn else leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_every_run(dtype, backend):
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        hidden, weight, *rest = make_inputs(20, 24, 300, dtype)
        out = linear_cpgd(hidden.requires_grad_(), weight.requires_grad_(), *rest, backend=backend)
        out.loss.backward()
        found.append((*out, hidden.grad, weight.grad))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_bounds_per_token(backend, small_tiles):
    """(N,) bounds reach the token they belong to, in every chunk."""
    hidden, weight, *rest = make_inputs(48, 12, 50)
    low, high = torch.rand(48) * 0.5, torch.rand(48)
    settings = dict(clip_eps_low=low, clip_eps_high=high, backend=backend)
    out = linear_cpgd(hidden, weight, *rest, **settings)
    terms = cpgd_objective(out.logprobs, *rest[1:3], **settings)
    keep = rest[0] != IGNORE_INDEX
    losses = (rest[3] * terms.loss)[keep]
    # Losses of both signs cancel: what float32 rounds is of the size of the parts, not of their sum.
    torch.testing.assert_close(out.loss, losses.sum(), rtol=0, atol=1e-6 * losses.abs().sum().item())
    assert torch.equal(out.clipped, terms.clipped & keep) and 5 < out.clipped.sum() < 43


@pytest.mark.parametrize("strided", ["vectors", "bias", "hidden and weight"])
def test_any_layout(strided, backend):
    hidden, weight, *vectors = make_inputs(14, 8, 30)
    bias = torch.randn(30)
    plain = linear_cpgd(hidden, weight, *vectors, bias=bias, backend=backend)
    if strided == "vectors":
        vectors = [t.repeat_interleave(2)[::2] for t in vectors]
    elif strided == "bias":
        bias = bias.repeat_interleave(2)[::2]
    else:
        hidden, weight = hidden.T.contiguous().T, weight.repeat(1, 2)[:, :8]
    found = linear_cpgd(hidden, weight, *vectors, bias=bias, backend=backend)
    for x, y in zip(plain, found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_float16_gradients_survive_small_token_weights(backend):
    """1 / (a million tokens) under a loss scale: gradients rounded to float16 before the scale would all be 0."""
    hidden, weight, targets, old, advantages, _ = make_inputs(20, 8, 30, torch.float16)
    hidden.requires_grad_()
    tiny = torch.full((20,), 1e-9)
    (linear_cpgd(hidden, weight, targets, old, advantages, tiny, backend=backend).loss * 2.0**24).backward()
    leaf = hidden.detach().clone().requires_grad_()
    linear_cpgd(leaf, weight, targets, old, advantages, tiny * 2.0**24, backend=backend).loss.backward()
    assert leaf.grad.abs().max() > 1e-3
    torch.testing.assert_close(hidden.grad, leaf.grad, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("temperature", [1e-5, 1e6])
def test_float16_gradients_at_any_temperature(temperature, backend):
    """Those of the logits, which 1 / temperature multiplies, neither overflow nor round to 0."""
    hidden, weight, targets, _, advantages, token_weights = make_inputs(20, 8, 30)
    hidden, weight = (t.mul(math.sqrt(temperature)).half().requires_grad_() for t in (hidden, weight))
    linear_cpgd(hidden, weight, targets, None, advantages, token_weights, temperature=temperature,
                backend=backend).loss.backward()
    old = dense_linear_logprob(hidden.detach().double(), weight.detach().double(), targets, temperature)[0]
    exact = dense_run(hidden, weight, targets, old, advantages, token_weights, torch.float64, temperature)[1:]
    for leaf, e in zip((hidden, weight), exact, strict=True):
        assert leaf.grad.sub(e).norm() < 1e-3 * e.norm()


def test_sum_over_any_split(backend):
    hidden, weight, *rest = make_inputs(30, 12, 40)
    whole = weight.clone().requires_grad_()
    loss = linear_cpgd(hidden, whole, *rest, backend=backend).loss
    loss.backward()
    parts, total = weight.clone().requires_grad_(), 0.0
    for rows in (slice(0, 7), slice(7, 7), slice(7, 21), slice(21, 30)):
        part = linear_cpgd(hidden[rows], parts, *(t[rows] for t in rest), backend=backend).loss
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_ignored_rows_take_no_part(dtype, backend):
    """Nothing of theirs, NaN everywhere, and no part in float16's scale either."""
    hidden, weight, targets, *vectors = make_inputs(18, 8, 30)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    keep = targets != IGNORE_INDEX
    clean = weight.clone().requires_grad_()
    linear_cpgd(hidden[keep], clean, targets[keep], *(t[keep] for t in vectors), backend=backend).loss.backward()
    for tensor in (hidden, *vectors):
        tensor[~keep] = float("nan")
    hidden.requires_grad_(), weight.requires_grad_()
    out = linear_cpgd(hidden, weight, targets, *vectors, backend=backend, check=False)
    out.loss.backward()
    assert (hidden.grad[~keep] == 0).all() and (out.drift[~keep] == 0).all() and not out.clipped[~keep].any()
    slack = {"rtol": 1e-5, "atol": 2e-7} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 1e-6}  # an ulp
    torch.testing.assert_close(weight.grad, clean.grad, **slack)


@pytest.mark.parametrize("n", [0, 4])
def test_nothing_to_train_on(n, backend):
    hidden, weight = torch.randn(n, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    zeros = torch.zeros(n)
    out = linear_cpgd(hidden, weight, torch.full((n,), IGNORE_INDEX), zeros, zeros + 1, zeros + 1,
                      backend=backend)
    out.loss.backward()
    assert out.loss.item() == 0.0 and out.loss.shape == () and out.logprobs.shape == (n,)
    assert torch.equal(hidden.grad, torch.zeros(n, 4)) and torch.equal(weight.grad, torch.zeros(9, 4))


def test_unchecked_bad_target_makes_the_loss_nan(backend):
    hidden, weight, targets, old, advantages, token_weights = make_inputs(6, 4, 8)
    targets[1] = 8
    for given in (old, None):
        leaf = weight.clone().requires_grad_()
        out = linear_cpgd(hidden, leaf, targets, given, advantages, token_weights, check=False, backend=backend)
        out.loss.backward()
        assert math.isnan(out.loss.item()) and torch.isnan(leaf.grad).any()


def test_memory_at_the_head_of_7b(monkeypatch):
    """Above inputs, gradients and the float32 gradient of the head: the promised 1.5 GB. Nothing is computed."""
    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **keywords: None

    monkeypatch.setattr(launch, "use_triton", lambda backend, device: True)
    monkeypatch.setattr(module, "_fold_kernel", Kernel())
    # As on CUDA, where they make no float32 copies.
    monkeypatch.setattr(gemm, "matmul", lambda a, b, out: out)
    monkeypatch.setattr(gemm, "add_matmul", lambda out, a, b: out)
    n, d, v = 32768, 3584, 152064
    with FakeTensorMode():
        hidden, weight = (torch.empty(size, d, dtype=torch.bfloat16, requires_grad=True) for size in (n, v))
        targets, vector = torch.empty(n, dtype=torch.int64), torch.empty(n)
        with Allocations(hidden, weight, targets, vector) as seen:
            loss = linear_cpgd(hidden, weight, targets, vector, vector, vector, check=False).loss
            assert seen.live < 2 * n * d + 4 * v * d + 1e8
            assert seen.peak < 2 * n * d + 4 * v * d + 1.5e9
            loss.backward()
        assert weight.grad.dtype == torch.bfloat16


MEMORY = """
import os, re, torch
from cosmo_rl.kernels.linear_cpgd import linear_cpgd
from cosmo_rl.kernels.linear_logprob import linear_logprob
def run(n, v, d):
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    targets, vector = torch.randint(0, v, (n,)), torch.ones(n)
    with open("/proc/self/statm") as f:
        before = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if KERNEL == "linear_cpgd":
        linear_cpgd(hidden, weight, targets, -vector, vector, vector / n).loss.backward()
    else:
        stats = linear_logprob(hidden, weight, targets)
        (stats.logprobs + stats.entropy).sum().backward()
    with open("/proc/self/status") as f:  # not ru_maxrss, which a process inherits from the one that started it
        return int(re.search(r"VmHWM:\\s+(\\d+)", f.read())[1]) * 1024 - before
run(64, 5000, 64)
print(run(1024, 152064, 64) / 2**20)
"""


def test_peak_memory():
    """Real vocabulary, 1024 tokens: the logits alone would be 594 MiB, the gradient of the weight is 37 MiB."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = {kernel: subprocess.Popen([sys.executable, "-P", "-c", f"KERNEL = {kernel!r}{MEMORY}"], env=environment,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for kernel in ("linear_cpgd", "linear_logprob")}  # side by side
    for kernel, process in running.items():
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert 37 < float(out) < 200, kernel


@pytest.mark.parametrize("change, message", [
    (dict(hidden=torch.randn(4, 7)), r"\(4, 7\).*\(10, 8\)"),
    (dict(weight=torch.randn(10, 8).half()), "torch.float32.*torch.float16"),
    (dict(targets=torch.tensor([0, 1, 2, 10])), r"targets\[3\] is 10 .*10 rows"),
    (dict(old_logprobs=torch.zeros(3)), r"old_logprobs.*\(3,\).*\(4,\)"),
    (dict(advantages=torch.zeros(4, 1)), r"advantages.*\(4, 1\).*\(4,\)"),
    (dict(advantages=torch.tensor([0.0, math.nan, 0.0, 0.0])), r"advantages\[1\] is nan; give finite"),
    (dict(token_weights=torch.tensor([0.0, 0.0, math.inf, 0.0])), r"token_weights\[2\] is inf; give finite"),
    (dict(token_weights=torch.zeros(4).half()), "token_weights.*torch.float16"),
    (dict(bias=torch.zeros(4)), r"bias.*\(4,\).*\(10, 8\)"),
    (dict(temperature=0.0), "temperature is 0.0"),
    (dict(clip_eps_high=-1.0), "clip_eps_high is -1.0"),
    (dict(backward="tiles"), "'tiles'.*'exact'"),
])
def test_bad_input(change, message):
    """Of the reference; test_launch.py compares the backends."""
    call = dict(hidden=torch.randn(4, 8), weight=torch.randn(10, 8), targets=torch.tensor([0, 1, 2, 9]),
                old_logprobs=torch.zeros(4), advantages=torch.ones(4), token_weights=torch.ones(4)) | change
    with pytest.raises(ValueError, match=message):
        linear_cpgd(**call)
