"""From rows to a rollout: seeds, the ranks' shares, failed rewards, evidence of later rounds."""

import time
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs

from cosmo_rl.cpgd.rewards.base import Failed, NotApplicable, RewardBudgetError, Score, combine
from cosmo_rl.cpgd.rollout import collect
from cosmo_rl.cpgd.rollout.collect import sample
from cosmo_rl.cpgd.rollout.engine import Lost, Replica, alone
from cosmo_rl.cpgd.rollout.values import Response, Sample, request_seed
from cosmo_rl.data.errors import UserError


class Recorded:
    """An engine that answers at once, in batches and backwards."""

    def __init__(self, replica=None):
        self.asked, self.replica = [], replica or alone()

    def stream(self, requests, *, greedy=False, batch_size=None):
        self.asked += requests
        for start in range(0, len(requests), 3):
            yield [Response(request=r, ids=np.array([1]), logprobs=np.zeros(1, np.float32), text=r.id,
                            finish_reason="stop", version=3) for r in requests[start:start + 3][::-1]]


class Fixed:
    """A scorer whose terms a and b, of weights 1 and 3, say what they are told by response id."""

    needs_policy = False

    def __init__(self, told=None):
        self.told, self.seen, self.made = told or {}, [], []

    def submit(self, responses):
        self.seen += responses
        future = Future()
        future.set_result([{"a": Score(0.25), "b": Score(1.0), **self.told.get(r.id, {})} for r in responses])
        return future

    def sample(self, response, outcomes, evidence=None):
        reward, terms, failure = combine(outcomes, {"a": 1.0, "b": 3.0})
        self.made.append(Sample(response=response, reward=reward, terms=terms, failure=failure))
        return self.made[-1]


def collected(rows, scorer, engine=None, **changes):
    config = runs.config()
    optim = replace(config.optim, updates_per_rollout=1)
    config = replace(config, rollout=replace(config.rollout, prompts=len(rows)), optim=optim, **changes)
    return runs.collector(rows, engine or Recorded(), scorer, config).collect(5, {})


def test_a_rollout_of_the_shipped_policy():
    record = runs.rollout()
    assert [[s.response.request.k for s in group] for group in record.rollout.groups] == [[0, 1, 2, 3]] * 6
    assert all(s.row is row for row, group in zip(record.rows, record.rollout.groups, strict=True) for s in group)
    decode = record.processor.tokenizer.decode
    assert all(s.response.text == decode(s.response.ids, skip_special_tokens=True) for s in record.samples)
    assert len({s.response.text for s in record.samples}) > 6, "responses of a prompt differ"
    assert record.rollout.version == 0 and record.rollout.first == record.rollout.groups
    assert record.rollout.sampled_tokens == sum(len(s.response.ids) for s in record.samples)


def test_seeds_belong_to_run_stage_step_prompt_and_index():
    """A prompt that is drawn twice in a rollout goes on counting."""
    record, engine = runs.rollout(), Recorded()
    found = collected([record.rows[0]] * 2, Fixed(), engine)
    seeds = [request_seed(0, 2, 5, record.rows[0].id, k) for k in range(8)]
    assert [s.response.request.seed for s in found.samples] == seeds
    assert [s.response.request.k for s in found.samples] == [0, 1, 2, 3] * 2 and len(engine.asked) == 8
    keys = ((0, 2, 5, "a", 1), (1, 2, 5, "a", 1), (0, 1, 5, "a", 1), (0, 2, 6, "a", 1), (0, 2, 5, "b", 1),
            (0, 2, 5, "a", 2))
    seeds = {request_seed(*key) for key in keys}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)


def test_responses_in_any_order_are_scored_once_and_find_their_place():
    """What is trained on is the very response that the scorer saw, in the sample that it made of it."""
    scorer = Fixed()
    found = collected(runs.rollout().rows, scorer)
    assert [s.response.text for s in found.samples] == [s.response.request.id for s in found.samples]
    assert {id(r) for r in scorer.seen} == {id(s.response) for s in found.samples} and len(scorer.seen) == 24
    assert set(map(id, scorer.made)) == set(map(id, found.samples)) and len(scorer.made) == 24


def test_scoring_that_blocks_while_sampling_goes_on_is_no_time_of_the_rollout():
    """As of a plain function of the user's; `clock` is what metrics.jsonl tells."""
    class Slow(Fixed):
        def submit(self, responses):
            time.sleep(0.1)
            return super().submit(responses)

    config, clock = runs.config(), {"rollout": 5.0}
    runs.collector(runs.rollout().rows, Recorded(), Slow(), config).collect(5, clock)
    assert 0.8 <= clock["reward"] < 5 and 5 <= clock["rollout"] < 5.4, clock  # 8 batches


def test_ranks_share_whole_batches(monkeypatch):
    """Two ranks' parts are the one rank's responses, bit for bit; each rank scores what it samples."""
    record = runs.rollout()
    requests = [s.response.request for s in record.samples]
    rollout, fits = replace(runs.config().rollout, batch_size=5), lambda requests, longest: True
    whole, _ = sample(record.engine, requests, rollout, fits, Fixed(), {})
    parts, seen = [], []
    filler = dict.fromkeys(range(24), (np.array([1]), np.zeros(1), "", "stop", 0))
    for number in (0, 1):
        scorer = Fixed()
        monkeypatch.setattr(type(record.engine), "replica", Replica(number, 2, True))
        monkeypatch.setattr(collect, "together", lambda action: [filler, parts.append(action()) or parts[-1]])
        _, pending = sample(record.engine, requests, rollout, fits, scorer, {})
        assert sorted(i for indices, _ in pending for i in indices) == sorted(parts[-1])
        assert [r.request for r in scorer.seen] == [requests[i] for indices, _ in pending for i in indices]
        seen.append(len(scorer.seen))
    assert sum(seen) == len(parts[0]) + len(parts[1]) == 24 and not parts[0].keys() & parts[1].keys()
    for i, (ids, logprobs, *_) in {**parts[0], **parts[1]}.items():
        assert ids.tolist() == whole[i].ids.tolist() and logprobs.tobytes() == whole[i].logprobs.tobytes()


