"""Advantages of one rollout from its rewards, in float64, before the rollout is split into updates.

    cpgd, grpo, ppo   A = w(x) * (R - mean over the group)         w: 1/std, the clip-filter-like weight, or 1
    rloo              A = R - mean over the other responses of the group
    reinforce_pp      A = (R - mean) / std over all responses of the rollout

Source: arXiv:2505.12504 sec. 4.3 (III); std is the unbiased one, as in the authors' code; RLOO arXiv:2402.14740,
REINFORCE++ arXiv:2501.03262 (whitened per response here).
"""

import numpy as np
from numpy.typing import ArrayLike

from cosmo_rl.data.errors import UserError

DEGENERATE_SPAN = 1e-6
"""Rewards that differ by at most this are equal: the mean of eight 0.9 is not 0.9, and 1/std would blow that up."""


def group_advantages(rewards: ArrayLike, groups: ArrayLike, *, estimator: str = "cpgd", weight: str = "std",
                     weight_cap: float = 3.0) -> np.ndarray:
    """Advantage of each response, exactly 0 where the rewards it is compared with span at most DEGENERATE_SPAN.

    Args:
        rewards: (S,) of the whole rollout, all ranks; NaN marks a failed response, which leaves its group.
        groups: (S,) integers, one per prompt, in any order.
        estimator: name of the objective. weight: "std", "clip_filter" or "equal", for cpgd, grpo and ppo only.
        weight_cap: c_w, cap of "clip_filter" = min(c_w, #prompts / #prompts not degenerate); c_w when all are.
    Returns:
        (S,) float64; 0 for failed responses and for one that is alone in its group.
    Raises:
        UserError: shapes disagree, a reward is infinite, or an unknown estimator or weight.
    """
    rewards, groups = np.asarray(rewards, dtype=np.float64), np.asarray(groups)
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise UserError(f"rewards has shape {rewards.shape} and groups {groups.shape}; give (S,) for both")
    if np.isinf(rewards).any():
        at = int(np.isinf(rewards).argmax())
        raise UserError(f"rewards[{at}] is {rewards[at]}; give a finite reward, or NaN for a failed response")
    if estimator not in ("cpgd", "grpo", "ppo", "rloo", "reinforce_pp"):
        raise UserError(f"estimator is {estimator!r}; give 'cpgd', 'grpo', 'ppo', 'rloo' or 'reinforce_pp'")
    if weight not in ("std", "clip_filter", "equal"):
        raise UserError(f"weight is {weight!r}; give 'std', 'clip_filter' or 'equal'")

    valid = np.flatnonzero(~np.isnan(rewards))
    baselines = np.zeros_like(groups) if estimator == "reinforce_pp" else groups
    members = [valid[baselines[valid] == g] for g in np.unique(baselines[valid])]
    live = [m for m in members if len(m) > 1 and np.ptp(rewards[m]) > DEGENERATE_SPAN]
    advantages = np.zeros_like(rewards)
    for m in live:
        r = rewards[m]
        centred = r - r.mean()
        if estimator == "rloo":
            scale = len(m) / (len(m) - 1)  # R_k - mean of the others
        elif estimator == "reinforce_pp" or weight == "std":
            scale = 1.0 / r.std(ddof=1)
        else:
            scale = min(weight_cap, len(members) / len(live)) if weight == "clip_filter" else 1.0
        advantages[m] = scale * centred
    return advantages
