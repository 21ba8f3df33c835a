"""From prompts to scored samples: seeds, failed rewards, the split into updates."""

from dataclasses import replace

import numpy as np
import pytest
import runs

from cosmo_rl.cpgd import collect
from cosmo_rl.cpgd.batch import request_seed
from cosmo_rl.cpgd.collect import fill_advantages, generate, sample_groups, score, split_updates
from cosmo_rl.cpgd.rewards.base import Failed, NotApplicable, RewardBudgetError, Score
from cosmo_rl.cpgd.rewards.scorer import Scorer


@pytest.fixture
def samples():
    """A copy of the recorded samples: 6 prompts x 4."""
    return [replace(s, terms=dict(s.terms)) for s in runs.rollout().samples]


def test_samples_come_by_prompt(samples):
    record = runs.rollout()
    assert [(s.group, s.k) for s in samples] == [(group, k) for group in range(6) for k in range(4)]
    assert all(s.row is record.rows[s.group] and s.prompt is record.prompts[s.group] for s in samples)
    decode = record.processor.tokenizer.decode
    assert all(s.text == decode(s.response.ids, skip_special_tokens=True) for s in samples)
    assert len({s.text for s in samples}) > 6, "responses of a prompt differ"


def test_seeds_belong_to_run_stage_step_prompt_and_index(monkeypatch):
    """A prompt that is drawn twice in a rollout goes on counting."""
    record, config = runs.rollout(), runs.config()
    asked = []
    monkeypatch.setattr(collect, "generate", lambda engine, requests, size, finished: asked.extend(requests) or
                        [s.response for s in record.samples[:len(requests)]])
    rows, prompts = [record.rows[0]] * 2, [record.prompts[0]] * 2
    drawn = sample_groups(record.engine, rows, prompts, record.processor, config, step=5)
    assert [r.seed for r in asked] == [request_seed(config.seed, 2, 5, prompts[0].id, k) for k in range(8)]
    assert [(s.group, s.k) for s in drawn] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]
    seeds = {request_seed(*key) for key in ((0, 2, 5, "a", 1), (1, 2, 5, "a", 1), (0, 1, 5, "a", 1), (0, 2, 6, "a", 1),
                                            (0, 2, 5, "b", 1), (0, 2, 5, "a", 2))}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)


def test_ranks_share_whole_batches(monkeypatch):
    """Two ranks' parts are the one rank's responses, bit for bit."""
    record = runs.rollout()
    requests = [collect.Request(s.prompt, s.k, request_seed(0, 2, 9, s.row.id, s.k)) for s in record.samples]
    whole = generate(record.engine, requests, 5)
    parts = []
    monkeypatch.setattr(collect, "world", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr(collect, "rank", lambda number=number: number)
        monkeypatch.setattr(collect, "together", lambda action: [parts.append(action()) or
                                                                 dict.fromkeys(range(24)), *parts])
        generate(record.engine, requests, 5)
    assert len(parts[0]) + len(parts[1]) == 24 and not parts[0].keys() & parts[1].keys()
    for i, response in {**parts[0], **parts[1]}.items():
        assert response.ids.tolist() == whole[i].ids.tolist()
        assert response.logprobs.tobytes() == whole[i].logprobs.tobytes()


def told(by_id, samples):
    """Outcomes by sample index, of terms that say what they are told by sample id, else their second value."""
    return {i: {name: said.get(s.id, other) for name, (said, other) in by_id.items()} for i, s in enumerate(samples)}


def test_a_failed_reward_leaves_its_group(samples):
    first = samples[0].row.id
    outcomes = told({"a": ({f"{first}#0": Failed("no judge"), f"{first}#1": Score(1.0)}, Score(0.25)),
                     "b": ({f"{first}#1": NotApplicable()}, Score(1.0))}, samples)
    scorer = Scorer({}, {"a": 1.0, "b": 3.0})
    score(samples, scorer, 0.1, outcomes)
    assert samples[0].reward is None and samples[0].failure == "a: no judge"
    assert samples[1].reward == 1.0 and samples[1].terms == {"a": 1.0}
    assert samples[2].reward == (0.25 + 3) / 4 and samples[2].failure == ""
    fill_advantages(samples, runs.config())
    r = np.array([1.0, 0.8125, 0.8125])
    assert samples[0].advantage == 0
    np.testing.assert_allclose([s.advantage for s in samples[1:4]], (r - r.mean()) / r.std(ddof=1))
    assert all(s.advantage == 0 for s in samples[4:])

    with pytest.raises(RewardBudgetError, match=rf"1 of 24 responses.*{first}#0: a: no judge"):
        score(samples, scorer, 0.04, outcomes)


def test_updates_are_whole_groups_in_order(samples):
    for s in samples:
        s.reward = 0.5
    for s in samples[4:8]:
        s.reward = None  # prompt 1 lost all its responses, prompt 2 one
    samples[8].reward = None
    parts = split_updates(samples, 6, 4)  # 2, 2, 1 and 1 prompts
    assert [[s.group for s in part] for part, _ in parts] == [[0] * 4, [2] * 3 + [3] * 4, [4] * 4, [5] * 4]
    assert [count for _, count in parts] == [1, 2, 1, 1], "an emptied group is no prompt of the update"
    assert [len(part) for part, _ in split_updates(samples, 6, 1)] == [19]