def test_more_ranks_than_calls_share_smaller_ones(monkeypatch):
    """24 requests in one call: each of 7 ranks gets as even a part as there is, and all are sampled once."""
    requests = [s.response.request for s in runs.rollout().samples]
    rollout, shares = replace(runs.config().rollout, batch_size=64), []
    monkeypatch.setattr(collect, "together", lambda action: [
        dict.fromkeys(range(24), (np.array([1]), np.zeros(1), "", "stop", 0)), action()])
    for number in range(7):
        engine: Any = Recorded(Replica(number, 7, True))
        found, _ = sample(engine, requests, rollout, lambda requests, longest: True, Fixed(), {})
        assert [response.request for response in found] == requests
        shares.append(engine.asked)
    assert sorted(map(len, shares)) == [0, 4, 4, 4, 4, 4, 4], "calls of 24 / 7, rounded up"
    assert {id(r) for share in shares for r in share} == set(map(id, requests))


class Dying(Recorded):
    """It dies at every request but the first of a stream, `deaths` times."""

    def __init__(self, deaths):
        super().__init__()
        self.deaths, self.recovered = deaths, 0

    def stream(self, requests, **options):
        if not self.deaths:
            yield from super().stream(requests, **options)
            return
        self.deaths -= 1
        yield from super().stream(requests[:1], **options)
        raise Lost

    def recover(self):
        self.recovered += 1


def test_what_an_engine_loses_is_asked_again():
    """As often as it may die; each response is scored once."""
    requests = [s.response.request for s in runs.rollout().samples]
    fits = lambda requests, longest: True
    engine: Any = Dying(collect.RECOVERIES)
    found, pending = sample(engine, requests, runs.config().rollout, fits, Fixed(), {})
    assert [response.request for response in found] == requests and engine.recovered == collect.RECOVERIES
    assert sorted(map(id, engine.asked)) == sorted(map(id, requests))
    assert sorted(i for indices, _ in pending for i in indices) == list(range(len(requests)))
    engine = Dying(collect.RECOVERIES + 1)
    with pytest.raises(UserError, match="the engine has died 4 times in one rollout; look at its log"):
        sample(engine, requests, runs.config().rollout, fits, Fixed(), {})


def test_a_failed_reward_leaves_its_group():
    rows = runs.rollout().rows
    told = {f"{rows[0].id}#0": {"a": Failed("no judge")}, f"{rows[0].id}#1": {"a": Score(1.0), "b": NotApplicable()}}
    found = collected(rows, Fixed(told))
    first, advantages = found.groups[0], found.advantages
    assert first[0].reward is None and first[0].failure == "a: no judge"
    assert first[1].reward == 1.0 and first[1].terms == {"a": 1.0}
    assert first[2].reward == (0.25 + 3) / 4 and first[2].failure == ""
    r = np.array([1.0, 0.8125, 0.8125])
    assert advantages[0][0] == 0
    np.testing.assert_allclose(advantages[0][1:], (r - r.mean()) / r.std(ddof=1))
    assert len(advantages) == 6 and not np.concatenate(advantages[1:]).any()
    reward = replace(runs.config().reward, failure_budget=0.04)
    with pytest.raises(RewardBudgetError, match=rf"1 of 24 responses.*{rows[0].id}#0: a: no judge"):
        collected(rows, Fixed(told), reward=reward)


def in_two_rounds(budget):
    """A rollout of 4 prompts without a signal, which are sampled again; in the second round one response each fails."""
    config, rows, engine, scorer = runs.config(), runs.rollout().rows[:4], Recorded(), Fixed()
    config = replace(config, rollout=replace(config.rollout, prompts=4, dynamic_sampling=1),
                     reward=replace(config.reward, failure_budget=budget))

    def again(numbers):
        scorer.told = {f"{row.id}#0": {"a": Failed("no judge")} for row in rows}
        return numbers

    collector = runs.collector(rows, engine, scorer, config)
    collector.sampler = SimpleNamespace(take=lambda n: list(range(n)), replace=again, observe=lambda rates: None)
    return collector.collect(5, {}), engine


def test_one_failure_budget_for_all_rounds():
    """A round of prompts must not stop a run whose rollout is within the budget; nor may a bad one pass."""
    found, engine = in_two_rounds(0.13)
    assert found.refill["rounds"] == 1 and len(engine.asked) == 32
    with pytest.raises(RewardBudgetError, match=r"4 of 32 responses"):
        in_two_rounds(0.12)


def test_seeds_go_on_counting_in_later_rounds():
    """A prompt that comes again in a round of the same step, as it may in a small domain, meets other noise."""
    _, engine = in_two_rounds(1.0)
    for row in runs.rollout().rows[:4]:
        seeds = [r.seed for r in engine.asked if r.row is row]
        assert seeds == [request_seed(0, 2, 5, row.id, k) for k in range(8)]
