"""Which groups are trained on: places, domains and counts by hand; then in real runs, where the mixture stays exact."""

import base64
import functools
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import runs
from fault_server import FaultServer

from cosmo_rl.cpgd.advantages import group_advantages
from cosmo_rl.cpgd.config import Config, DataConfig, ObjectiveConfig, RolloutConfig
from cosmo_rl.cpgd.rollout import collect, selection
from cosmo_rl.cpgd.rollout.selection import has_signal, pass_rates, select
from cosmo_rl.cpgd.rollout.values import Sample
from cosmo_rl.cpgd.run.metrics import read_metrics
from cosmo_rl.data.prepare.mini import general_rows, safety_rows
from cosmo_rl.data.sampler import PromptSampler
from cosmo_rl.model.parallel import rank

FLAT, FAILED, LIVE = (0.5, 0.5), (None, 0.5), (0.0, 1.0)


def sample(number, reward, terms=None):
    response: Any = runs.SimpleNamespace(row=runs.SimpleNamespace(id=str(number), domain="ab"[number % 2]))
    return Sample(response=response, reward=reward, terms=terms or {})


class Rows:
    """Even row numbers are of domain a, odd ones of b; `rewards` by number, FLAT where it is silent."""

    def __init__(self, rewards):
        self.rewards, self.asked, self.last = rewards, [], {0: 6, 1: 7}

    def attempt(self, numbers):
        self.asked.append(numbers)
        return [tuple(sample(n, reward) for reward in self.rewards.get(n, FLAT)) for n in numbers]

    def replace(self, numbers):
        """The next even or odd number."""
        out = []
        for number in numbers:
            self.last[number % 2] += 2
            out.append(self.last[number % 2])
        return out


def chosen(groups):
    assert all(len({s.row.id for s in group}) == 1 and len(group) == 2 for group in groups), "whole groups"
    return [int(group[0].row.id) for group in groups]


def test_a_place_goes_to_the_next_prompt_of_its_domain():
    rows = Rows({1: LIVE, 9: LIVE, 10: LIVE, 14: LIVE, 12: FAILED})
    groups, first, refill = select([0, 1, 2, 3, 4], rows.attempt, rows.replace, 2)
    assert rows.asked == [[0, 1, 2, 3, 4], [8, 10, 9, 12], [14, 16]]
    assert chosen(groups) == [14, 1, 10, 9, 4], "place 4 found none in two rounds and keeps its first group"
    assert refill == {"rounds": 2, "dropped": {"a": 5, "b": 1}, "left": {"a": 1}}
    assert chosen(first) == [0, 1, 2, 3, 4]


def test_rounds_end_when_every_place_has_a_signal():
    rows = Rows({0: LIVE, 1: LIVE, 8: LIVE})
    groups, _, refill = select([0, 1, 2], rows.attempt, rows.replace, 9)
    assert rows.asked == [[0, 1, 2], [8]] and chosen(groups) == [0, 1, 8]
    assert refill == {"rounds": 1, "dropped": {"a": 1}, "left": {}}
    rows = Rows({0: LIVE, 1: LIVE})
    assert select([0, 1], rows.attempt, rows.replace, 9)[2]["rounds"] == 0 and len(rows.asked) == 1


def test_switched_off_nothing_is_dropped_or_counted():
    rows = Rows({0: LIVE, 2: FAILED})
    groups, first, refill = select([0, 1, 2], rows.attempt, rows.replace, 0)
    assert rows.asked == [[0, 1, 2]] and chosen(groups) == [0, 1, 2] and refill == {} and groups == first


def test_what_is_trained_on_keeps_the_shares_and_the_updates():
    """However many groups have no signal, in a domain of which most have none."""
    rng = np.random.default_rng(0)
    domains = ["a", "b"] * 20
    sampler, trained = PromptSampler(domains, {"a": 0.7, "b": 0.3}, 1), []
    for _ in range(40):
        rewards = {n: LIVE if rng.random() < (0.9 if n % 2 else 0.3) else FLAT for n in range(40)}
        found, _, _ = select(sampler.take(9), Rows(rewards).attempt, sampler.replace, 3)
        assert len(found) == 9, "every update has its prompts, with a signal or not"
        trained += [group[0].row.domain for group in found]
    counts = np.cumsum([domain == "a" for domain in trained])
    assert np.abs(counts - 0.7 * np.arange(1, 361)).max() < 1 + 1e-9


