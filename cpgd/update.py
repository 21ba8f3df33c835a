"""One optimizer step: sequences -> `Update`s, the micro-batches of this rank -> gradients -> step, all ranks together.

The loss is a sum over response tokens times a per-token weight that already holds the global normaliser, so neither the
split into micro-batches nor the number of ranks changes it. Stage 0 imitates `chosen` by the same path.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from cosmo_rl.data.collate import EncodedPrompt, TokenSequence, collate, plan_microbatches
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import Row
from cosmo_rl.kernels.linear_cpgd import CPGDOutput
from cosmo_rl.model.load import Processor
from cosmo_rl.model.parallel import clip_grad_norm, rank, world
from cosmo_rl.model.policy import Policy, Update

from .config import BatchConfig, ObjectiveConfig, OptimConfig
from .objective import clip_bounds, policy_loss, token_weights, truncated_weights
from .rollout.values import Rollout, Sample

SUMS = ("loss", "clipped", "drift", "entropy", "tokens")
"""What a micro-batch adds up, in this order; all but `loss` are sums over its response tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildUpdates:
    """Makes this rank's updates from the sequences of an optimizer step; every rank gets the same number of them."""

    batch: BatchConfig
    objective: ObjectiveConfig
    aggregation: str
    """Of the token weights: "group", "sequence" or "token"."""
    processor: Processor
    device: torch.device

    def __call__(self, sequences: Sequence[TokenSequence], advantages: Sequence[float], groups: Sequence[int],
                 num_prompts: int) -> list[Update]:
        """
        Args:
            sequences, advantages, groups: of the whole optimizer step, one entry a sequence.
            num_prompts: prompts of the step, for aggregation "group".
        """
        lengths = np.array([len(s.response_ids) for s in sequences], dtype=np.int64)
        weights = token_weights(lengths, np.array(groups), num_prompts, self.aggregation)
        plan = plan_microbatches([len(s) for s in sequences], max_tokens=self.batch.max_tokens,
                                 layout=self.batch.layout, world_size=world())
        return [self._update(members, sequences, lengths, weights, np.asarray(advantages, dtype=np.float64))
                for members in plan[rank()]]

    def _update(self, members: list[int], sequences: Sequence[TokenSequence], lengths: np.ndarray, weights: np.ndarray,
                advantages: np.ndarray) -> Update:
        batch = collate([sequences[i] for i in members], layout=self.batch.layout, pad_id=self.processor.pad_id,
                        dummy_image=self.processor.dummy_image())
        owner = np.array(members, dtype=np.int64)[batch.sequence_ids.numpy()]
        positions = np.concatenate([np.arange(1, lengths[i] + 1) for i in members] or [np.zeros(0, dtype=np.int64)])
        low, high = clip_bounds(self.objective, torch.from_numpy(positions), torch.from_numpy(lengths[owner]))
        spread = lambda values: torch.from_numpy(values[owner]).float().to(self.device)
        return Update(
            batch=batch, members=list(members), token_weights=spread(weights), advantages=spread(advantages),
            clip_eps_low=low.to(self.device) if isinstance(low, torch.Tensor) else low,
            clip_eps_high=high.to(self.device) if isinstance(high, torch.Tensor) else high,
            drift_coef=self.objective.drift_coef, drift_clip=self.objective.drift_clip,
        )


Stats = tuple[torch.Tensor, torch.Tensor]
"""(N,) log-probs and (N,) entropies of an update."""


class Reading(NamedTuple):
    """Samples that the policy has read which should have sampled them; for the canary."""

    samples: Sequence[Sample]
    updates: Sequence[Update]
    """This rank's."""
    stats: Sequence[Stats]
    """Of each update."""


class Part(NamedTuple):
    """What one optimizer step of a rollout is made of: whole groups, without the samples that do not teach."""

    samples: list[Sample]
    advantages: list[float]
    groups: list[int]
    """Index in the rollout of each sample's group."""

    @property
    def num_prompts(self) -> int:
        """A group counts as a prompt when at least one of its samples teaches, degenerate or not."""
        return len(set(self.groups))

    def updates(self, build: BuildUpdates) -> list[Update]:
        """This rank's."""
        sequences = [TokenSequence(s.response.request.prompt, s.response.ids) for s in self.samples]
        return build(sequences, self.advantages, self.groups, self.num_prompts)


