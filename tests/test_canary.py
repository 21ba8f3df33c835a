"""Faults of an engine, planted one by one: each stops the run and is named. And what the canary says of an honest one.

The real trainer in this process, a few rollouts of the shipped policy; what is planted are wrong ways of the hf engine.
"""

# Parts of the engine are replaced here.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportOperatorIssue=false

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import runs
import torch

from cosmo_rl.cpgd import trainer
from cosmo_rl.cpgd.config import ObjectiveConfig, RolloutConfig
from cosmo_rl.cpgd.rollout import collect, hf
from cosmo_rl.cpgd.rollout.hf import HFEngine
from cosmo_rl.cpgd.run.canary import (
    KEEP,
    LIMITS,
    NOISE_FACTOR,
    Canary,
    CanaryError,
    Reading,
    Sampler,
    _measured,
    check_advantages,
    check_versions,
)
from cosmo_rl.cpgd.run.metrics import read_metrics
from cosmo_rl.cpgd.run.recipes import parse_command_line
from cosmo_rl.cpgd.run.rundir import RunDir
from cosmo_rl.cpgd.trainer import Trainer
from cosmo_rl.cpgd.update import fill_old_logprobs, prepare, split_updates


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """12 safety rows, and 12 general ones of which 3 have no picture."""
    return runs.write_rows(tmp_path_factory.mktemp("canary") / "rows.jsonl", runs.small_rows())


@pytest.fixture
def run(rows, tmp_path, monkeypatch):
    """(options, rollouts) -> the trainer after so many."""
    monkeypatch.setattr(trainer, "shard", lambda policy, **_: policy)
    numbers = itertools.count()

    def start(*options, rollouts):
        args = runs.small(*runs.from_file(rows), "--steps", 60, "--rollout.prompts", 12, "--rollout.group-size", 8,
                          "--rollout.batch-size", 96, "--rollout.temperature", 1.3, "--log.tensorboard", "False",
                          "--run-dir", tmp_path / str(next(numbers)), *options)
        config = parse_command_line(list(map(str, args)))
        stage = Trainer(config, RunDir(config.run_dir, 2, config), torch.device("cpu"))
        stage.metrics.rewind(-1)
        try:
            for _ in range(rollouts):
                stage._rl_iteration()
        finally:
            stage.close()
        return stage

    return start


# -- the engine's faults -----------------------------------------------------------------------------------------------

def perturbed(patch):
    """One number of one weight, after each sync."""
    def sync(self, weights, version, real=HFEngine.sync):
        real(self, weights, version)
        self.model.model.language_model.layers[0].mlp.down_proj.weight.data[3, 5] += 1

    patch.setattr(HFEngine, "sync", sync)


def unsynced(*parts):
    """Weights whose names hold one of `parts` stay as they were at the first sync; the version goes on."""
    def plant(patch):
        def sync(self, weights, version, real=HFEngine.sync):
            own = {} if version == 0 else dict(self.model.named_parameters())
            real(self, lambda: ((name, own[name].clone() if name in own and any(part in name for part in parts)
                                 else tensor) for name, tensor in weights()), version)

        patch.setattr(HFEngine, "sync", sync)

    return plant


def positions(change):
    """M-RoPE positions (3, B, P) of the engine's prompts, changed."""
    def plant(patch):
        def left_pad(*args, real=hf._left_pad):
            ids, mask, found = real(*args)
            return ids, mask, change(found, mask)

        patch.setattr(hf, "_left_pad", left_pad)

    return plant


def sampler(change, told="raw"):
    """The engine draws from changed logits; it tells log-probs of the policy ("raw") or of what it draws from."""
    def plant(patch):
        class Planted(hf._Sampler):
            def __call__(self, input_ids, scores):
                raw = (scores / self.temperature).index_fill(1, self.suppressed, -torch.inf).log_softmax(-1)
                picked = super().__call__(input_ids, change(self, raw.clone()) * self.temperature)
                if told == "raw":
                    self.logprobs[-1] = raw.gather(1, picked.argmax(-1, keepdim=True)).squeeze(1)
                return picked

        patch.setattr(hf, "_Sampler", Planted)

    return plant


