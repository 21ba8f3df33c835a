"""linear_cpgd against linear_logprob followed by cpgd_objective, and against autograd of the dense definition."""

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

from cosmo_rl.kernels import reference
from cosmo_rl.kernels.cpgd_objective import cpgd_objective
from cosmo_rl.kernels.linear_cpgd import linear_cpgd
from cosmo_rl.kernels.linear_logprob import linear_logprob
from cosmo_rl.kernels.reference import IGNORE_INDEX, dense_cpgd, dense_linear_logprob

SETTINGS = dict(clip_eps_low=0.2, clip_eps_high=0.3, drift_coef=0.05, drift_clip=1.0)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(reference, "TILE_ROWS", 32)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 32 * 64)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(252, 123, 507), (16, 32, 64), (1, 8, 40)], ids=str)
def test_against_dense_autograd(shape, dtype, small_tiles, poisoned_empty):
    inputs = make_inputs(*shape, dtype)
    hidden, weight = (t.clone().requires_grad_() for t in inputs[:2])
    bias = torch.randn(shape[2])
    out = linear_cpgd(hidden, weight, *inputs[2:], temperature=0.8, bias=bias, **SETTINGS)
    out.loss.backward()
    same = dense_run(*inputs, dtype, 0.8, bias)
    exact = dense_run(*inputs, torch.float64, 0.8, bias)
    # Half a unit in the last place of the largest gradient, which the result's dtype imposes.
    for actual, s, e in zip((out.loss.detach(), hidden.grad, weight.grad), same, exact, strict=True):
        assert_no_worse(actual, s, e, atol=e.abs().max().item() * torch.finfo(dtype).eps + 1e-7)
    assert hidden.grad.dtype == weight.grad.dtype == dtype


def test_against_the_two_separate_calls():
    inputs = make_inputs(90, 20, 70)
    targets, old, advantages, token_weights = inputs[2:]
    a, b = ([t.clone().requires_grad_() for t in inputs[:2]] for _ in range(2))
    out = linear_cpgd(*a, *inputs[2:], **SETTINGS)
    out.loss.backward()
    stats = linear_logprob(*b, targets)
    terms = cpgd_objective(stats.logprobs, old, advantages, **SETTINGS)
    keep = targets != IGNORE_INDEX
    loss = (token_weights * terms.loss)[keep].sum()
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=1e-7)
    assert torch.equal(out.logprobs, stats.logprobs) and torch.equal(out.entropy, stats.entropy)
    assert torch.equal(out.clipped, terms.clipped & keep) and out.clipped.any() and not out.clipped.all()
    assert torch.equal(out.drift[keep], terms.drift[keep]) and (out.drift[~keep] == 0).all()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_and_without_gradient(dtype, small_tiles):
    hidden, weight, *rest = make_inputs(100, 24, 300, dtype)
    plain = linear_cpgd(hidden, weight, *rest)
    trained = linear_cpgd(hidden.requires_grad_(), weight.requires_grad_(), *rest)
    with torch.no_grad():
        silent = linear_cpgd(hidden, weight, *rest)
    scored = linear_logprob(hidden, weight, rest[0])
    for other in (trained, silent):
        assert all(torch.equal(x, y) for x, y in zip(plain, other, strict=True))
    assert torch.equal(scored.logprobs, plain.logprobs)
    assert [t.requires_grad for t in trained] == [True, False, False, False, False]
    assert not any(t.requires_grad for t in (*plain, *silent))


def test_ratio_is_one_without_old_logprobs():
    """Exactly what old_logprobs = logprobs gives: loss 0, gradient of -A logprob, nothing clipped, no drift."""
    hidden, weight, targets, _, advantages, token_weights = make_inputs(30, 12, 50)
    a, b = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    first = linear_cpgd(*a, targets, None, advantages, token_weights)
    first.loss.backward()
    second = linear_cpgd(*b, targets, first.logprobs, advantages, token_weights)
    second.loss.backward()
    assert first.loss.item() == second.loss.item() == 0.0
    assert not first.clipped.any() and (first.drift == 0).all()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(a, b, strict=True))
    c = [t.clone().requires_grad_() for t in (hidden, weight)]
    (-token_weights * advantages * linear_logprob(*c, targets).logprobs).sum().backward()
    torch.testing.assert_close(a[1].grad, c[1].grad, rtol=1e-5, atol=1e-8)


def test_backward_scales_out_of_place():
    hidden, weight, *rest = make_inputs(20, 8, 30)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cpgd(hidden, weight, *rest).loss
    first = torch.autograd.grad(loss * 3, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(x, y * 3) for x, y in zip(first, second, strict=True))


