"""cpgd_objective against a table worked by hand, the paper's formula and the authors' code.

test_gpu.py calls the functions that need no fixture of this suite, under torch.device("cuda").
"""

# Tests unpack inputs of mixed types, and a `leaf.grad` that is None fails them anyway.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportUnusedExpression=false

import math

import pytest
import torch

from cosmo_rl.kernels import reference
from cosmo_rl.kernels.cpgd_objective import cpgd_objective
from cosmo_rl.kernels.reference import cpgd_terms, dense_cpgd

# eps 0.2 on both sides, alpha 0.01, c 2. ln 1.2 = 0.1823216, ln 0.8 = -0.2231436.
# (advantage, ratio, loss, d loss / d logprob, clipped, drift = r - 1 - ln r)
TABLE = [
    (1.0, 1.1, -0.0952633, -0.999, False, 0.0046898),  # inside: phi = ln 1.1 = 0.0953102
    (2.0, 1.5, -0.3636978, 0.005, True, 0.0945349),  # above, A > 0: phi = 2 ln 1.2; only the drift pushes back
    (-1.0, 0.9, -0.1053069, 0.999, False, 0.0053605),  # inside: phi = -ln 0.9 = 0.1053605
    (-2.0, 0.5, -0.4443556, -0.005, True, 0.1931472),  # below, A < 0: phi = -2 ln 0.8
    (-1.0, 4.0, 1.4024315, 1.02, False, 1.6137056),  # above, A < 0: kept; the drift's slope is c, not r - 1
    (1.0, 0.5, 0.6950787, -1.005, False, 0.1931472),  # below, A > 0: kept
]


def random_tokens(n=400, spread=0.6):
    old = -torch.rand(n) * 5
    return old + spread * torch.randn(n), old, torch.randn(n)


def test_hand_computed_table(backend):
    advantages, ratio, loss, slope, clipped, drift = (torch.tensor(column) for column in zip(*TABLE, strict=True))
    old = torch.linspace(-3.0, -0.5, 6)
    logprobs = (old + ratio.log()).requires_grad_()
    terms = cpgd_objective(logprobs, old, advantages, backend=backend)
    terms.loss.sum().backward()
    close = dict(rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(terms.loss, loss, **close)
    torch.testing.assert_close(logprobs.grad, slope, **close)
    torch.testing.assert_close(terms.drift, drift, **close)
    torch.testing.assert_close(terms.log_ratio, ratio.log(), **close)
    assert torch.equal(terms.clipped, clipped)
    assert [t.dtype for t in terms] == [torch.float32, torch.float32, torch.bool, torch.float32]


def test_value_and_gradient_against_autograd_of_the_definition(backend):
    logprobs, old, advantages = random_tokens()
    settings = dict(clip_eps_low=0.1, clip_eps_high=0.3, drift_coef=0.5, drift_clip=0.7)
    leaf = logprobs.clone().requires_grad_()
    terms = cpgd_objective(leaf, old, advantages, backend=backend, **settings)
    incoming = torch.randn(len(leaf))
    (terms.loss * incoming).sum().backward()
    exact = logprobs.double().requires_grad_()
    definition = dense_cpgd(exact, old.double(), advantages.double(), **settings)
    (definition * incoming).sum().backward()
    torch.testing.assert_close(terms.loss.double(), definition.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-6, atol=1e-7)
    ratio = (logprobs.double() - old.double()).exp()
    outside = ((advantages > 0) & (ratio > 1.3)) | ((advantages < 0) & (ratio < 0.9))
    assert torch.equal(terms.clipped, outside) and 50 < outside.sum() < 350


def test_slope_is_the_derivative_of_the_value():
    """Where the drift is not clipped the gradient is the true one: central differences in float64."""
    logprobs, old, advantages = (t.double() for t in random_tokens())
    slope = cpgd_terms(logprobs, old, advantages, drift_clip=math.inf).dlogprobs
    step = 1e-6
    up, down = (cpgd_terms(logprobs + s, old, advantages).loss for s in (step, -step))
    torch.testing.assert_close((up - down) / (2 * step), slope, rtol=1e-6, atol=1e-7)
    leaf = logprobs.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dense_cpgd(x, old, advantages, drift_clip=math.inf), (leaf,))


