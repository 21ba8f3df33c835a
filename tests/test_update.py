"""One optimizer step on a recorded rollout: any packing, any number of ranks; and every objective from scratch."""

# An old log-prob that is None, or a module that is none, fails these tests anyway.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportOptionalOperand=false

import functools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import runs
import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from cosmo_rl.cpgd import trainer, update
from cosmo_rl.cpgd.config import ObjectiveConfig, OptimConfig
from cosmo_rl.cpgd.objective import policy_loss, truncated_weights
from cosmo_rl.cpgd.rollout.hf import HFEngine
from cosmo_rl.cpgd.run.metrics import read_metrics
from cosmo_rl.cpgd.run.recipes import parse_command_line
from cosmo_rl.cpgd.run.rundir import RunDir
from cosmo_rl.cpgd.update import (
    chosen_ids,
    correct,
    fill_old_logprobs,
    learning_rate,
    optimizer_step,
    prepare,
    rl_loss,
    sft_loss,
    sft_updates,
    split_updates,
)
from cosmo_rl.data.prepare.mini import safety_rows
from cosmo_rl.model.parallel import init_distributed, rank, shard, together
from cosmo_rl.model.policy import Policy
from cosmo_rl.model.weights import full_state_dict

CPU = torch.device("cpu")
AGGREGATIONS = ("group", "sequence", "token")
ONE_MICRO, MANY_MICROS = 16_384, 100
"""--batch.max-tokens: all 24 sequences of the rollout together, and 2 or 3 of them."""


def moved(policy):
    """The policy after an update: 20 % of noise in every weight, so that ratios leave the clip range on both sides."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            noise = 0.2 * whole.abs().mean() * torch.randn(whole.shape, generator=generator)
            if isinstance(parameter, DTensor):
                noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
            parameter.add_(noise)


def settings(aggregation, layout, max_tokens, name="cpgd"):
    base = runs.config(objective=ObjectiveConfig(name=name, aggregation=aggregation, drift_coef=0.1))
    return replace(base, batch=replace(base.batch, layout=layout, max_tokens=max_tokens))


def updates_of(config, device="cpu"):
    (part,) = split_updates(runs.rollout().rollout, 1)
    return part.updates(runs.build(config, device))


def gradients_of(policy, config, updates, old_logprobs):
    """(loss, gradients, log-ratio spread) of this rank's updates; the old log-probs are known before."""
    policy.zero_grad(set_to_none=True)
    loss = 0.0
    loss_fn = rl_loss(config.objective)
    ratios = []
    for one, old in zip(updates, old_logprobs, strict=True):
        one.old_logprobs = old
        output = loss_fn(policy, one)
        output.loss.backward()
        loss += output.loss.item()
        ratios.append(output.logprobs - old)
    found = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return loss, {n: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for n, g in found.items()}, ratios


def old_logprobs(policy, updates):
    fill_old_logprobs(policy, updates, None)
    return [one.old_logprobs for one in updates]


def on_ranks(monkeypatch, config, number, count):
    """What rank `number` of `count` gets, without such ranks."""
    monkeypatch.setattr(update, "rank", lambda: number)
    monkeypatch.setattr(update, "world", lambda: count)
    updates = updates_of(config)
    monkeypatch.undo()
    return updates


@pytest.fixture(scope="module")
def expected():
    """Loss and gradients as one padded micro-batch on one rank, by aggregation."""
    found = {}
    for aggregation in AGGREGATIONS:
        config = settings(aggregation, "padded", ONE_MICRO)
        policy, updates = runs.policy(), updates_of(config)
        assert len(updates) == 1
        old = old_logprobs(policy, updates)
        moved(policy)
        found[aggregation] = gradients_of(policy, config, updates, old)
    return found


def close(got, expected):
    loss, gradients = expected[:2]
    assert got[0] == pytest.approx(loss, abs=1e-5)
    assert got[1].keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(got[1][name], gradient, atol=1e-5, rtol=1e-5,
                                   msg=lambda m, name=name: f"{name}: {m}")