def test_a_signal_is_what_the_advantages_take_for_one():
    rng = np.random.default_rng(0)
    groups = [[0.9] * 8, [0.1 + 0.2, 0.3], [0.5, 0.5 + 9e-7], [0.5, 0.5 + 1.1e-6], [None, 1.0], [None, None],
              [None, 0.0, 1.0], *rng.choice([0.0, 0.25, 1.0], (20, 3)).tolist()]
    for group in groups:
        rewards = [np.nan if r is None else r for r in group]
        expected = bool(group_advantages(rewards, [0] * len(group)).any())
        assert has_signal(tuple(sample(0, r) for r in group)) is expected, group


def test_pass_rates_by_hand():
    task = lambda value: {"task_aware": value, "format": 0.1}
    groups = [
        (sample(7, 0.2, task(1.0)), sample(7, 0.2, task(0.5))),
        (sample(4, None, task(1.0)), sample(4, 0.3, task(0.0))),  # another term failed
        (sample(5, 0.25, {"format": 1.0}), sample(5, 0.5, {"format": 1.0})),
        (sample(6, None), sample(6, None)),
        (sample(7, 0.2, task(0.0)), sample(7, 0.2, task(0.0))),  # drawn twice: the last one
    ]
    assert pass_rates([7, 4, 5, 6, 7], groups) == {7: 0.0, 4: 0.5, 5: 0.375}


@pytest.mark.parametrize(("options", "message"), [
    ({"rollout": RolloutConfig(dynamic_sampling=-1)}, r"--rollout\.dynamic-sampling is -1; give at least 0"),
    ({"rollout": RolloutConfig(dynamic_sampling=2), "objective": ObjectiveConfig(name="reinforce_pp")},
     r"--rollout\.dynamic-sampling is 2, and --objective\.name reinforce_pp learns .* give 0"),
    ({"data": DataConfig(curriculum=(0.9, 0.1))}, r"--data\.curriculum is 0\.9 0\.1; give two pass rates"),
    ({"data": DataConfig(curriculum=(0.1, 0.9)), "stage": 0}, r"stage 0 samples nothing that could pass; give 0 1"),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


# -- real runs --------------------------------------------------------------------------------------------------------

def tiny_rows():
    """6 general rows and 4 safety rows, with images."""
    return [*(replace(row, domain="safety") for row in safety_rows("validation")[:4]),
            *general_rows("validation")[:60:10]]


MIX = ("--data.mix", "general=0.7", "safety=0.3")


def quick(rows, run_dir, *options):
    return runs.small("--data.path", rows, *MIX, "--run-dir", run_dir, "--log.tensorboard", False, *options)


def _note_rows(path):
    """Each rank writes down the rows of every rollout."""
    real = collect.Collector._attempt

    def noted(self, version, clock, sampled, numbers):
        with open(f"{path}-{rank()}", "a") as file:
            file.write(json.dumps({"step": version, "rows": [self.rows[i].id for i in numbers]}) + "\n")
        return real(self, version, clock, sampled, numbers)

    collect.Collector._attempt = noted


def _note_and_kill(path, lines, metrics):
    _note_rows(path)
    runs.kill_when("cosmo_rl.data.sampler:PromptSampler.take", lines, metrics)


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)], ids=["1-then-2", "2-then-1"])
def test_the_mixture_is_exact_through_a_run_that_is_killed_and_goes_on_with_other_ranks(tmp_path, ranks):
    """Every prefix within one row of the shares, and each row once an epoch of its domain."""
    rows = runs.write_rows(tmp_path / "data" / "rows.jsonl", tiny_rows())
    run, noted = tmp_path / "run", tmp_path / "rows-drawn"
    args = quick(rows, run, "--steps", 6, "--rollout.prompts", 3, "--rollout.group-size", 2, "--checkpoint.every", 2,
                 "--optim.updates-per-rollout", 1, "--rollout.max-new-tokens", 3)
    kill = functools.partial(_note_and_kill, str(noted), 3, run / "stage2" / "metrics.jsonl")
    done = runs.train(args, tmp_path / "logs", ranks=ranks[0], before=kill)
    assert -9 in done.codes, done.err
    at = {entry["step"] for entry in map(json.loads, (tmp_path / "rows-drawn-0").read_text().splitlines())}
    assert at == {0, 1, 2}, "killed after the checkpoint of step 2"
    runs.train(args, tmp_path / "logs", ranks=ranks[1], before=functools.partial(_note_rows, str(noted))).check()

    drawn = [{}, {}]
    for number in (0, 1):
        for line in (tmp_path / f"rows-drawn-{number}").read_text().splitlines():
            entry = json.loads(line)
            before = drawn[number].setdefault(entry["step"], entry["rows"])
            assert before == entry["rows"], "drawn again after the checkpoint, and the same"
    two = (0, 1, 2) if ranks[0] == 2 else (2, 3, 4, 5)
    assert sorted(drawn[0]) == [0, 1, 2, 3, 4, 5] and sorted(drawn[1]) == list(two)
    assert all(drawn[1][step] == drawn[0][step] for step in two), "both ranks draw the same"

    order = [row for step in range(6) for row in drawn[0][step]]
    domain = {row.id: row.domain for row in tiny_rows()}
    general = np.cumsum([domain[row] == "general" for row in order])
    assert np.abs(general - 0.7 * np.arange(1, 19)).max() < 1 + 1e-9
    for name, size in (("general", 6), ("safety", 4)):
        mine = [row for row in order if domain[row] == name]
        assert len(mine) > size, "more than an epoch"
        assert all(len(set(mine[i:i + size])) == len(mine[i:i + size]) for i in range(0, len(mine), size))


