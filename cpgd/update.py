"""One optimizer step: sequences of an update -> micro-batches of this rank -> gradients -> step, on all ranks together.

The loss is a sum over response tokens times a per-token weight that already holds the global normaliser, so neither the
split into micro-batches nor the number of ranks changes it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from cosmo_rl.data.collate import MicroBatch, TokenSequence, collate, plan_microbatches
from cosmo_rl.data.errors import UserError
from cosmo_rl.kernels.linear_cpgd import CPGDOutput
from cosmo_rl.model.head import CPGDInputs, ExactDrift
from cosmo_rl.model.load import Processor
from cosmo_rl.model.parallel import clip_grad_norm, rank, together, world
from cosmo_rl.model.policy import Policy

from .batch import Sample
from .config import Config, OptimConfig
from .objective import LossInputs, clip_bounds, policy_loss, token_weights

SUMS = ("loss", "clipped", "drift", "entropy", "tokens")
"""What a micro-batch adds up, in this order; all but `loss` are sums over its response tokens."""


@dataclass(slots=True, eq=False)
class Micro:
    """A micro-batch with what the loss needs; per-token tensors are (N,), float32, on the policy's device.

    The batch stays on the host until the policy runs it: the pixels of a whole rollout would fill a GPU.
    """

    batch: MicroBatch
    members: list[int]
    """Index of each sequence in the update."""
    token_weights: torch.Tensor
    advantages: torch.Tensor
    clip_eps_low: float | torch.Tensor = 0.2
    clip_eps_high: float | torch.Tensor = 0.2
    old_logprobs: torch.Tensor | None = None
    """None: the policy is still the one that sampled, the ratio is 1."""
    exact: ExactDrift | None = None


def build_micros(sequences: Sequence[TokenSequence], advantages: Sequence[float], groups: Sequence[int],
                 num_prompts: int, aggregation: str, config: Config, processor: Processor,
                 device: torch.device) -> list[Micro]:
    """This rank's micro-batches of one update; every rank gets the same number of them.

    Args:
        sequences, advantages, groups: of the whole update, one entry a sequence.
        num_prompts: prompts of the update, for aggregation "group".
    """
    lengths = [len(s.response_ids) for s in sequences]
    weights = token_weights(np.array(lengths), np.array(groups), num_prompts, aggregation)
    plan = plan_microbatches([len(s) for s in sequences], max_tokens=config.batch.max_tokens,
                             layout=config.batch.layout, world_size=world())
    micros = []
    for members in plan[rank()]:
        batch = collate([sequences[i] for i in members], layout=config.batch.layout, pad_id=processor.pad_id,
                        dummy_image=processor.dummy_image())
        owner = np.array(members, dtype=np.int64)[batch.sequence_ids.numpy()]
        positions = np.concatenate([np.arange(1, lengths[i] + 1) for i in members] or [np.zeros(0, dtype=np.int64)])
        low, high = clip_bounds(config.objective, torch.from_numpy(positions),
                                torch.from_numpy(np.array(lengths, dtype=np.int64)[owner]))

        def spread(values: Sequence[float] | np.ndarray, owner: np.ndarray = owner) -> torch.Tensor:
            return torch.from_numpy(np.asarray(values, dtype=np.float64)[owner]).float().to(device)

        micros.append(Micro(
            batch=batch, members=list(members), token_weights=spread(weights), advantages=spread(advantages),
            clip_eps_low=low.to(device) if isinstance(low, torch.Tensor) else low,
            clip_eps_high=high.to(device) if isinstance(high, torch.Tensor) else high,
        ))
    return micros


def rl_micros(samples: Sequence[Sample], num_prompts: int, config: Config, processor: Processor,
              device: torch.device) -> list[Micro]:
    """`build_micros` of sampled responses."""
    sequences = [TokenSequence(s.prompt, s.response.ids) for s in samples]
    return build_micros(sequences, [s.advantage for s in samples], [s.group for s in samples], num_prompts,
                        config.objective.aggregation, config, processor, device)


def cpgd_inputs(micro: Micro, config: Config) -> CPGDInputs:
    """The arguments of the fused objective for one micro-batch."""
    objective = config.objective
    return CPGDInputs(
        old_logprobs=micro.old_logprobs, advantages=micro.advantages, token_weights=micro.token_weights,
        clip_eps_low=micro.clip_eps_low, clip_eps_high=micro.clip_eps_high,
        drift_coef=0.0 if objective.drift == "exact" else objective.drift_coef, drift_clip=objective.drift_clip,
    )


@torch.no_grad()
def fill_old_logprobs(policy: Policy, micros: Sequence[Micro], config: Config, old_weight: torch.Tensor | None) -> None:
    """Log-probs of the policy that sampled, by the same code path as training; all ranks must call it together.

    Args:
        old_weight: (V, D) copy of the head for the exact drift, which also keeps the hidden states; else None.
    """
    for micro in micros:
        output, hidden = policy(micro.batch, cpgd=cpgd_inputs(micro, config), return_hidden=True)
        micro.old_logprobs = output.logprobs
        if old_weight is not None:
            micro.exact = ExactDrift(hidden, old_weight, micro.token_weights, config.objective.drift_coef)


def disagreements(samples: Sequence[Sample], micro: Micro, logprobs: torch.Tensor,
                  limit: float) -> list[tuple[str, float]]:
    """(sample id, mean |trainer - engine| in nats) of the responses beyond `limit`; NaN counts as beyond."""
    owner, values = micro.batch.sequence_ids, logprobs.cpu()
    bad = []
    for place, member in enumerate(micro.members):
        sample = samples[member]
        gap = (values[owner == place] - torch.from_numpy(sample.response.logprobs)).abs().mean().item()
        if not gap <= limit:
            bad.append((sample.id, gap))
    return bad


class CanaryError(UserError):
    """Engine and trainer disagree about the same tokens."""


def check_canary(samples: Sequence[Sample], micros: Sequence[Micro], logprobs: Sequence[torch.Tensor],
                 limit: float) -> None:
    """Stop on every rank when trainer and engine disagree on a response; all ranks must call it together.

    Args:
        samples: of the update. micros, logprobs: this rank's micro-batches, and the trainer's log-probs of each.
        limit: see `RolloutConfig.canary_limit`.
    Raises:
        CanaryError: a response of this rank is beyond the limit; a rank without one raises the same as UserError.
    """
    def check() -> None:
        bad = [found for micro, values in zip(micros, logprobs, strict=True)
               for found in disagreements(samples, micro, values, limit)]
        if bad:
            raise CanaryError(
                f"engine and trainer disagree on {len(bad)} responses, mean |difference of log-probs| up to "
                f"{max(gap for _, gap in bad):.3g} nats (--rollout.canary-limit {limit}): "
                f"{', '.join(name for name, _ in bad[:5])}; the engine holds other weights, positions or images")
    together(check)


LossFn = Callable[[Policy, Micro], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""(policy, micro) -> loss () with gradient, sums (len(SUMS),) without, log-probs (N,) without."""