def test_the_comparison_can_fail(expected):
    """Losses and gradients far above 1e-5, clipped and unclipped tokens, and aggregations that differ."""
    for loss, gradients, (ratio,) in expected.values():
        assert abs(loss) > 1e-3 and max(g.abs().max() for g in gradients.values()) > 1e-2
        assert (ratio > math.log(1.2)).any() and (ratio < math.log(0.8)).any() and (ratio.abs() < 0.1).any()
    losses = [loss for loss, _, _ in expected.values()]
    assert min(abs(a - b) for a, b in ((losses[0], losses[1]), (losses[1], losses[2]))) > 1e-4


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("max_tokens", [ONE_MICRO, MANY_MICROS])
@pytest.mark.parametrize("ranks", [1, 2])
def test_packing_and_ranks_change_nothing(monkeypatch, expected, aggregation, layout, max_tokens, ranks):
    config = settings(aggregation, layout, max_tokens)
    shares = [on_ranks(monkeypatch, config, number, ranks) for number in range(ranks)]
    assert len({len(share) for share in shares}) == 1, "the same number of micro-batches on each rank"
    assert (len(shares[0]) > 3) == (max_tokens == MANY_MICROS)
    updates = [one for share in shares for one in share]
    assert sorted(i for one in updates for i in one.members) == list(range(24))
    policy = runs.policy()
    old = old_logprobs(policy, updates)
    moved(policy)
    close(gradients_of(policy, config, updates, old), expected[aggregation])


def _two_ranks(path):
    """Every aggregation and layout on FSDP's two real ranks."""
    init_distributed()
    results = {}
    for aggregation in AGGREGATIONS:
        for layout, max_tokens in (("packed", MANY_MICROS), ("padded", ONE_MICRO)):
            config = settings(aggregation, layout, max_tokens)
            policy = shard(runs.policy(gradient_checkpointing=layout == "packed"), device=CPU, dtype=torch.float32,
                           freeze_vision=False).train()
            updates = updates_of(config)
            old = old_logprobs(policy, updates)
            policy.reshard()
            moved(policy)
            loss, gradients, _ = gradients_of(policy, config, updates, old)
            results[f"{aggregation}-{layout}"] = (sum(together(lambda loss=loss: loss)), gradients)
    if rank() == 0:
        torch.save(results, path)


def test_two_real_ranks(tmp_path, expected):
    runs.Running(_two_ranks, (str(tmp_path / "results.pt"),), 2, tmp_path).wait().check()
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert len(results) == 6
    for name, got in results.items():
        close(got, expected[name.split("-")[0]])


def test_the_parts_of_a_rollout_are_whole_groups_in_order():
    """Prompt 1 lost all its responses, prompt 2 one; an emptied group is no prompt of its part."""
    record = runs.rollout().rollout
    groups = [list(group) for group in record.groups]
    for g, k in ((1, 0), (1, 1), (1, 2), (1, 3), (2, 0)):
        groups[g][k] = replace(groups[g][k], reward=None, failure="no judge")
    failed = replace(record, groups=tuple(map(tuple, groups)),
                     advantages=tuple(np.arange(4) + 10.0 * g for g in range(6)))
    parts = split_updates(failed, 4)  # 2, 2, 1 and 1 prompts
    assert [part.groups for part in parts] == [[0] * 4, [2] * 3 + [3] * 4, [4] * 4, [5] * 4]
    assert [part.num_prompts for part in parts] == [1, 2, 1, 1]
    assert parts[1].advantages == [21, 22, 23, 30, 31, 32, 33]
    assert parts[1].samples == [*groups[2][1:], *groups[3]]
    assert [(len(part.samples), part.num_prompts) for part in split_updates(failed, 1)] == [(19, 5)]
    groups[0] = [replace(s, reward=None) for s in groups[0]]
    none_left = replace(failed, groups=tuple(map(tuple, groups)))
    assert [part.groups for part in split_updates(none_left, 4)] == [[2] * 3 + [3] * 4, [4] * 4, [5] * 4]