def test_dynamic_sampling_in_a_run_of_one_and_two_ranks(tmp_path):
    """What is trained on has the shares, whatever was dropped; metrics tell how much; two ranks do the same."""
    rows = runs.write_rows(tmp_path / "data" / "rows.jsonl", tiny_rows())
    found = []
    for ranks in (1, 2):
        args = quick(rows, tmp_path / str(ranks), "--steps", 4, "--rollout.dynamic-sampling", 2, "--log.samples", 99,
                     "--data.curriculum", 0.05, 0.95, "--rollout.temperature", runs.TEMPERATURE)
        found.append((ranks, args, runs.start(args, tmp_path / "logs", ranks=ranks,
                                              before=functools.partial(_note_rows, str(tmp_path / f"drawn{ranks}")))))
    for _, _, running in found:
        running.wait().check()
    one, two = (runs.lines_of(tmp_path / str(ranks)) for ranks in (1, 2))
    assert one[0]["refill"] == two[0]["refill"] and one[0]["rewards"] == two[0]["rewards"]
    assert [line["response_tokens"] for line in one] == [line["response_tokens"] for line in two]

    rounds = [json.loads(line) for line in (tmp_path / "drawn1-0").read_text().splitlines()]
    samples = [json.loads(line) for line in (tmp_path / "1" / "stage2" / "samples.jsonl").read_text().splitlines()]
    domain = {row.id: row.domain for row in tiny_rows()}
    dropped, replaced, mine, trained, groups = 0, 0, [], [], []
    for line in one[::2]:
        refill, step = line["refill"], line["step"]
        mine = [entry["rows"] for entry in rounds if entry["step"] == step - 1]
        assert len(mine) == 1 + refill["rounds"] <= 3
        trained = [s for s in samples if s["step"] == step]
        groups = [trained[i]["id"].rpartition("#")[0] for i in range(0, len(trained), 4)]
        assert len(trained) == 16, "as many prompts as ever"
        assert [domain[g] for g in groups] == [domain[row] for row in mine[0]], "each place keeps its domain"
        without = [i for i in range(4) if len({s["reward"] for s in trained[4 * i:4 * i + 4]}) == 1]
        assert Counter(domain[groups[i]] for i in without) == refill["left"]
        assert all(s["advantage"] == 0 for i in without for s in trained[4 * i:4 * i + 4])
        drawn = Counter(domain[row] for part in mine for row in part)
        assert drawn == Counter(domain[g] for g in groups) + Counter(refill["dropped"])
        assert line["degenerate_groups"] * 4 == (len(mine[1]) if mine[1:] else 0), "of the prompts drawn first"
        dropped += sum(refill["dropped"].values())
        timed = read_metrics(tmp_path / "1" / "stage2" / "metrics.jsonl")[step - 1]
        tokens = timed["tokens_per_second"]["rollout"] * timed["seconds"]["rollout"]
        kept = sum(each["response_tokens"] for each in one[step - 1:step + 1])
        assert tokens > kept + 3 * sum(refill["dropped"].values()), "what is dropped was sampled too"
        replaced += sum(group != row for group, row in zip(groups, mine[0], strict=True))
    assert dropped > 0 and replaced > 0, "or this test says nothing"
    saved = json.loads((tmp_path / "1" / "stage2" / "checkpoints" / "step-000004" / "state.json").read_text())
    state = saved["state"]["sampler"]
    assert sum(state["beside"].values()) >= dropped
    rates = dict(zip(domain, np.frombuffer(base64.b64decode(state["rates"]), dtype="<f2"), strict=True))
    last = Counter(row for part in mine for row in part)
    passed = {g: np.mean([s["terms"]["task_aware"] for s in trained[4 * i:4 * i + 4]]) for i, g in enumerate(groups)}
    assert {g: rates[g] for g in passed if last[g] == 1} == {g: np.float16(passed[g]) for g in passed if last[g] == 1}
    assert not np.isnan([rates[row] for row in last]).any()