def split_updates(rollout: Rollout, count: int) -> list[Part]:
    """The parts of `count` optimizer steps: contiguous groups in prompt order; one that teaches nothing is left out."""
    parts = []
    for groups in np.array_split(np.arange(len(rollout.groups)), count):
        kept = [(sample, advantage, int(g)) for g in groups
                for sample, advantage in zip(rollout.groups[g], rollout.advantages[g].tolist(), strict=True)
                if rollout.teaches(sample)]
        if kept:
            parts.append(Part(*map(list, zip(*kept, strict=True))))
    return parts


def chosen_ids(row: Row, processor: Processor) -> np.ndarray:
    """(L,) int64, the tokens of `chosen` and the end of the turn.

    Raises:
        UserError: there is none, or it holds a special token.
    """
    if not row.chosen:
        raise UserError(f"row {row.id}: stage 0 imitates `chosen`, which is missing; add it or drop the row")
    ids = processor.tokenizer(row.chosen, add_special_tokens=False)["input_ids"]
    banned = set(ids) & {*processor.suppressed_ids.tolist(), *processor.eos_ids}
    if banned:
        raise UserError(f"row {row.id}: `chosen` holds the special token "
                        f"{processor.tokenizer.convert_ids_to_tokens(min(banned))}; remove it")
    return np.array([*ids, processor.tokenizer.eos_token_id], dtype=np.int64)


def sft_updates(prompts: Sequence[tuple[Row, EncodedPrompt]], build: BuildUpdates) -> list[Update]:
    """This rank's updates of a step of stage 0: `chosen` closed by the end of the turn, by the build's aggregation."""
    sequences = [TokenSequence(prompt, chosen_ids(row, build.processor)) for row, prompt in prompts]
    return build(sequences, [0.0] * len(sequences), list(range(len(sequences))), len(sequences))


@torch.no_grad()
def fill_old_logprobs(policy: Policy, updates: Sequence[Update], old_weight: torch.Tensor | None) -> list[Stats]:
    """Log-probs of the policy that sampled, by the same code path as training; all ranks must call it together.

    Args:
        old_weight: (V, D) copy of the head for the exact drift, which also keeps the hidden states; else None.
    Returns:
        Log-probs and entropies of each update.
    """
    stats = []
    for update in updates:
        output, hidden = policy(update.batch, cpgd=update, return_hidden=True)
        update.old_logprobs = output.logprobs
        if old_weight is not None:
            update.old_hidden, update.old_weight = hidden, old_weight
        stats.append((output.logprobs, output.entropy))
    return stats


def prepare(policy: Policy, rollout: Rollout, parts: Sequence[Part], step: int, build: BuildUpdates,
            dtype: torch.dtype, correction: float = 0.0) -> tuple[list[list[Update]], list[Reading]]:
    """This rank's updates of each part, and what was read for them; all ranks must call it together, before the first
    of them is trained on.

    The ratio is 1 for the policy that sampled. A part that will meet a later one, as every part but the first does,
    gets its old log-probs; with a correction each does, at the cost of one more forward of the first. What no part
    holds, failed samples and groups that were dropped, is read too, for the canary. A rollout of older weights takes
    its old log-probs from the engine, and nothing is read.

    Args:
        step: version of the policy, which the first part meets.
        dtype: that the policy computes in.
        correction: see `RolloutConfig.correction`.
    """
    plans = [part.updates(build) for part in parts]
    if rollout.version != step:  # the policy that sampled is gone, and its engine has told
        for part, updates in zip(parts, plans, strict=True):
            for update in updates:
                update.old_logprobs = engine_logprobs(update, part.samples)
        return plans, []
    later = [(part, updates) for i, (part, updates) in enumerate(zip(parts, plans, strict=True))
             if correction or i]
    old_weight = None
    if later and build.objective.drift == "exact":
        weight = policy.model.lm_head.weight.detach()
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        old_weight = weight.to(dtype, copy=True)
    read = [Reading(part.samples, updates, fill_old_logprobs(policy, updates, old_weight)) for part, updates in later]
    taken = {id(sample) for part in parts for sample in part.samples}
    left = {id(sample): sample for group in (*rollout.first, *rollout.groups) for sample in group}
    if rest := [sample for key, sample in left.items() if key not in taken]:
        updates = Part(rest, [0.0] * len(rest), list(range(len(rest)))).updates(build)  # nothing is trained here
        read.append(Reading(rest, updates, fill_old_logprobs(policy, updates, None)))
    if correction:
        for part, updates in zip(parts, plans, strict=True):
            for update in updates:
                correct(update, part.samples, correction)
    return plans, read