def test_batches_wait_on_the_host():
    for one in updates_of(settings("group", "padded", MANY_MICROS), "meta"):
        assert one.batch.pixel_values.device == CPU
        assert one.token_weights.is_meta and one.advantages.is_meta


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", ["cpgd", "ppo"])
def test_ratio_is_exactly_one_at_unchanged_weights(layout, name):
    """Old log-probs come by the same code path as training: bitwise equal, for the fused and the unfused loss."""
    config = settings("group", layout, MANY_MICROS, name)
    policy, updates = runs.policy(gradient_checkpointing=True).train(), updates_of(config)
    fill_old_logprobs(policy, updates, None)
    loss_fn = rl_loss(config.objective)
    for one in updates:
        output = loss_fn(policy, one)
        assert torch.equal(output.logprobs, one.old_logprobs) and output.loss.requires_grad
        assert (output.drift == 0).all() and not output.clipped.any()


def told_by_engine(engine_ahead):
    """The recorded samples, with engine log-probs that are off from the recorded ones."""
    return [replace(s, response=replace(s.response, logprobs=s.response.logprobs + ahead))
            for s, ahead in zip(runs.rollout().samples, engine_ahead, strict=True)]


@pytest.mark.parametrize("name", ["cpgd", "grpo", "ppo", "rloo", "reinforce_pp"])
def test_correction_weighs_the_policy_term_alone(name):
    """min(pi / pi_engine, cap) on each token's term, moved policy or not; drift, clips and entropy bonus stay."""
    config = settings("group", "padded", ONE_MICRO, name)
    policy, (plain,), (weighted,) = runs.policy(), updates_of(config), updates_of(config)
    rng = np.random.default_rng(0)
    ahead = [rng.normal(0, 0.8, len(s.response.ids)).astype(np.float32) for s in runs.rollout().samples]
    fill_old_logprobs(policy, [plain, weighted], None)
    samples = told_by_engine(ahead)
    correct(weighted, samples, 2.0)
    engine = torch.from_numpy(np.concatenate([samples[i].response.logprobs for i in weighted.members]))
    weights = (plain.old_logprobs - engine).exp().clamp(max=2.0)
    assert 0.05 < (weights == 2).float().mean() < 0.5 and weights.min() < 0.5
    moved(policy)
    stats = policy(plain.batch)
    without_drift = replace(config.objective, drift_coef=0.0, entropy_coef=0.0)
    bare = lambda update, config: policy_loss(
        config, replace(update, drift_coef=0.0 if config is without_drift else update.drift_coef), stats)
    expected = bare(replace(plain, token_weights=plain.token_weights * weights), without_drift).loss
    got = bare(weighted, without_drift)
    torch.testing.assert_close(got.loss, expected, atol=1e-6, rtol=1e-6)
    assert abs(got.loss - bare(plain, without_drift).loss) > 1e-3
    rest = replace(config.objective, entropy_coef=0.3)
    more, of_plain = (bare(one, rest).loss - bare(one, without_drift).loss for one in (weighted, plain))
    torch.testing.assert_close(more, of_plain, atol=1e-6, rtol=1e-5)
    assert torch.equal(got.clipped, bare(plain, without_drift).clipped)
    if name == "cpgd":  # the fused kernel does the same
        fused, plainly = rl_loss(config.objective)(policy, weighted), policy_loss(config.objective, weighted, stats)
        torch.testing.assert_close(fused.loss, plainly.loss, atol=1e-6, rtol=1e-6)


def test_correction_of_an_equal_engine_changes_nothing():
    config, policy = settings("group", "padded", ONE_MICRO), runs.policy()
    rollout = runs.rollout().rollout
    losses = []
    for cap in (0.0, 2.0):
        ((one,),), _ = prepare(policy, rollout, split_updates(rollout, 1), 0, runs.build(config), torch.float32, cap)
        losses.append(rl_loss(config.objective)(policy, one).loss)
    torch.testing.assert_close(*losses, atol=1e-7, rtol=1e-5)
    nothing = truncated_weights(torch.tensor([0.0, torch.nan, 0.0]), torch.tensor([-9.0, 0.0, -torch.inf]), 2.0)
    assert nothing.tolist() == [2.0, 0.0, 2.0], "what is not finite is left to the canary"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(bad):
    config = settings("group", "padded", ONE_MICRO)
    policy, updates = runs.policy(), updates_of(config)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    loss_fn = rl_loss(config.objective)
    good = optimizer_step(policy, optimizer, updates, loss_fn, 1e-3, 1.0)
    assert good.finite and good.response_tokens == sum(len(s.response.ids) for s in runs.rollout().samples)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    state = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in policy.parameters()]

    def poisoned(policy, one):
        output = loss_fn(policy, one)
        return output._replace(loss=output.loss + 0.0 * policy.model.lm_head.weight[0, 0] * bad)

    result = optimizer_step(policy, optimizer, updates, poisoned, 1e-3, 1.0)
    assert not result.finite
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    for parameter, old in zip(policy.parameters(), state, strict=True):
        assert old and all(torch.equal(optimizer.state[parameter][key], value) for key, value in old.items())
    assert all(p.grad is None for p in policy.parameters()), "the next step starts from nothing"
    after = optimizer_step(policy, optimizer, updates, loss_fn, 1e-3, 1.0)
    assert after.finite and not all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