def _no_signal_in_odd_places(path):
    """Of each round every second group has a signal, and keeps it; rank 0 writes down the seeds."""
    verdicts, real, attempt = {}, collect.request_seed, collect.Collector._attempt
    selection.has_signal = lambda group: verdicts[id(group)]

    def told(*args):
        groups = attempt(*args)
        verdicts.update((id(group), i % 2 == 0) for i, group in enumerate(groups))
        verdicts[len(verdicts)] = groups  # held, or another could have the id
        return groups

    collect.Collector._attempt = told

    def noted(*key):
        if rank() == 0:
            with open(path, "a") as file:
                file.write(f"{key[3]} {real(*key)}\n")
        return real(*key)

    collect.request_seed = noted


def test_judges_and_evidence_in_later_rounds(tmp_path):
    """Every response that is trained on was judged and held against a blank image, in whatever round it was sampled.

    Of few rows: some are sampled in several rounds, with other noise in each.
    """
    rows = runs.write_rows(tmp_path / "data" / "rows.jsonl", tiny_rows()[3:6])
    with FaultServer() as server:
        judges = (f"{name}={server.url},{server.model}" for name in ("safework_safety", "general"))
        args = quick(rows, tmp_path / "run", "--steps", 2, "--rollout.dynamic-sampling", 3, "--log.samples", 99,
                     "--reward.visual-focus-mode", "contrast", "--reward.judges", *judges, "--reward.format", 0)
        runs.train(args, tmp_path / "logs", ranks=2,
                   before=functools.partial(_no_signal_in_odd_places, str(tmp_path / "seeds"))).check()
        # places 1 and 3, then of these two the second, then that one
        assert runs.lines_of(tmp_path / "run")[0]["refill"]["rounds"] == 2
        assert sum(runs.lines_of(tmp_path / "run")[0]["refill"]["dropped"].values()) == 3
        assert server.calls >= 16 + 8 + 4
    samples = [json.loads(line) for line in (tmp_path / "run" / "stage2" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16
    assert all({"task_aware", "visual_focus"} <= s["terms"].keys() and s["reward"] is not None for s in samples)
    assert len({s["terms"]["visual_focus"] for s in samples}) > 1
    drawn = [line.split() for line in (tmp_path / "seeds").read_text().splitlines()]
    assert len({seed for _, seed in drawn}) == len(drawn) == 28
    assert max(Counter(name for name, _ in drawn).values()) >= 12, "a row in three groups at least"
