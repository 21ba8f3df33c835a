"""Token weights, clip bounds and the named policy objectives: pure functions between log-probs and the loss.

The loss of an update is sum_i token_weights_i * loss_i over its response tokens. The weights hold the global
normaliser, so the sum may be split over micro-batches and ranks in any way.

With r = e^(logprob - old_logprob), per token:

    cpgd               see kernels/cpgd_objective.py
    ppo, reinforce_pp  -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)
    grpo               the same, and for A < 0 at most -dual_clip A (arXiv:1912.09729); dual_clip 0: none
    rloo               -r A, not clipped

They differ in their advantages too (advantages.py).
"""

import numpy as np
import torch
from numpy.typing import ArrayLike

from cosmo_rl.data.errors import UserError
from cosmo_rl.kernels.cpgd_objective import cpgd_objective
from cosmo_rl.kernels.linear_cpgd import CPGDOutput
from cosmo_rl.kernels.linear_logprob import TokenStats
from cosmo_rl.model.policy import Update

from .config import ObjectiveConfig


def token_weights(num_tokens: ArrayLike, groups: ArrayLike, num_prompts: int, aggregation: str) -> np.ndarray:
    """Weight of each token of each sequence, counted over the whole update (all ranks); they sum to 1 over its tokens.

    Args:
        num_tokens: (S,) response tokens of each sequence, at least 1.
        groups: (S,) integers, one per prompt.
        num_prompts: prompts of the update: degenerate groups count, groups emptied by failed rewards do not.
        aggregation: "group" (token mean in each group, mean over prompts: arXiv:2505.12504 eq. 2), "sequence" (token
            mean in each sequence, mean over sequences: the authors' code) or "token" (mean over all tokens).
    Returns:
        (S,) float64: 1 / (num_prompts * tokens of the group), 1 / (S * tokens of the sequence) or 1 / (all tokens).
    Raises:
        UserError: shapes or counts do not fit, or an unknown aggregation.
    """
    num_tokens, groups = np.asarray(num_tokens, dtype=np.int64), np.asarray(groups)
    if num_tokens.ndim != 1 or num_tokens.shape != groups.shape:
        raise UserError(f"num_tokens has shape {num_tokens.shape} and groups {groups.shape}; give (S,) for both")
    if (num_tokens < 1).any():
        at = int((num_tokens < 1).argmax())
        raise UserError(f"num_tokens[{at}] is {num_tokens[at]}; a response has at least 1 token")
    names, index = np.unique(groups, return_inverse=True)
    if num_prompts < len(names):
        raise UserError(f"num_prompts is {num_prompts} and groups holds {len(names)}; count each prompt of the update")
    if aggregation == "group":
        per_group = np.bincount(index, weights=num_tokens, minlength=len(names))
        return 1.0 / (num_prompts * per_group[index])
    if aggregation == "sequence":
        return 1.0 / (len(num_tokens) * num_tokens.astype(np.float64))
    if aggregation == "token":
        return np.full(len(num_tokens), 1.0 / num_tokens.sum()) if len(num_tokens) else np.zeros(0)
    raise UserError(f"aggregation is {aggregation!r}; give 'group', 'sequence' or 'token'")


def clip_bounds(config: ObjectiveConfig, positions: torch.Tensor, lengths: torch.Tensor):
    """(eps_low, eps_high) of each token: eps_i = lambda * eps + (1 - lambda) * eps * i / |y|, tight to loose.

    Args:
        positions: (N,) index i of the token in its response, from 1. lengths: (N,) tokens |y| of that response.
    Returns:
        Two floats when `config.clip_schedule` is 1, else two (N,) float32 tensors.
    """
    low, high, share = config.clip_eps_low, config.clip_eps_high, config.clip_schedule
    if share == 1.0:
        return low, high
    ramp = share + (1.0 - share) * positions.double() / lengths.double()
    return (low * ramp).float(), (high * ramp).float()


def truncated_weights(logprobs: torch.Tensor, engine: torch.Tensor, cap: float) -> torch.Tensor:
    """min(pi / pi_engine, cap) of each token: what an engine of other rounding samples, weighted back to the policy.

    Truncated importance sampling at the token (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"; arXiv:2510.26788 compares it with others).

    Args:
        logprobs: (N,) of the policy that should have sampled. engine: (N,) of the engine, as it reports them.
    Returns:
        (N,) float32; 0 where one is NaN, which the canary tells of.
    """
    return (logprobs.detach().double() - engine.double()).exp().clamp(max=cap).nan_to_num(nan=0.0).float()


def policy_loss(config: ObjectiveConfig, update: Update, stats: TokenStats) -> CPGDOutput:
    """Loss of a micro-batch under the objective `config.name` (formulas at the top of this file), to be minimised.

    Args:
        stats: of the policy in training, with gradient.
    Returns:
        As `kernels.linear_cpgd` gives it: only `loss` is differentiable; `drift` is a part of the loss in cpgd only.
    Raises:
        UserError: an unknown name, or what cpgd_objective refuses.
    """
    name, logprobs = config.name, stats.logprobs
    if name not in ("cpgd", "grpo", "ppo", "reinforce_pp", "rloo"):
        raise UserError(f"objective is {name!r}; give 'cpgd', 'grpo', 'ppo', 'reinforce_pp' or 'rloo'")
    old = logprobs.detach() if update.old_logprobs is None else update.old_logprobs
    # cpgd's terms, checks included, are computed for every objective: drift and log-ratio are metrics of all.
    terms = cpgd_objective(logprobs, old, update.advantages, clip_eps_low=update.clip_eps_low,
                           clip_eps_high=update.clip_eps_high, drift_coef=update.drift_coef,
                           drift_clip=update.drift_clip)
    loss, clipped = terms.loss, terms.clipped
    if name != "cpgd":
        loss, clipped = _ratio_loss(config, update, logprobs, old.detach(), clipped)
    weights = update.token_weights.double()
    total = (weights * loss.double()).sum()
    if config.entropy_coef != 0.0:
        total = total - config.entropy_coef * (weights * stats.entropy.double()).sum()
    return CPGDOutput(total.float(), logprobs.detach(), stats.entropy.detach(), clipped, terms.drift)


def _ratio_loss(config: ObjectiveConfig, update: Update, logprobs: torch.Tensor, old: torch.Tensor,
                clipped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss (N,) float64, clipped (N,)) of the objectives whose gradient carries the ratio."""
    advantages = update.advantages.detach().double()
    ratio = (logprobs.double() - old.double()).exp()
    if config.name == "rloo":
        return -ratio * advantages, torch.zeros_like(clipped)
    lower, upper = (torch.as_tensor(bound, dtype=torch.float64, device=ratio.device)
                    for bound in (1.0 - update.clip_eps_low, 1.0 + update.clip_eps_high))
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(lower, upper) * advantages)
    if config.name == "grpo" and config.dual_clip > 0.0:
        bounded = (advantages < 0) & (ratio.detach() > config.dual_clip)
        surrogate = torch.where(bounded, config.dual_clip * advantages, surrogate)
        clipped = clipped | bounded
    return -surrogate, clipped