def rl_loss(config: Config) -> LossFn:
    """The loss function of the objective in `config`: fused where it is CPGD alone, else through token log-probs."""
    objective = config.objective

    def fused(policy: Policy, micro: Micro) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        output = policy(micro.batch, cpgd=cpgd_inputs(micro, config), exact=micro.exact)
        assert isinstance(output, CPGDOutput)
        return output.loss, _sums(output.loss, output.clipped, output.drift, output.entropy), output.logprobs

    def unfused(policy: Policy, micro: Micro) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        stats = policy(micro.batch)
        logprobs = stats.logprobs.detach()
        old = logprobs if micro.old_logprobs is None else micro.old_logprobs
        output = policy_loss(objective.name, LossInputs(
            logprobs=stats.logprobs, entropy=stats.entropy, old_logprobs=old, advantages=micro.advantages,
            token_weights=micro.token_weights, clip_eps_low=micro.clip_eps_low, clip_eps_high=micro.clip_eps_high,
            drift_coef=objective.drift_coef, drift_clip=objective.drift_clip, dual_clip=objective.dual_clip,
            entropy_coef=objective.entropy_coef,
        ))
        return output.loss, _sums(output.loss, output.clipped, output.drift, stats.entropy), logprobs

    return fused if objective.name == "cpgd" and objective.entropy_coef == 0 else unfused


def sft_loss(policy: Policy, micro: Micro) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted negative log-likelihood of the responses."""
    stats = policy(micro.batch)
    loss = -(micro.token_weights * stats.logprobs).sum()
    none = torch.zeros_like(stats.logprobs)
    return loss, _sums(loss, none, none, stats.entropy), stats.logprobs.detach()


def _sums(loss: torch.Tensor, clipped: torch.Tensor, drift: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    parts = [loss, clipped.sum(), drift.sum(), entropy.sum(), torch.tensor(len(entropy), device=loss.device)]
    return torch.stack([part.detach().double() for part in parts])


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step, the same on all ranks."""

    loss: float
    grad_norm: float
    """Before clipping; not finite: the step was skipped."""
    clip_fraction: float
    drift: float
    """Mean over response tokens, nats."""
    entropy: float
    """Mean over response tokens, nats."""
    response_tokens: int
    logprobs: list[torch.Tensor]
    """(N,) of each micro-batch of this rank, at the policy before the step."""

    @property
    def finite(self) -> bool:
        """Whether the step was taken."""
        return math.isfinite(self.grad_norm)


def optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer, micros: Sequence[Micro], loss_fn: LossFn,
                   learning_rate: float, max_grad_norm: float) -> StepResult:
    """Gradients of all micro-batches, clip, step; skipped on all ranks when the norm is not finite.

    All ranks must call it together. Side effects: advances `optimizer` at most once, leaves gradients None.
    """
    totals = torch.zeros(len(SUMS), dtype=torch.float64, device=micros[0].token_weights.device)
    logprobs = []
    for micro in micros:
        loss, sums, values = loss_fn(policy, micro)
        loss.backward()
        totals += sums
        logprobs.append(values)
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
    return StepResult(loss, grad_norm, clipped / count, drift / count, entropy / count, int(tokens), logprobs)


def learning_rate(step: int, total: int, optim: OptimConfig) -> float:
    """Linear warm-up, then a cosine from the peak; `step` counts from 0.

    min_lr_ratio of the peak is approached, not reached: it would be the rate of step `total`, one past the last.
    """
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(total - optim.warmup_steps, 1)
    floor = optim.min_lr_ratio
    return optim.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