def test_paper_formula(backend):
    """arXiv:2505.12504 eq. 2, written down as printed: min form of Phi and the drift E with a stopped ratio."""
    logprobs, old, advantages = random_tokens()
    alpha, c, eps = 0.01, 2.0, 0.2
    x = logprobs.double().requires_grad_()
    l = x - old.double()
    a = advantages.double()
    phi = torch.minimum(l * a, l.clamp(math.log(1 - eps), math.log(1 + eps)) * a)
    drift = (x.detach() - old.double()).exp().sub(1).clamp(max=c) * x
    (-(phi - alpha * drift)).sum().backward()
    leaf = logprobs.clone().requires_grad_()
    terms = cpgd_objective(leaf, old, advantages, backend=backend)
    terms.loss.sum().backward()
    torch.testing.assert_close(leaf.grad.double(), x.grad, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(terms.loss.double() - alpha * terms.drift.double(), -phi.detach(), rtol=1e-6, atol=1e-6)


def test_authors_code(backend):
    """The public code clamps the log-prob itself: another value, the same gradient."""
    logprobs, old, advantages = random_tokens()
    x = logprobs.clone().requires_grad_()
    clamped = torch.where(advantages > 0, torch.minimum(x, old + math.log(1.2)), torch.maximum(x, old + math.log(0.8)))
    drift = ((x.detach() - old).exp() - 1).clamp(max=2.0) * x
    (-clamped * advantages + 0.01 * drift).sum().backward()
    leaf = logprobs.clone().requires_grad_()
    cpgd_objective(leaf, old, advantages, backend=backend).loss.sum().backward()
    torch.testing.assert_close(leaf.grad, x.grad, rtol=1e-5, atol=1e-6)


def test_bounds_per_token(backend):
    logprobs, old, advantages = random_tokens(60)
    low, high = torch.rand(60) * 0.5, torch.rand(60)
    together = cpgd_objective(logprobs, old, advantages, clip_eps_low=low, clip_eps_high=high, backend=backend)
    for i in range(60):
        one = slice(i, i + 1)
        alone = cpgd_objective(logprobs[one], old[one], advantages[one], clip_eps_low=low[i].item(),
                               clip_eps_high=high[i].item(), backend=backend)
        assert all(torch.equal(t[one], s) for t, s in zip(together, alone, strict=True))


def test_no_clip_is_reinforce_with_drift(backend):
    logprobs, old, advantages = random_tokens()
    terms = cpgd_objective(logprobs, old, advantages, clip_eps_low=1.0, clip_eps_high=math.inf, drift_coef=0.0,
                           backend=backend)
    torch.testing.assert_close(terms.loss, -advantages * (logprobs - old), rtol=1e-6, atol=1e-6)
    assert not terms.clipped.any()


# Terms and slope, and the dtype in which the backends agree to the bit: exp and expm1 differ in float64's last.
NAMES = {"loss": torch.float32, "log_ratio": torch.float32, "clipped": torch.bool, "drift": torch.float32,
         "slope": torch.float32}


def both(logprobs, old, advantages, **settings):
    """((terms, slope) of the reference, those of Triton)."""
    found = []
    for backend in ("torch", "triton"):
        leaf = logprobs.clone().requires_grad_()
        terms = cpgd_objective(leaf, old, advantages, backend=backend, **settings)
        terms.loss.sum().backward()
        found.append((*terms, leaf.grad))
    return found


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.2, 0.28, 1.0, math.inf])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.usefixtures("interpreter")
def test_same_bits_as_the_reference_at_the_bounds(eps, as_tensor):
    """Ratios on the bound, one float64 below and one above: `>` and `<` are strict, on both backends alike."""
    low, inf = min(eps, 1.0), torch.tensor(math.inf, dtype=torch.float64)
    given = [torch.tensor(e, dtype=torch.float64) if as_tensor else e for e in (eps, low)]
    bounds = torch.stack([reference._log1p(e, sign, inf.device) for e, sign in zip(given, (1.0, -1.0), strict=True)])
    l = torch.cat([bounds, bounds.nextafter(inf), bounds.nextafter(-inf), bounds / 2]).clamp(-700, 700).repeat(3)
    advantages = torch.tensor([1.5, -0.5, 0.0]).repeat_interleave(8)
    settings = dict(clip_eps_low=low, clip_eps_high=eps)
    if as_tensor:
        settings = {name: torch.full((24,), value, dtype=torch.float64) for name, value in settings.items()}
    plain, triton = both(l, torch.zeros(24, dtype=torch.float64), advantages, **settings)
    for name, a, b in zip(NAMES, plain, triton, strict=True):
        assert torch.equal(a.to(NAMES[name]), b.to(NAMES[name])), name
    if 0 < eps < 1:  # at exactly the bound nothing is clipped; beyond it by one float64, it is
        assert plain[2].nonzero()[:, 0].tolist() == [2, 13]


