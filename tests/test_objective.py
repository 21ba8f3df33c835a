"""Token weights, the clip schedule and the named objectives, against numbers worked by hand."""

# Tests unpack inputs of mixed types, and a `leaf.grad` that is None fails them anyway.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportUnusedExpression=false

import math

import numpy as np
import pytest
import torch

from cosmo_rl.cpgd.config import ObjectiveConfig
from cosmo_rl.cpgd.objective import clip_bounds, policy_loss, token_weights
from cosmo_rl.kernels.cpgd_objective import cpgd_objective
from cosmo_rl.kernels.linear_logprob import TokenStats
from cosmo_rl.model.policy import Update

NAMES = ["cpgd", "grpo", "ppo", "reinforce_pp", "rloo"]


def loss_of(name, *, logprobs, entropy=None, dual_clip=3.0, entropy_coef=0.0, **inputs):
    """`policy_loss` without a micro-batch."""
    stats = TokenStats(logprobs, torch.zeros_like(logprobs) if entropy is None else entropy, None)
    config = ObjectiveConfig(name=name, dual_clip=dual_clip, entropy_coef=entropy_coef)
    return policy_loss(config, Update(batch=None, members=[], **inputs), stats)


def test_weights_by_hand():
    """Prompt 7 has responses of 2 and 6 tokens, prompt 3 one of 4."""
    tokens, groups = [2, 4, 6], [7, 3, 7]
    np.testing.assert_allclose(token_weights(tokens, groups, 2, "group"), [1 / 16, 1 / 8, 1 / 16])
    np.testing.assert_allclose(token_weights(tokens, groups, 2, "sequence"), [1 / 6, 1 / 12, 1 / 18])
    np.testing.assert_allclose(token_weights(tokens, groups, 2, "token"), [1 / 12] * 3)


@pytest.mark.parametrize("aggregation", ["group", "sequence", "token"])
def test_weights_sum_to_one_over_the_tokens(aggregation):
    rng = np.random.default_rng(0)
    tokens, groups = rng.integers(1, 50, 40), rng.permutation(np.repeat(np.arange(10), 4))
    weights = token_weights(tokens, groups, 10, aggregation)
    assert (weights * tokens).sum() == pytest.approx(1.0, rel=1e-12) and weights.dtype == np.float64
    assert token_weights([], [], 0, aggregation).shape == (0,)