def correct(update: Update, samples: Sequence[Sample], cap: float) -> None:
    """Weigh the policy term of each token by the truncated importance weight of policy to engine.

    By way of the advantages, in which the term of every objective is linear for a factor above 0: drift, entropy
    bonus, clips and the normaliser in the token weights stay as they are.
    """
    assert update.old_logprobs is not None, "fill_old_logprobs comes first"
    update.advantages = update.advantages * truncated_weights(
        update.old_logprobs, engine_logprobs(update, samples), cap)


def engine_logprobs(update: Update, samples: Sequence[Sample]) -> torch.Tensor:
    """(N,) float32, nats, what the engine says of the update's tokens. `samples`: of the optimizer step."""
    found = np.concatenate([samples[i].response.logprobs for i in update.members] or [np.zeros(0, dtype=np.float32)])
    return torch.from_numpy(found).to(update.advantages.device)


LossFn = Callable[[Policy, Update], CPGDOutput]
"""Of the outputs only `loss` carries a gradient."""


def rl_loss(objective: ObjectiveConfig) -> LossFn:
    """The loss function of an objective: fused where it is CPGD alone, else through token log-probs."""
    if objective.name == "cpgd" and objective.entropy_coef == 0:
        return lambda policy, update: policy(update.batch, cpgd=update)
    return lambda policy, update: policy_loss(objective, update, policy(update.batch))


def sft_loss(policy: Policy, update: Update) -> CPGDOutput:
    """Weighted negative log-likelihood of the responses."""
    stats = policy(update.batch)
    none = torch.zeros_like(stats.logprobs)
    loss = -(update.token_weights * stats.logprobs).sum()
    return CPGDOutput(loss, stats.logprobs.detach(), stats.entropy.detach(), none, none)


def _sums(output: CPGDOutput) -> torch.Tensor:
    parts = [output.loss, output.clipped.sum(), output.drift.sum(), output.entropy.sum(),
             torch.tensor(len(output.entropy), device=output.loss.device)]
    return torch.stack([part.detach().double() for part in parts])


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step, the same on all ranks."""

    learning_rate: float
    """It was to be taken at."""
    loss: float
    grad_norm: float
    """Before clipping; not finite: the step was skipped."""
    clip_fraction: float
    drift: float
    """Mean over response tokens, nats."""
    entropy: float
    """Mean over response tokens, nats."""
    response_tokens: int
    stats: list[Stats]
    """Of each update of this rank, at the policy before the step."""

    @property
    def finite(self) -> bool:
        """Whether the step was taken."""
        return math.isfinite(self.grad_norm)


def optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer, updates: Sequence[Update], loss_fn: LossFn,
                   learning_rate: float, max_grad_norm: float) -> StepResult:
    """Gradients of all updates, clip, step; skipped on all ranks when the norm is not finite.

    All ranks must call it together. Side effects: advances `optimizer` at most once, leaves gradients None.
    """
    totals = torch.zeros(len(SUMS), dtype=torch.float64, device=updates[0].token_weights.device)
    stats = []
    for update in updates:
        output = loss_fn(policy, update)
        output.loss.backward()
        totals += _sums(output)
        stats.append((output.logprobs, output.entropy))
    grad_norm = clip_grad_norm(policy, max_grad_norm)
    if world() > 1:
        dist.all_reduce(totals)
    if math.isfinite(grad_norm):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss, clipped, drift, entropy, tokens = totals.tolist()
    count = max(tokens, 1)
    return StepResult(learning_rate, loss, grad_norm, clipped / count, drift / count, entropy / count, int(tokens),
                      stats)


def make_optimizer(policy: Policy, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what is trained. On CUDA in one kernel: the default there holds a copy of the masters in a step."""
    return torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=optim.learning_rate,
                             betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay,
                             fused=policy.head.bias.is_cuda)


def learning_rate(step: int, total: int, optim: OptimConfig) -> float:
    """Linear warm-up, then a cosine from the peak; `step` counts from 0.

    min_lr_ratio of the peak is approached, not reached: it would be the rate of step `total`, one past the last.
    """
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(total - optim.warmup_steps, 1)
    floor = optim.min_lr_ratio
    return optim.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