def test_learning_rate():
    optim = OptimConfig(learning_rate=2.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(step, 24, optim) for step in range(24)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[14] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5)) and rates == sorted(rates[:4]) + sorted(rates[4:])[::-1]
    assert learning_rate(24, 24, optim) == learning_rate(99, 24, optim) == pytest.approx(0.2)


# -- every objective from scratch --------------------------------------------------------------------------------------

VARIANTS = {
    "cpgd": ("--objective.drift-coef", 0.5, "--objective.clip-schedule", 0.5, "--objective.clip-eps-high", 0.3),
    "exact": ("--objective.drift", "exact", "--objective.drift-coef", 0.5, "--objective.aggregation", "token"),
    "grpo": ("--objective.name", "grpo", "--objective.dual-clip", 1.3),
    "ppo": ("--objective.name", "ppo", "--objective.weight", "equal", "--objective.aggregation", "sequence"),
    "rloo": ("--objective.name", "rloo"),
    "reinforce_pp": ("--objective.name", "reinforce_pp"),
    "entropy": ("--objective.entropy-coef", 0.05, "--objective.weight", "clip_filter"),
    "contrast": ("--reward.visual-focus-mode", "contrast", "--reward.visual-focus", 1.0),
}
"""Options of one iteration of two updates, at a learning rate that drives ratios out of the clip range."""


def _record(path):
    """Keep the samples of the iteration, and the weights and the result of both updates."""
    kept = {"steps": []}
    real_split, real_step = trainer.split_updates, trainer.optimizer_step

    def split(rollout, count):
        kept["samples"] = [
            {"group": number, "id": s.id, "prompt": prompt.input_ids.tolist(),
             "types": prompt.mm_token_type_ids.tolist(),
             "pixels": None if prompt.pixel_values is None else torch.from_numpy(prompt.pixel_values),
             "grid": None if prompt.image_grid_thw is None else torch.from_numpy(prompt.image_grid_thw),
             "ids": s.response.ids.tolist(), "reward": s.reward, "terms": s.terms, "text": s.response.text}
            for number, group in enumerate(rollout.groups) for s in group for prompt in [s.response.request.prompt]]
        return real_split(rollout, count)

    def step(policy, *args):
        weights = {name: tensor.clone() for name, tensor in full_state_dict(policy)}
        result = real_step(policy, *args)
        kept["steps"].append({"weights": weights, "loss": result.loss, "grad_norm": result.grad_norm,
                              "drift": result.drift, "entropy": result.entropy, "clip_fraction": result.clip_fraction})
        torch.save(kept, path)
        return result

    trainer.split_updates, trainer.optimizer_step = split, step


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A real iteration of each variant, two at a time."""
    folder = tmp_path_factory.mktemp("variants")
    rows = runs.write_rows(folder / "rows.jsonl", runs.small_rows())
    waiting, records = [], {}

    def finish(name, running):
        running.wait().check()
        records[name] = torch.load(folder / f"{name}.pt", weights_only=True)
        records[name]["metrics"] = read_metrics(folder / name / "stage2" / "metrics.jsonl")

    for name, options in VARIANTS.items():
        args = runs.small(*runs.from_file(rows), "--run-dir", folder / name, "--steps", 2, "--rollout.prompts", 6,
                          "--optim.learning-rate", 4e-3, "--rollout.temperature", 1.3, "--log.tensorboard", "False",
                          "--objective.weight", "std", *options)
        record = functools.partial(_record, folder / f"{name}.pt")
        waiting.append((name, runs.start(args, folder / "logs", before=record)))
        if len(waiting) == 2:
            finish(*waiting.pop(0))
    for name, running in waiting:
        finish(name, running)
    return records


class Plain:
    """transformers' own model with recorded weights, one sequence at a time."""

    def __init__(self, weights):
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(runs.MODEL).eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
        self.model.model.visual.requires_grad_(False).merger.requires_grad_(True)  # as the recipe trains it

    def logprobs(self, sample, blank=False):
        """(L, V) at temperature 1.3, suppressed tokens at -inf; carries a gradient."""
        whole = torch.tensor([sample["prompt"] + sample["ids"]])
        images = {}
        if sample["pixels"] is not None:
            pixels = torch.zeros_like(sample["pixels"]) if blank else sample["pixels"]
            images = {"pixel_values": pixels, "image_grid_thw": sample["grid"]}
        self.model.model.rope_deltas = None
        types = torch.tensor([sample["types"] + [0] * len(sample["ids"])])
        logits = self.model(input_ids=whole, mm_token_type_ids=types, use_cache=False, **images).logits
        logits = logits[0, len(sample["prompt"]) - 1:-1] / 1.3
        mask = torch.zeros(logits.shape[1], dtype=torch.bool)
        mask[torch.from_numpy(runs.policy_processor().suppressed_ids)] = True
        return logits.masked_fill(mask, -torch.inf).log_softmax(-1)


