"""Responses at the length limit: DAPO's punishment in numbers, its filter in the loss and not in the statistics."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
from test_collect import Fixed, Recorded

from cosmo_rl.cpgd.advantages import group_advantages
from cosmo_rl.cpgd.rewards.overlong import punished
from cosmo_rl.cpgd.rollout.values import Response, Sample
from cosmo_rl.cpgd.run.metrics import rollout_summary
from cosmo_rl.cpgd.update import split_updates
from cosmo_rl.data.errors import UserError


def sample(length: int, reward: float | None) -> Sample:
    response: Any = SimpleNamespace(ids=np.zeros(length, dtype=np.int64))
    return Sample(response=response, reward=reward, terms={"task_aware": 1.0}, failure="" if reward else "none")


@pytest.mark.parametrize(("length", "term"), [(1, 1.0), (80, 1.0), (85, 0.75), (90, 0.5), (99, 0.05), (100, 0.0)])
def test_the_last_fifth_costs(length, term):
    for reward in (0.0, 0.3, 1.0):
        found: Any = punished(sample(length, reward), 100)
        assert found.terms == {"task_aware": 1.0, "length": pytest.approx(term, abs=1e-12)}
        assert found.reward == pytest.approx((reward + term / 2) / 1.5) and 0 <= found.reward <= 1
    failed = sample(length, None)
    assert punished(failed, 100) is failed


def test_advantages_are_those_of_the_papers_reward():
    """Equation 13, added to a correctness of -1 or 1; a wrong answer loses by its length too."""
    rng = np.random.default_rng(0)
    lengths, right, most, cache = rng.integers(60, 101, 64), rng.integers(0, 2, 64), 100, 20
    both = list(zip(lengths, right, strict=True))
    paper = [2 * c - 1 + (0 if n <= most - cache else ((most - cache) - n) / cache) for n, c in both]
    ours: Any = [punished(sample(int(n), float(c)), most).reward for n, c in both]
    groups = np.arange(64) // 8
    advantages = group_advantages(ours, groups)
    np.testing.assert_allclose(advantages, group_advantages(paper, groups), rtol=0, atol=1e-12)
    assert not np.allclose(advantages, group_advantages(right, groups), atol=0.1)


class Cut(Recorded):
    """Cuts off the responses named."""

    def __init__(self, cut):
        super().__init__()
        self.cut = cut

    def stream(self, requests, *, greedy=False, batch_size=None):
        for part in super().stream(requests, greedy=greedy, batch_size=batch_size):
            yield [replace(r, finish_reason="length", ids=np.ones(24, np.int64), logprobs=np.zeros(24, np.float32))
                   if self.cut(r) else r for r in part]


class ByK(Fixed):
    def sample(self, response: Response, outcomes, evidence=None):
        return replace(super().sample(response, outcomes, evidence), reward=response.request.k / 3)


def collected(overlong, cut):
    rows, config = runs.rollout().rows, runs.config()
    config = replace(config, rollout=replace(config.rollout, overlong=overlong))
    return runs.collector(rows, Cut(cut), ByK(), config).collect(5, {})


def test_the_filter_takes_the_loss_and_leaves_the_statistics():
    rows = runs.rollout().rows
    cut = lambda r: r.row.id == rows[2].id or (r.row.id == rows[0].id and r.request.k in (1, 3))
    kept, filtered = (collected(name, cut) for name in ("keep", "filter"))
    assert [a.tolist() for a in filtered.advantages] == [a.tolist() for a in kept.advantages]
    assert [s.reward for s in filtered.samples] == [s.reward for s in kept.samples]
    (whole,), (part,) = split_updates(kept, 1), split_updates(filtered, 1)
    assert (len(whole.samples), whole.num_prompts) == (24, 6)
    assert (len(part.samples), part.num_prompts) == (18, 5), "a group without a response is no prompt of the mean"
    assert [s.response.request.k for s in part.samples[:2]] == [0, 2]
    assert part.advantages[:2] == kept.advantages[0][[0, 2]].tolist()
    assert not any(s.response.finish_reason == "length" for s in part.samples)
    assert rollout_summary(filtered) == {**rollout_summary(kept), "filtered": 6}


def test_a_filter_that_leaves_nothing_stops_the_run():
    with pytest.raises(UserError, match=r"every response .* leaves none to learn from; start again in another"):
        collected("filter", lambda r: True)
    assert len(split_updates(collected("keep", lambda r: True), 1)[0].samples) == 24


def test_a_run_may_punish():
    found = collected("punish", lambda r: r.request.k == 3)
    for group, advantages in zip(found.groups, found.advantages, strict=True):
        assert [s.reward for s in group] == pytest.approx([(k / 3 + (k < 3) / 2) / 1.5 for k in range(4)])
        assert [s.terms["length"] for s in group] == [1, 1, 1, 0] and advantages.argmax() == 2