def test_frozen_head_or_frozen_body():
    hidden, weight, *rest = make_inputs(20, 8, 30)
    a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_cpgd(a, b, *rest).loss.backward()
    only_hidden, only_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_cpgd(only_hidden, weight, *rest).loss.backward()
    linear_cpgd(hidden, only_weight, *rest).loss.backward()
    assert torch.equal(only_hidden.grad, a.grad) and torch.equal(only_weight.grad, b.grad)


def test_float16_gradients_survive_small_token_weights():
    """1 / (a million tokens) under a loss scale: gradients rounded to float16 before the scale would all be 0."""
    hidden, weight, targets, old, advantages, _ = make_inputs(20, 8, 30, torch.float16)
    hidden.requires_grad_()
    tiny = torch.full((20,), 1e-9)
    (linear_cpgd(hidden, weight, targets, old, advantages, tiny).loss * 2.0**24).backward()
    leaf = hidden.detach().clone().requires_grad_()
    linear_cpgd(leaf, weight, targets, old, advantages, tiny * 2.0**24).loss.backward()
    assert leaf.grad.abs().max() > 1e-3
    torch.testing.assert_close(hidden.grad, leaf.grad, rtol=2e-3, atol=1e-7)


def test_sum_over_any_split():
    hidden, weight, *rest = make_inputs(60, 12, 40)
    whole = weight.clone().requires_grad_()
    loss = linear_cpgd(hidden, whole, *rest).loss
    loss.backward()
    parts, total = weight.clone().requires_grad_(), 0.0
    for rows in (slice(0, 7), slice(7, 7), slice(7, 41), slice(41, 60)):
        part = linear_cpgd(hidden[rows], parts, *(t[rows] for t in rest)).loss
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-7)


def test_ignored_rows_take_no_part():
    hidden, weight, targets, old, advantages, token_weights = make_inputs(18, 8, 30)
    keep = targets != IGNORE_INDEX
    clean = weight.clone().requires_grad_()
    linear_cpgd(hidden[keep], clean, targets[keep], old[keep], advantages[keep], token_weights[keep]).loss.backward()
    hidden[~keep], old[~keep] = float("nan"), float("nan")
    hidden.requires_grad_(), weight.requires_grad_()
    out = linear_cpgd(hidden, weight, targets, old, advantages, token_weights)
    out.loss.backward()
    assert (hidden.grad[~keep] == 0).all() and (out.drift[~keep] == 0).all() and not out.clipped[~keep].any()
    torch.testing.assert_close(weight.grad, clean.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("n", [0, 4])
def test_nothing_to_train_on(n):
    hidden, weight = torch.randn(n, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    zeros = torch.zeros(n)
    out = linear_cpgd(hidden, weight, torch.full((n,), IGNORE_INDEX), zeros, zeros + 1, zeros + 1)
    out.loss.backward()
    assert out.loss.item() == 0.0 and out.loss.shape == () and out.logprobs.shape == (n,)
    assert torch.equal(hidden.grad, torch.zeros(n, 4)) and torch.equal(weight.grad, torch.zeros(9, 4))


def test_unchecked_bad_target_makes_the_loss_nan():
    hidden, weight, targets, old, advantages, token_weights = make_inputs(6, 4, 8)
    targets[1] = 8
    for given in (old, None):
        leaf = weight.clone().requires_grad_()
        out = linear_cpgd(hidden, leaf, targets, given, advantages, token_weights, check=False)
        out.loss.backward()
        assert math.isnan(out.loss.item()) and torch.isnan(leaf.grad).any()


MEMORY = """
import os, re, torch
from cosmo_rl.kernels.linear_cpgd import linear_cpgd
def run(n, v, d):
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    targets, vector = torch.randint(0, v, (n,)), torch.ones(n)
    with open("/proc/self/statm") as f:
        before = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    linear_cpgd(hidden, weight, targets, -vector, vector, vector / n).loss.backward()
    with open("/proc/self/status") as f:  # not ru_maxrss, which a process inherits from the one that started it
        return int(re.search(r"VmHWM:\\s+(\\d+)", f.read())[1]) * 1024 - before
run(64, 5000, 64)
print(run(4096, 152064, 64) / 2**20)
"""


def test_peak_memory():
    """Real vocabulary, 4096 tokens: the logits alone would be 2376 MiB, the gradient of the weight is 37 MiB."""
    done = subprocess.run([sys.executable, "-P", "-c", MEMORY], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert 37 < float(done.stdout) < 200


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
    (dict(backend="triton"), "no Triton backend"),
    (dict(backward="tiles"), "'tiles'.*'exact'"),
])
def test_bad_input(change, message):
    call = dict(hidden=torch.randn(4, 8), weight=torch.randn(10, 8), targets=torch.tensor([0, 1, 2, 9]),
                old_logprobs=torch.zeros(4), advantages=torch.ones(4), token_weights=torch.ones(4)) | change
    with pytest.raises(ValueError, match=message):
        linear_cpgd(**call)