def plain_advantages(name, samples):
    """By sample, from the formulas; every response of these runs has a reward."""
    reward = lambda chosen: torch.tensor([s["reward"] for s in chosen], dtype=torch.float64)
    groups = {s["group"]: [t for t in samples if t["group"] == s["group"]] for s in samples}
    live = sum(float(reward(group).max() - reward(group).min()) > 1e-6 for group in groups.values())
    assert live >= 2, "not enough signal to test anything"
    out = {}
    for group in groups.values():
        r = reward(group)
        centred = r - r.mean()
        if name == "reinforce_pp":
            centred = (r - reward(samples).mean()) / reward(samples).std()
        elif float(r.max() - r.min()) <= 1e-6:
            centred = torch.zeros_like(r)
        elif name == "rloo":
            centred = torch.stack([r[k] - (r.sum() - r[k]) / (len(r) - 1) for k in range(len(r))])
        elif name == "entropy":
            centred = centred * min(3.0, len(groups) / live)
        elif name != "ppo":
            centred = centred / r.std()
        out |= {s["id"]: a.item() for s, a in zip(group, centred, strict=True)}
    return out


def plain_loss(name, part, advantages, new, old):
    """(loss with gradient, mean drift, mean entropy) of one update, token by token."""
    groups = {s["group"] for s in part}
    tokens = sum(len(s["ids"]) for s in part)
    loss, drift, entropy = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    for sample in part:
        distribution, before = new.logprobs(sample).double(), old.logprobs(sample).double().detach()
        ids = torch.tensor(sample["ids"])[:, None]
        l = (distribution.gather(1, ids) - before.gather(1, ids))[:, 0]
        a, length = advantages[sample["id"]], len(ids)
        per_group = sum(len(s["ids"]) for s in part if s["group"] == sample["group"])
        weight = {"exact": 1 / tokens, "ppo": 1 / (len(part) * length)}.get(name, 1 / (len(groups) * per_group))
        eps = torch.full((length,), 0.2, dtype=torch.float64)
        if name == "cpgd":
            eps = (0.3 if a > 0 else 0.2) * (0.5 + 0.5 * torch.arange(1, length + 1) / length)
        probabilities = distribution.exp()
        finite = distribution.masked_fill(probabilities == 0, 0.0)
        h = -(probabilities * finite).sum(1)
        k3 = l.exp() - 1 - l
        if name in ("cpgd", "entropy", "contrast", "exact"):
            phi = a * torch.minimum(l, (1 + eps).log()) if a > 0 else a * torch.maximum(l, (1 - eps).log())
            if name == "exact":
                p_old = before.exp()
                kl = (p_old * (before.masked_fill(p_old == 0, 0.0) - finite)).sum(1)
                penalty, k3 = 0.5 * kl, kl
            else:
                penalty = (0.5 if name == "cpgd" else 0.01) * k3
            token_loss = -phi + penalty
        elif name == "rloo":
            token_loss = -l.exp() * a
        else:
            token_loss = -torch.minimum(l.exp() * a, l.exp().clamp(0.8, 1.2) * a)
            if name == "grpo" and a < 0:
                token_loss = token_loss.clamp(max=-1.3 * a)
        if name == "entropy":
            token_loss = token_loss - 0.05 * h
        loss = loss + weight * token_loss.sum()
        drift, entropy = drift + k3.sum().item(), entropy + h.sum().item()
    return loss, drift / tokens, entropy / tokens


