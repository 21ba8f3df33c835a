"""Advantages against formulas worked by hand."""

import math

import numpy as np
import pytest

from cosmo_rl.cpgd.advantages import group_advantages

NAN = math.nan


def test_std_weight_by_hand():
    """Rewards 1 0 0 1: mean 0.5, unbiased std sqrt(1/3); 0 1: mean 0.5, std sqrt(1/2). Groups interleaved."""
    got = group_advantages([1, 0, 0, 0, 1, 1], [5, 5, 2, 5, 2, 5])
    a, b = 0.5 * math.sqrt(3), 0.5 * math.sqrt(2)
    np.testing.assert_allclose(got, [a, -a, -b, -a, b, a], rtol=1e-15)
    assert got.dtype == np.float64


def test_authors_group_norm():
    """(R - mean) / (std + 1e-9) over each prompt's responses, torch's unbiased std."""
    import torch

    rewards = torch.rand(6, 8, dtype=torch.float64)
    theirs = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-9)
    got = group_advantages(rewards.flatten().numpy(), np.repeat(np.arange(6), 8))
    np.testing.assert_allclose(got, theirs.flatten().numpy(), rtol=1e-7)


@pytest.mark.parametrize("estimator", ["cpgd", "grpo", "ppo", "rloo", "reinforce_pp"])
@pytest.mark.parametrize("weight", ["std", "clip_filter", "equal"])
def test_constant_group_is_exactly_zero(estimator, weight):
    rewards = [0.9] * 7
    assert np.mean(rewards) != 0.9  # the trap: 1/std of this rounding would be an advantage of order 1
    assert (group_advantages(rewards, [0] * 7, estimator=estimator, weight=weight) == 0.0).all()
    nearly = np.full(8, 0.9) + np.linspace(0, 9e-7, 8)
    assert (group_advantages(nearly, [0] * 8, estimator=estimator, weight=weight) == 0.0).all()
    assert (group_advantages(nearly * 2, [0] * 8, estimator=estimator, weight=weight) != 0.0).all()


def test_equal_weight():
    np.testing.assert_allclose(group_advantages([1, 0, 0, 1, 0.5, 0], [0, 0, 0, 0, 1, 1], weight="equal"),
                               [0.5, -0.5, -0.5, 0.5, 0.25, -0.25])


@pytest.mark.parametrize("degenerate, cap, weight", [(0, 3.0, 1.0), (1, 3.0, 2.0), (3, 3.0, 3.0), (3, 5.0, 4.0)])
def test_clip_filter_weight(degenerate, cap, weight):
    """One live prompt and `degenerate` dead ones: min(c_w, #prompts / #live); an emptied prompt is not counted."""
    rewards = [1.0, 0.0] + [1.0, 1.0] * degenerate + [NAN, NAN]
    groups = np.repeat(np.arange(degenerate + 2), 2)
    got = group_advantages(rewards, groups, weight="clip_filter", weight_cap=cap)
    np.testing.assert_allclose(got[:2], [weight / 2, -weight / 2])
    assert (got[2:] == 0).all()


def test_leave_one_out():
    rewards = np.array([1.0, 0.25, 0.0, 0.5])
    expected = [rewards[k] - np.delete(rewards, k).mean() for k in range(4)]
    np.testing.assert_allclose(group_advantages(rewards, [0] * 4, estimator="rloo"), expected, rtol=1e-14)


def test_reinforce_pp_whitens_the_rollout():
    """A prompt that is always right has a positive advantage: the baseline is the rollout's, not the group's."""
    got = group_advantages([1, 1, 0, 1, NAN], [0, 0, 1, 1, 1], estimator="reinforce_pp")
    assert got[0] == got[1] == got[3] > 0 > got[2] and got[4] == 0
    np.testing.assert_allclose([got[:4].mean(), got[:4].std(ddof=1)], [0, 1], atol=1e-15)


def test_failed_responses_leave_their_group():
    got = group_advantages([1, NAN, 0, NAN, 1, NAN], [0, 0, 0, 1, 1, 2])
    np.testing.assert_allclose(got[[0, 2]], [math.sqrt(0.5), -math.sqrt(0.5)])
    assert (got[[1, 3, 4, 5]] == 0).all()  # failed, failed, alone in its group, failed


def test_order_and_empty_rollout():
    rng = np.random.default_rng(0)
    rewards, groups = rng.random(40), rng.integers(0, 6, 40)
    order = rng.permutation(40)
    np.testing.assert_allclose(group_advantages(rewards[order], groups[order]),
                               group_advantages(rewards, groups)[order], rtol=1e-12)
    assert group_advantages([], np.zeros(0, dtype=int)).shape == (0,)


@pytest.mark.parametrize("call, message", [
    (dict(rewards=[1.0, 0.0], groups=[0]), r"\(2,\).*\(1,\)"),
    (dict(rewards=[1.0, math.inf], groups=[0, 0]), r"rewards\[1\] is inf.*NaN"),
    (dict(rewards=[1.0], groups=[0], estimator="gae"), "'gae'.*'cpgd'"),
    (dict(rewards=[1.0], groups=[0], weight="var"), "'var'.*'std'"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(**call)
