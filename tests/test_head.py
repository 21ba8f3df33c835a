"""The head against a dense softmax in float64, tied and untied, with suppressed tokens."""

import numpy as np
import pytest
import torch

from cosmo_rl.kernels import launch
from cosmo_rl.kernels.reference import dense_cpgd, dense_linear_kl, dense_linear_logprob
from cosmo_rl.model.head import CPGDInputs, ExactDrift, LMHead

N, V, D, TEMPERATURE = 12, 37, 16, 0.7
SUPPRESSED = np.array([0, 5, 36])


@pytest.fixture
def case(backend, monkeypatch):
    monkeypatch.setattr(launch, "use_triton", lambda given, device: backend == "triton")
    hidden = torch.randn(N, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    targets = torch.from_numpy(np.setdiff1d(np.arange(V), SUPPRESSED))[torch.randint(0, V - 3, (N,))]
    return LMHead(V, SUPPRESSED, TEMPERATURE), hidden, weight, targets


def dense(hidden, weight, targets):
    """Log-probs over the allowed tokens alone: the suppressed ones are not in the vocabulary."""
    allowed = torch.from_numpy(np.setdiff1d(np.arange(V), SUPPRESSED))
    places = torch.searchsorted(allowed, targets)
    return dense_linear_logprob(hidden.double(), weight.double()[allowed], places, TEMPERATURE)


def inputs(old_logprobs, drift_coef):
    return CPGDInputs(old_logprobs=old_logprobs, advantages=torch.randn(N), token_weights=torch.rand(N),
                      clip_eps_low=0.2, clip_eps_high=0.3, drift_coef=drift_coef, drift_clip=2.0)


def test_suppressed_tokens_are_outside_the_vocabulary(case):
    head, hidden, weight, targets = case
    stats = head(hidden, weight, targets)
    logprobs, entropy = dense(hidden, weight, targets)
    torch.testing.assert_close(stats.logprobs.double(), logprobs, atol=2e-6, rtol=0)
    torch.testing.assert_close(stats.entropy.double(), entropy, atol=2e-6, rtol=0)
    banned = head(hidden[:3], weight, torch.from_numpy(SUPPRESSED)).logprobs
    assert (banned < -1e29).all()

    (stats.logprobs + 0.1 * stats.entropy).sum().backward()
    got = hidden.grad, weight.grad
    expected = torch.autograd.grad((logprobs + 0.1 * entropy).sum(), (hidden, weight))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (weight.grad[SUPPRESSED] == 0).all()


def test_cpgd(case):
    head, hidden, weight, targets = case
    logprobs = dense(hidden, weight, targets)[0]
    old = logprobs.detach() + 0.3 * torch.randn(N)
    cpgd = inputs(old, 0.05)
    output = head(hidden, weight, targets, cpgd)
    terms = dense_cpgd(logprobs, old, cpgd.advantages.double(), 0.2, 0.3, 0.05, 2.0)
    expected = (cpgd.token_weights * terms).sum()
    torch.testing.assert_close(output.loss.double(), expected, atol=1e-5, rtol=0)
    for a, b in zip(torch.autograd.grad(output.loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)),
                    strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_exact_drift_replaces_the_sampled_one(case):
    head, hidden, weight, targets = case
    old_hidden, old_weight = hidden.detach() + 0.3 * torch.randn(N, D), weight.detach() + 0.1 * torch.randn(V, D)
    old = dense(old_hidden, old_weight, targets)[0]
    cpgd = inputs(old, 0.0)
    exact = ExactDrift(old_hidden, old_weight, cpgd.token_weights, 0.05)
    output = head(hidden, weight, targets, cpgd, exact)

    allowed = np.setdiff1d(np.arange(V), SUPPRESSED)
    kl = dense_linear_kl(old_hidden.double(), old_weight.double()[allowed], hidden.double(), weight.double()[allowed],
                         TEMPERATURE)
    terms = dense_cpgd(dense(hidden, weight, targets)[0], old, cpgd.advantages.double(), 0.2, 0.3, 0.0, 2.0)
    expected = (cpgd.token_weights * (terms + 0.05 * kl)).sum()
    torch.testing.assert_close(output.drift.double(), kl.detach(), atol=1e-5, rtol=1e-5)
    assert not output.drift.requires_grad
    torch.testing.assert_close(output.loss.double(), expected, atol=1e-5, rtol=0)
    for a, b in zip(torch.autograd.grad(output.loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)),
                    strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match="twice"):
        head(hidden, weight, targets, inputs(old, 0.05), exact)


@pytest.mark.parametrize("mode", ["logprobs", "cpgd", "exact"])
def test_no_target_gives_zero_gradients(case, mode):
    """A rank without work still sends gradients into the sum over ranks."""
    head, hidden, weight, targets = case
    none = torch.empty(0)
    cpgd = CPGDInputs(none, none, none, 0.2, 0.2, 0.0, 2.0)
    exact = ExactDrift(hidden[:0].detach(), weight.detach(), none, 0.05)
    output = head(hidden[:0], weight, targets[:0], *{"logprobs": (), "cpgd": (cpgd,), "exact": (cpgd, exact)}[mode])
    loss = output.logprobs.sum() if mode == "logprobs" else output.loss
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_owns_no_weight():
    head = LMHead(V, SUPPRESSED, 1.0)
    assert not list(head.parameters()) and not head.state_dict()