@pytest.mark.parametrize("aggregation", ["group", "sequence", "token"])
@pytest.mark.parametrize("name", NAMES)
def test_aggregation_does_not_depend_on_the_split(name, aggregation):
    """The update's loss and gradient as one micro-batch, and as five of uneven size in another order."""
    rng = np.random.default_rng(1)
    tokens, groups = rng.integers(1, 30, 24), np.repeat(np.arange(6), 4)
    weights = torch.tensor(np.repeat(token_weights(tokens, groups, 6, aggregation), tokens))
    n = len(weights)
    old = -torch.rand(n) * 3
    logprobs = (old + 0.4 * torch.randn(n)).requires_grad_()
    advantages = torch.tensor(np.repeat(rng.standard_normal(24), tokens))

    def loss(rows):
        return loss_of(name, logprobs=logprobs[rows], old_logprobs=old[rows],
                                            advantages=advantages[rows], token_weights=weights[rows]).loss

    whole = loss(torch.arange(n))
    (whole_grad,) = torch.autograd.grad(whole, logprobs)
    parts = [loss(rows) for rows in torch.randperm(n).split([1, 0, n // 2, 7, n - n // 2 - 8])]
    (part_grad,) = torch.autograd.grad(torch.stack(parts).sum(), logprobs)
    assert sum(p.item() for p in parts) == pytest.approx(whole.item(), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(part_grad, whole_grad, rtol=1e-6, atol=0)


def test_paper_aggregation():
    """arXiv:2505.12504 eq. 2 as a double sum: mean over prompts of the token mean over the group."""
    tokens, groups = np.array([3, 1, 2, 5]), np.array([0, 0, 1, 1])
    per_token = [np.arange(t) + 10.0 * s for s, t in enumerate(tokens)]
    expected = np.mean([np.concatenate([per_token[0], per_token[1]]).mean(),
                        np.concatenate([per_token[2], per_token[3]]).mean()])
    weights = token_weights(tokens, groups, 2, "group")
    assert sum(w * t.sum() for w, t in zip(weights, per_token, strict=True)) == pytest.approx(expected, rel=1e-14)


def test_clip_schedule():
    positions, lengths = torch.tensor([1, 2, 4, 1]), torch.tensor([4, 4, 4, 1])
    constant = ObjectiveConfig(clip_eps_low=0.1, clip_eps_high=0.2)
    assert clip_bounds(constant, positions, lengths) == (0.1, 0.2)
    low, high = clip_bounds(ObjectiveConfig(clip_eps_low=0.1, clip_eps_high=0.2, clip_schedule=0.5), positions, lengths)
    # share of eps: 0.5 + 0.5 * i / |y|
    torch.testing.assert_close(high, torch.tensor([0.125, 0.15, 0.2, 0.2]))
    torch.testing.assert_close(low, torch.tensor([0.0625, 0.075, 0.1, 0.1]))


# (advantage, ratio) and, of each objective, (loss, d loss / d logprob, clipped), eps 0.2, dual clip 3.
RATIO_TABLE = [
    # A    r    ppo                   grpo                  rloo
    (1.0, 1.1, (-1.1, -1.1, False), (-1.1, -1.1, False), (-1.1, -1.1, False)),
    (2.0, 1.5, (-2.4, 0.0, True), (-2.4, 0.0, True), (-3.0, -3.0, False)),
    (-1.0, 0.9, (0.9, 0.9, False), (0.9, 0.9, False), (0.9, 0.9, False)),
    (-2.0, 0.5, (1.6, 0.0, True), (1.6, 0.0, True), (1.0, 1.0, False)),
    (-1.0, 4.0, (4.0, 4.0, False), (3.0, 0.0, True), (4.0, 4.0, False)),  # the dual clip's case
    (1.0, 0.5, (-0.5, -0.5, False), (-0.5, -0.5, False), (-0.5, -0.5, False)),
]


@pytest.mark.parametrize("name", ["ppo", "reinforce_pp", "grpo", "rloo"])
def test_ratio_objectives_by_hand(name):
    advantages, ratio = (torch.tensor([row[i] for row in RATIO_TABLE]) for i in (0, 1))
    column = {"ppo": 2, "reinforce_pp": 2, "grpo": 3, "rloo": 4}[name]
    loss, slope, clipped = (torch.tensor([row[column][i] for row in RATIO_TABLE]) for i in range(3))
    old = torch.linspace(-3.0, -0.5, 6)
    logprobs = (old + ratio.log()).requires_grad_()
    weights = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.05, 0.2])
    out = loss_of(name, logprobs=logprobs, old_logprobs=old, advantages=advantages,
                                       token_weights=weights)
    out.loss.backward()
    assert out.loss.item() == pytest.approx((weights * loss).sum().item(), rel=1e-5)
    torch.testing.assert_close(logprobs.grad, weights * slope, rtol=1e-5, atol=1e-7)
    assert torch.equal(out.clipped, clipped)
    torch.testing.assert_close(out.drift, ratio - 1 - ratio.log(), rtol=1e-4, atol=1e-6)


def test_dual_clip_can_be_switched_off():
    one = dict(advantages=-torch.ones(1), token_weights=torch.ones(1), old_logprobs=torch.tensor([-5.0]))
    logprobs = torch.tensor([-5.0 + math.log(10)])
    for dual_clip, loss in ((3.0, 3.0), (0.0, 10.0)):
        out = loss_of("grpo", logprobs=logprobs, dual_clip=dual_clip, **one)
        assert out.loss.item() == pytest.approx(loss, rel=1e-5)


def test_cpgd_is_the_kernel_summed():
    old, advantages, weights = -torch.rand(30), torch.randn(30), torch.rand(30)
    logprobs = (old + 0.3 * torch.randn(30)).requires_grad_()
    low, high = torch.rand(30) * 0.4, torch.rand(30) * 0.4
    settings = dict(clip_eps_low=low, clip_eps_high=high, drift_coef=0.3, drift_clip=0.1)
    out = loss_of("cpgd", logprobs=logprobs, old_logprobs=old, advantages=advantages,
                                         token_weights=weights, **settings)
    terms = cpgd_objective(logprobs, old, advantages, **settings)
    assert out.loss.item() == pytest.approx((weights * terms.loss).sum().item(), rel=1e-6)
    assert torch.equal(out.clipped, terms.clipped) and torch.equal(out.drift, terms.drift)
    clipped_ppo = loss_of("ppo", logprobs=logprobs, old_logprobs=old, advantages=advantages,
                                                token_weights=weights, **settings).clipped
    assert torch.equal(clipped_ppo, terms.clipped)  # same trust region


@pytest.mark.parametrize("name", NAMES)
def test_first_update_is_reinforce(name):
    """At ratio 1 every objective has the gradient -A of the log-prob."""
    logprobs = (-torch.rand(10)).requires_grad_()
    advantages, weights = torch.randn(10), torch.rand(10)
    out = loss_of(name, logprobs=logprobs, advantages=advantages, token_weights=weights)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, -weights * advantages)
    assert (out.drift == 0).all() and not out.clipped.any()


def test_entropy_bonus():
    logprobs, entropy = -torch.rand(5), torch.rand(5, requires_grad=True)
    inputs = dict(logprobs=logprobs, advantages=torch.zeros(5), token_weights=torch.full((5,), 0.2))
    out = loss_of("cpgd", entropy=entropy, entropy_coef=0.5, **inputs)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-0.1 * entropy.sum().item(), rel=1e-6)
    torch.testing.assert_close(entropy.grad, torch.full((5,), -0.1))


@pytest.mark.parametrize("call, message", [
    (([2, 3], [0], 2, "group"), r"\(2,\).*\(1,\)"),
    (([2, 0], [0, 1], 2, "group"), r"num_tokens\[1\] is 0"),
    (([2, 3], [0, 1], 1, "group"), "num_prompts is 1 and groups holds 2"),
    (([2, 3], [0, 1], 2, "mean"), "'mean'.*'group'"),
])
def test_bad_token_weights(call, message):
    with pytest.raises(ValueError, match=message):
        token_weights(*call)


def test_bad_loss_inputs():
    inputs = dict(logprobs=torch.zeros(2), token_weights=torch.ones(2))
    with pytest.raises(ValueError, match=r"'dapo'.*'cpgd'"):
        loss_of("dapo", advantages=torch.ones(2), **inputs)
    for name in NAMES:
        with pytest.raises(ValueError, match=r"advantages\[0\] is nan; give finite"):
            loss_of(name, advantages=torch.full((2,), math.nan), **inputs)