def top_p(_, logprobs):
    ordered, order = logprobs.exp().sort(descending=True)
    dropped = ordered.cumsum(-1) - ordered >= 0.9
    return logprobs.scatter(1, order, logprobs.gather(1, order).masked_fill(dropped, -torch.inf))


def min_tokens(self, logprobs):
    if len(self.logprobs) < 12:
        logprobs[:, list(runs.policy_processor().eos_ids)] = -torch.inf
    return logprobs


def greedy(self, logprobs):
    self.uniforms = None
    return logprobs


def placeholder(patch):
    """The engine suppresses nothing, and once in a while draws a picture's placeholder."""
    class Planted(hf._Sampler):
        def __call__(self, input_ids, scores):
            self.suppressed = self.suppressed[:0]
            if len(self.logprobs) == 2:
                scores[0, runs.policy_processor().image_token_id] = 30.0
            return super().__call__(input_ids, scores)

    patch.setattr(hf, "_Sampler", Planted)


TEXT_ONLY = lambda found, mask: (mask.cumsum(-1) - 1).clamp_(min=0).expand_as(found)
SWAPPED = lambda found, _: found[[0, 2, 1]]
COOLER = lambda _, logprobs: logprobs / 0.7
OTHERS = "the engine holds other weights, positions or images"
SETTINGS = "look at its sampling settings"
FAULTS = {
    # name: (how it is planted, rollouts within which the run stops, the cause named)
    "one perturbed weight": (perturbed, 1, OTHERS),
    "a sync left out": (unsynced(""), 2, OTHERS),
    "q_proj never synced": (unsynced("q_proj"), 2, OTHERS),
    "norms never synced": (unsynced("norm"), 2, OTHERS),
    "M-RoPE positions lost": (positions(TEXT_ONLY), 1, "rows without a picture agree, so that positions, images"),
    "M-RoPE height and width swapped": (positions(SWAPPED), 1, "rows without a picture agree, so that positions,"),
    "top-p, renormalised": (sampler(top_p, "processed"), 1, "as where fewer tokens are left to draw from: " + SETTINGS),
    "top-p, raw": (sampler(top_p), 4, SETTINGS),
    "temperature, processed": (sampler(COOLER, "processed"), 1, SETTINGS),
    "temperature, raw": (sampler(COOLER), 4, SETTINGS),
    "min_tokens, processed": (sampler(min_tokens, "processed"), 1, SETTINGS),
    "min_tokens, raw": (sampler(min_tokens), 4, SETTINGS),
    "greedy": (sampler(greedy), 4, SETTINGS),
    "a placeholder sampled": (placeholder, 1, "sampled a token that the policy never does"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_stops_the_run(run, monkeypatch, name):
    plant, rollouts, cause = FAULTS[name]
    plant(monkeypatch)
    with pytest.raises(CanaryError, match=cause) as caught:
        run(rollouts=rollouts)
    assert "at step" in str(caught.value) and "#" in str(caught.value)


def test_an_honest_engine_is_let_through(run):
    """Prompts replaced by dynamic sampling and all: gaps of rounding, and a z that is one."""
    stage = run("--rollout.dynamic-sampling", 2, rollouts=3)
    lines = read_metrics(stage.metrics.path("metrics"))
    assert len(lines) == 6 and any(line["refill"]["rounds"] for line in lines)
    for line in lines:
        gap = line["engine_gap"]
        assert 0 < gap["mean"] < gap["p99"] < gap["max"] < 2e-5 and gap["mean"] < gap["response"] < gap["max"]
        assert abs(line["sampler_z"]) < 3 and "correction" not in line
    assert len({line["sampler_z"] for line in lines}) == 3, "each rollout was read"
    json.dumps(stage.canary.state_dict(), allow_nan=False)


def test_correction_of_an_honest_engine(run):
    """Weights of 1 to rounding; every update gets its old log-probs, and the step is the same."""
    plain, weighted = (read_metrics(run(*options, rollouts=1).metrics.path("metrics"))
                       for options in ((), ("--rollout.correction", 2)))
    for line, other in zip(plain, weighted, strict=True):
        assert other["correction"] == {"mean": pytest.approx(1, abs=1e-6), "truncated": 0}
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4) and line["grad_norm"] > 0.01
        assert other["engine_gap"] == line["engine_gap"] and other["sampler_z"] == line["sampler_z"]


# -- groups and failed samples -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Rows of one text whose pictures differ, each twice, and rows without a picture."""
    general = [row for row in runs.small_rows() if row.domain == "general"]
    seen = [row for row in general if row.images][:3]
    twins = [replace(row, messages=seen[0].messages, answer=seen[0].answer) for row in seen]
    return runs.write_rows(tmp_path_factory.mktemp("twins") / "rows.jsonl", [*twins, *general[9:]])


def merged(patch):
    """Requests of equal token ids share one prefill, whatever their pictures."""
    def generate_batch(self, requests, greedy, real=HFEngine._generate_batch):
        first = {}
        shared = [replace(r, prompt=first.setdefault(r.prompt.input_ids.tobytes(), r.prompt)) for r in requests]
        return [replace(done, request=r) for r, done in zip(requests, real(self, shared, greedy), strict=True)]

    patch.setattr(HFEngine, "_generate_batch", generate_batch)


def test_rows_of_equal_text_stay_apart(run, twins, monkeypatch):
    """Groups go by the prompt that was drawn; an engine that takes one picture for all of a text is stopped."""
    found = []
    monkeypatch.setattr(trainer, "check_versions", lambda rollout: found.append(rollout))
    options = ("--data.path", twins, "--rollout.prompts", 6, "--optim.updates-per-rollout", 1)
    run(*options, rollouts=1)
    groups = found[0].groups
    text = lambda group: group[0].response.request.prompt.input_ids.tobytes()
    alike = [group for group in groups if text(group) == text(max(groups, key=lambda g: len(g[0].row.images)))]
    assert len({group[0].row.id for group in alike}) == 3 and len(groups) == 6
    for group, advantages in zip(groups, found[0].advantages, strict=True):
        assert len({sample.row.id for sample in group}) == 1
        rewards = np.array([sample.reward for sample in group])
        np.testing.assert_allclose(advantages, rewards - rewards.mean(), atol=1e-12)  # the recipe's weight is "equal"
    assert len({tuple(s.reward for s in group) for group in alike}) > 1, "merged, they would have another mean"
    (part,) = split_updates(found[0], 1)
    assert part.groups == [number for number in range(6) for _ in range(8)] and part.num_prompts == 6

    merged(monkeypatch)
    with pytest.raises(CanaryError, match="rows without a picture agree, so that positions, images or"):
        run(*options, rollouts=1)


def fail_one(patch):
    """The reward of one sample of each rollout fails."""
    def score(*args, real=collect.score):
        samples = real(*args)
        return [replace(samples[0], reward=None, failure="no judge"), *samples[1:]]

    patch.setattr(collect, "score", score)


def test_a_failed_sample_has_no_vote(run, monkeypatch):
    fail_one(monkeypatch)
    read = []
    check = lambda self, rollout, readings, step, real=Canary.check: (
        read.append([s for reading in readings for s in reading.samples]), real(self, rollout, readings, step))[1]
    monkeypatch.setattr(Canary, "check", check)
    run(rollouts=1)
    assert sum(sample.reward is None for sample in read[0]) == 1 and len(read[0]) == 96, "it is read as the others are"

    def votes(groups, objective, real=collect.rollout_advantages):
        voting = [tuple(replace(s, reward=s.reward or 0.0) for s in group) for group in groups]
        return tuple(np.where([s.reward is None for s in group], 0.0, advantages)
                     for group, advantages in zip(groups, real(voting, objective), strict=True))

    monkeypatch.setattr(collect, "rollout_advantages", votes)
    with pytest.raises(CanaryError, match="a failed sample had a vote in its group's mean"):
        run(rollouts=1)


@pytest.mark.parametrize("name", ["cpgd", "grpo", "ppo", "rloo", "reinforce_pp"])
def test_advantages_of_every_objective(name):
    """Honest ones pass; a vote does not, also where an overlong sample is at the mean of its group."""
    found = runs.rollout().rollout
    groups = [list(group) for group in found.groups]
    which = next(g for g, group in enumerate(groups) if len({s.reward for s in group}) > 1)
    groups[which][0] = replace(groups[which][0], reward=None, failure="no judge")
    lost = groups[which][0].id
    rollout = lambda groups, advantages: replace(found, groups=tuple(map(tuple, groups)), advantages=advantages)
    honest = collect.rollout_advantages(groups, ObjectiveConfig(name=name))
    check_advantages(rollout(groups, honest))

    spoiled = [values.copy() for values in honest]
    spoiled[which][0] = 0.1
    with pytest.raises(CanaryError, match=rf"{lost} has no reward \(no judge\), and an advantage of 0\.1"):
        check_advantages(rollout(groups, tuple(spoiled)))
    spoiled[which][0] = 0.0
    spoiled[which][1:] += 0.01
    with pytest.raises(CanaryError, match=r"advantages sum to 0\.03 over"):
        check_advantages(rollout(groups, tuple(spoiled)))
    cut = groups[which][1]
    groups[which][1] = replace(cut, response=replace(cut.response, finish_reason="length"))
    spoiled[which][1] = 0.0
    with pytest.raises(CanaryError, match="a failed sample had a vote"):
        check_advantages(rollout(groups, tuple(spoiled)))


def test_responses_of_other_weights(run, monkeypatch):
    check_versions(runs.rollout().rollout)

    def sync(self, weights, version, real=HFEngine.sync):
        real(self, weights, 0)

    monkeypatch.setattr(HFEngine, "sync", sync)
    with pytest.raises(CanaryError, match=r"96 responses were sampled with weights of another version than 2, as \S+#0 "
                                          "with 0: the engine did not take the last weights"):
        run(rollouts=2)


# -- limits and sums ---------------------------------------------------------------------------------------------------

def reading(ahead=0.0, entropy=1.0):
    """The recorded rollout as the canary reads it, the engine's log-probs `ahead` of the trainer's.

    Each token has `entropy` times the mean surprise of all.
    """
    (part,) = split_updates(runs.rollout().rollout, 1)
    updates = part.updates(runs.build(runs.config()))
    mean = -np.concatenate([sample.response.logprobs for sample in part.samples]).mean()
    stats = []
    for update in updates:
        engine = torch.from_numpy(np.concatenate([part.samples[i].response.logprobs for i in update.members]))
        stats.append((engine - ahead, torch.full_like(engine, entropy * mean)))
    return [Reading(part.samples, updates, stats)]


def canary(dtype="float32", **config):
    return Canary(RolloutConfig(**config), dtype)


def test_the_limit_follows_dtype_and_noise():
    """The noise is that of the first rollout, before and after a resume; a limit given overrides it."""
    found = runs.rollout().rollout
    for dtype, (least, largest) in LIMITS.items():
        for gap in (least / 100, least / 5, largest / 2):
            one = canary(dtype)
            told = one.check(found, reading(gap), 1)["engine_gap"]
            assert one.noise == pytest.approx(gap, rel=2e-2)
            assert one.limit == pytest.approx(np.clip(NOISE_FACTOR * one.noise, least, largest))
            assert told["mean"] == pytest.approx(gap, rel=2e-2) and told["response"] == one.noise
            one.check(found, reading(0.9 * one.limit), 2)
            with pytest.raises(CanaryError, match=rf"at step 3, mean .* {dtype}, where the first rollout had"):
                one.check(found, reading(1.1 * one.limit), 3)
            again = canary(dtype)
            again.load_state_dict(json.loads(json.dumps(one.state_dict())))
            assert again == one
        with pytest.raises(CanaryError):
            canary(dtype).check(found, reading(1.1 * largest), 1)
    given = canary(canary_limit=0.3)
    given.check(found, reading(0.2), 1)
    with pytest.raises(CanaryError, match=r"up to 0.4 nats, beyond 0.3 \(--rollout.canary-limit\)"):
        given.check(found, reading(0.4), 2)
    one = canary()
    one.load_state_dict(None)  # of a checkpoint from before there was any
    assert one == canary()


def test_one_response_is_named():
    """Not finite, or far off: no mean over others hides it."""
    found = runs.rollout().rollout
    for bad, cause in ((math.nan, "log-probs or entropies are not finite"),
                       (0.05, "the engine holds other weights or positions")):
        read = reading()
        (update,), ((logprobs, _),) = read[0].updates, read[0].stats
        place = update.members.index(21)  # of the row without a picture
        own = update.batch.sequence_ids == place
        logprobs[own] += bad * torch.tensor([1.0, -1.0]).repeat(int(own.sum()))[:int(own.sum())]
        name = read[0].samples[21].id
        with pytest.raises(CanaryError, match=rf"disagree on 1 of 24 responses at step 7.*: {name}; {cause}"):
            canary().check(found, read, 7)


def test_an_entropy_that_is_not_finite_stops_the_run():
    """In the sums of z it would stay, and no sampler be seen again."""
    found, read, one = runs.rollout().rollout, reading(), canary()
    read[0].stats[0][1][3] = math.nan
    with pytest.raises(CanaryError, match=r"disagree on 1 of 24 .*; log-probs or entropies are not finite"):
        one.check(found, read, 7)


def test_the_sums_of_z_by_hand():
    """Older rollouts count less, and only prompts drawn first: the others were chosen by their rewards."""
    found = runs.rollout().rollout
    one, read = canary(), reading(entropy=1.2)
    surprises = torch.cat([-logprobs - entropy for logprobs, entropy in read[0].stats]).double()
    total, variance = surprises.sum().item(), surprises.square().sum().item()
    assert one.check(found, read, 1)["sampler_z"] == pytest.approx(total / math.sqrt(variance))
    z = (1 + KEEP) * total / math.sqrt((1 + KEEP**2) * variance)
    assert abs(z) < 6 and one.check(found, read, 2)["sampler_z"] == pytest.approx(z)
    entropy = read[0].stats[0][1][0].item()
    assert one.sampler.entropy == pytest.approx((1 + KEEP) * entropy * len(surprises))

    some = canary()
    some.check(replace(found, first=found.first[3:]), read, 1)
    kept = sum(float((-s.response.logprobs - entropy).sum()) for group in found.first[3:] for s in group)
    assert some.sampler.surprise == pytest.approx(kept, rel=1e-5)


def test_nearly_sure_tokens_raise_no_alarm():
    """Of 4,000 tokens that are another once in 10,000 times none was: the spread observed alone gives z = -63."""
    rare = 1e-4
    logprobs = np.full(4000, np.log1p(-rare))
    entropy = np.full(4000, -rare * math.log(rare) - (1 - rare) * math.log1p(-rare))
    _, surprise, variance, total = _measured(logprobs, logprobs, entropy)
    assert surprise / math.sqrt(np.square(-logprobs - entropy).sum()) < -60
    assert -1 < Sampler(surprise=surprise, variance=variance, entropy=total).z < -0.5
    assert variance == pytest.approx(4000 * rare * (1 - rare) * math.log((1 - rare) / rare) ** 2, rel=0.2)


def test_rounding_that_has_a_z_is_let_through():
    """Millions of tokens make any bias significant; it has to reach a share of the entropy too."""
    assert not Sampler(surprise=-90.0, variance=100.0, entropy=10_000.0).off
    assert Sampler(surprise=-110.0, variance=100.0, entropy=10_000.0).off
    assert not Sampler(surprise=-50.0, variance=100.0, entropy=100.0).off
    assert Sampler().z == 0


def test_everything_sampled_is_read_once():
    """What is trained on, failed samples and dropped groups; the first part by its own step, unless it is corrected."""
    found = runs.rollout().rollout
    groups = [list(group) for group in found.groups]
    groups[0][1] = replace(groups[0][1], reward=None)
    first = [tuple(group) for group in groups]
    kept = replace(found, first=tuple(first), groups=(*first[1:], found.groups[0]),
                   advantages=(*found.advantages[1:], found.advantages[0]))
    settings, policy = runs.config(), runs.policy()
    parts = split_updates(kept, 2)
    for correction in (0.0, 2.0):
        plans, read = prepare(policy, kept, parts, 0, runs.build(settings), torch.float32, correction)
        assert (plans[0][0].old_logprobs is None) == (not correction)
        if not correction:
            read.append(Reading(parts[0].samples, plans[0], fill_old_logprobs(policy, plans[0], None)))
        names = [id(sample) for one in read for sample in one.samples]
        assert sorted(names) == sorted({id(s) for group in (*kept.first, *kept.groups) for s in group})
        told = canary().check(kept, read, 1)
        assert told["engine_gap"]["max"] < 1e-4