@pytest.mark.usefixtures("interpreter")
def test_same_as_the_reference_off_the_bounds():
    """Several blocks, ratios from e^-8 to e^8; expm1(l) - l below 0.01 is a series in Triton."""
    l = torch.linspace(-8, 8, 3000, dtype=torch.float64)
    plain, triton = both(l, torch.zeros(3000), torch.sin(torch.arange(3000.0)))
    for name, a, b in zip(NAMES, plain, triton, strict=True):
        # Where the float64 numbers differ in their last bits, float32 may round them apart.
        close = {"slope": dict(rtol=1e-12, atol=1e-15), "loss": dict(rtol=1.2e-7, atol=1e-12),
                 "drift": dict(rtol=1.2e-7, atol=1e-12)}.get(name, dict(rtol=0, atol=0))
        torch.testing.assert_close(a, b, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("interpreter")
def test_ratios_without_bounds():
    """NaN stays NaN, and beyond all numbers the slope is what its formula says: -A, 0 when clipped, and the drift's."""
    l = torch.tensor([math.nan, math.inf, -math.inf, -1e30, -1e17, 100.0, 800.0]).repeat(3)
    advantages = torch.tensor([1.0, -1.0, 0.0]).repeat_interleave(7)
    plain, triton = both(l, torch.zeros(21), advantages)
    for name, a, b in zip(NAMES, plain, triton, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.isnan(plain[-1][::7]).all() and torch.isfinite(plain[-1][1:7]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_strided_vectors(dtype, backend):
    vectors = [t.to(dtype) for t in random_tokens(50)]
    plain = cpgd_objective(*vectors, clip_eps_low=torch.full((50,), 0.1), backend=backend)
    strided = [t.repeat_interleave(2)[::2] for t in vectors]
    found = cpgd_objective(*strided, clip_eps_low=torch.full((100,), 0.1)[::2], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize("l", [0.0, 1e-6, -1e-4, 1e-3, 0.5, -80.0, 80.0])
def test_drift_is_right_and_never_negative(l, backend):
    """l^2/2 (1 + l/3 + l^2/12 ...) for small l, where expm1(l) - l cancels in float32."""
    series = l * l / 2 * (1 + l / 3 + l * l / 12) if abs(l) < 0.01 else math.expm1(l) - l
    terms = cpgd_objective(torch.tensor([l]), torch.zeros(1), torch.zeros(1), backend=backend)
    value = torch.tensor(l).item()  # l as float32 holds it
    series = series if value == l else series * (value / l) ** 2
    assert terms.drift.item() == pytest.approx(series, rel=1e-5, abs=1e-30) and terms.drift.item() >= 0
    assert math.isfinite(terms.loss.item())


def test_only_loss_is_differentiable_and_backward_repeats(backend):
    logprobs, old, advantages = random_tokens(10)
    logprobs.requires_grad_(), old.requires_grad_(), advantages.requires_grad_()
    terms = cpgd_objective(logprobs, old, advantages, backend=backend)
    assert [t.requires_grad for t in terms] == [True, False, False, False]
    terms.loss.sum().backward(retain_graph=True)
    once = logprobs.grad.clone()
    terms.loss.sum().backward()
    assert torch.equal(logprobs.grad, 2 * once)
    assert old.grad is None and advantages.grad is None


def test_no_tokens(backend):
    terms = cpgd_objective(torch.zeros(0), torch.zeros(0), torch.zeros(0), backend=backend)
    assert all(t.shape == (0,) for t in terms)


@pytest.mark.parametrize("change, message", [
    (dict(logprobs=torch.zeros(2, 2)), r"logprobs.*\(2, 2\).*\(N,\)"),
    (dict(old_logprobs=torch.zeros(3)), r"old_logprobs.*\(3,\).*\(4,\)"),
    (dict(advantages=torch.zeros(5)), r"advantages.*\(5,\).*\(4,\)"),
    (dict(logprobs=torch.zeros(4).bfloat16()), "logprobs.*torch.bfloat16.*torch.float32"),
    (dict(advantages=torch.zeros(4).long()), "advantages.*torch.int64"),
    (dict(advantages=torch.zeros(4, device="meta")), "advantages.*meta.*cpu"),
    (dict(advantages=torch.tensor([0.0, math.nan, 0.0, 0.0])), r"advantages\[1\] is nan; give finite"),
    (dict(advantages=torch.tensor([0.0, 0.0, 0.0, math.inf])), r"advantages\[3\] is inf; give finite"),
    (dict(clip_eps_low=1.2), r"clip_eps_low is 1.2.*\[0, 1.0\]"),
    (dict(clip_eps_high=-0.1), r"clip_eps_high is -0.1"),
    (dict(clip_eps_high=torch.tensor([0.1, 0.2, -0.3, 0.1])), r"clip_eps_high\[2\] is -0.3"),
    (dict(clip_eps_low=torch.zeros(3)), r"clip_eps_low.*\(3,\).*\(4,\)"),
    (dict(drift_coef=math.nan), "drift_coef is nan"),
    (dict(drift_clip=-1.0), "drift_clip is -1.0"),
])
def test_bad_input(change, message):
    """Of the reference; test_launch.py compares the backends."""
    call = dict(logprobs=torch.zeros(4), old_logprobs=torch.zeros(4), advantages=torch.ones(4)) | change
    with pytest.raises(ValueError, match=message):
        cpgd_objective(**call)