@pytest.mark.parametrize("name", VARIANTS)
def test_an_iteration_from_scratch(recorded, name):
    record = recorded[name]
    samples, steps = record["samples"], record["steps"]
    advantages = plain_advantages(name, samples)
    old = Plain(steps[0]["weights"])
    assert len(samples) == 24 and len(steps) == 2
    for number, step in enumerate(steps):
        part = [s for s in samples if s["group"] // 3 == number]
        new = Plain(step["weights"])
        loss, drift, entropy = plain_loss(name, part, advantages, new, old)
        assert step["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=2e-6)
        assert step["drift"] == pytest.approx(drift, rel=1e-3, abs=1e-6)
        assert step["entropy"] == pytest.approx(entropy, rel=1e-4)
        assert (step["drift"] == 0) == (number == 0)
        if number == 0 or name == "exact":  # k3's gradient is clipped on its coefficient: test_cpgd_objective
            loss.backward()
            norm = math.sqrt(sum(p.grad.double().square().sum() for p in new.model.parameters() if p.grad is not None))
            assert step["grad_norm"] == pytest.approx(norm, rel=1e-3, abs=1e-7)
        line = record["metrics"][number]
        assert line["loss"] == step["loss"] and line["grad_norm"] == step["grad_norm"]
    assert steps[1]["drift"] > 1e-3, "the second update is too near to the first to test anything"


def test_the_clips_were_met(recorded):
    assert sum(recorded[name]["steps"][1]["clip_fraction"] > 0 for name in ("cpgd", "grpo", "ppo", "reinforce_pp")) >= 3


def test_contrast_from_scratch(recorded):
    """clip(mean log p(answer | image) - mean log p(answer | blank), 0, 1) of each well-formed response to an image."""
    record = recorded["contrast"]
    plain = Plain(record["steps"][0]["weights"])
    values = []
    for sample in record["samples"]:
        assert ("visual_focus" in sample["terms"]) == (sample["pixels"] is not None)
        decode = runs.policy_processor().tokenizer.decode
        if sample["pixels"] is None or sample["text"].count("</think>") != 1 or sample["terms"]["format"] == 0:
            assert sample["terms"].get("visual_focus", 0.0) == 0.0
            continue
        start = next(i for i in range(len(sample["ids"])) if "</think>" in decode(sample["ids"][:i + 1])) + 1
        ids = torch.tensor(sample["ids"])[:, None]
        seen, blank = (plain.logprobs(sample, blank=b).gather(1, ids)[start:].mean().item() for b in (False, True))
        assert sample["terms"]["visual_focus"] == pytest.approx(min(max(seen - blank, 0.0), 1.0), abs=1e-4)
        values.append(sample["terms"]["visual_focus"])
    assert len(values) > 8 and any(0 < value < 1 for value in values), values


# -- stage 0 -----------------------------------------------------------------------------------------------------------

CHOSEN = ["<think> saw swallow </think> sorry i can not help with that", "<think> bell </think> sure here is how", "no"]


@pytest.fixture
def rows():
    made = [replace(row, chosen=text) for row, text in zip(safety_rows("validation")[:3], CHOSEN, strict=True)]
    return [*made[:2], replace(runs.text_only(made[2]), chosen=CHOSEN[2])]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_sft_loss_from_scratch(rows, layout):
    processor, config = runs.policy_processor(), runs.config()
    build = runs.build(replace(config, batch=replace(config.batch, layout=layout, max_tokens=60)))
    prompts = list(map(runs.encode, rows))
    updates = sft_updates(list(zip(rows, prompts, strict=True)), replace(build, aggregation="token"))
    assert len(updates) > 1
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(runs.MODEL).eval()
    policy = Policy(model, suppressed_ids=processor.suppressed_ids, temperature=1.0)
    got = sum(sft_loss(policy, one).loss.item() for one in updates)

    total, count = 0.0, 0
    for row, prompt in zip(rows, prompts, strict=True):
        tokenizer = processor.tokenizer
        ids = [*tokenizer(row.chosen, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        images = {} if prompt.pixel_values is None else {
            "pixel_values": torch.from_numpy(prompt.pixel_values),
            "image_grid_thw": torch.from_numpy(prompt.image_grid_thw)}
        types = torch.tensor([[*prompt.mm_token_type_ids, *[0] * len(ids)]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt.input_ids, *ids]]), use_cache=False,
                           mm_token_type_ids=types, **images).logits
        logits = logits[0, len(prompt.input_ids) - 1:-1]
        logits[:, torch.from_numpy(processor.suppressed_ids)] = -torch.inf
        total += torch.nn.functional.cross_entropy(logits.double(), torch.tensor(ids), reduction="sum").item()
        count += len(ids)
    assert got == pytest.approx(total / count, rel=1e-5) and got > 0.01


def test_rows_without_a_response(rows):
    processor = runs.policy_processor()
    end = processor.tokenizer.eos_token_id
    assert chosen_ids(rows[0], processor).tolist() == [*processor.tokenizer(CHOSEN[0])["input_ids"], end]
    with pytest.raises(ValueError, match=rf"row {rows[1].id}: stage 0 imitates `chosen`, which is missing; add it"):
        chosen_ids(replace(rows[1], chosen=None), processor)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>"])
def test_special_tokens_are_not_imitated(rows, token):
    row = replace(rows[0], chosen=f"look {token} here")
    with pytest.raises(ValueError, match=f"row {row.id}: `chosen` holds the special token {re.escape(token)}; remove"):
        chosen_ids(row, runs.policy_processor())


def test_a_small_stage_0(tmp_path, rows):
    """Imitates three rows: the loss falls; two ranks do the same as one."""
    path = runs.write_rows(tmp_path / "rows.jsonl", rows)
    args = ["--stage", 0, "--model.path", runs.MODEL, *runs.from_file(path), "--steps", 6, "--optim.sft-batch", 3,
            "--optim.warmup-steps", 0, "--log.tensorboard", "False"]
    both = [runs.start([*args, "--run-dir", tmp_path / str(ranks)], tmp_path, ranks=ranks) for ranks in (1, 2)]
    for running in both:
        running.wait().check()
    one, two = (runs.lines_of(tmp_path / str(ranks), stage=0) for ranks in (1, 2))
    assert len(one) == 6 and one[-1]["loss"] < 0.5 * one[0]["loss"]
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-3)
    assert (tmp_path / "1" / "stage0" / "hf" / "model.safetensors").exists()


def test_the_engine_rests_in_stage_0(tmp_path, rows, monkeypatch):
    """It has weights from its check and from each measurement; what it frees is gone until the next of them."""
    done = []
    monkeypatch.setattr(trainer, "shard", lambda policy, **_: policy)
    monkeypatch.setattr(HFEngine, "rest", lambda self: done.append("rest") or True)
    monkeypatch.setattr(trainer, "optimizer_step", lambda *args: done.append("step") or optimizer_step(*args))
    path = runs.write_rows(tmp_path / "rows.jsonl", rows)
    args = ["--stage", 0, "--model.path", runs.MODEL, *runs.from_file(path), "--optim.sft-batch", 3,
            "--log.tensorboard", "False", "--run-dir", tmp_path / "run"]
    config = parse_command_line(list(map(str, args)))
    stage = trainer.Trainer(config, RunDir(config.run_dir, 0, config), torch.device("cpu"))
    stage.metrics.rewind(-1)
    try:
        stage._sync()
        stage._sft_iteration()
    finally:
        stage.close()
    assert done == ["rest", "step"] and stage.synced is None
