"""The per-token CPGD loss (arXiv:2505.12504 eq. 2) from log-probs, with the drift clipped on its gradient.

With l = logprob - old_logprob, r = e^l:

    phi   = A * min(l, ln(1 + eps_high)) if A > 0 else A * max(l, ln(1 - eps_low))
    drift = expm1(l) - l                     # value: the k3 estimate of KL(pi_old || pi_theta), >= 0
    d drift / d logprob := min(r - 1, c)     # gradient: clipping the value instead would push r further out
    loss  = -phi + drift_coef * drift
    clipped = (A > 0 and r > 1 + eps_high) or (A < 0 and r < 1 - eps_low)
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import launch, reference


class ObjectiveTerms(NamedTuple):
    """Terms of N tokens, all (N,); float32 in nats, `clipped` bool. Only `loss` is differentiable."""

    loss: torch.Tensor
    log_ratio: torch.Tensor
    clipped: torch.Tensor
    drift: torch.Tensor


class _CPGDObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, old_logprobs, advantages, *settings):
        terms = reference.cpgd_terms(logprobs, old_logprobs, advantages, *settings)
        ctx.save_for_backward(terms.dlogprobs.to(logprobs.dtype))
        outputs = terms.loss.float(), terms.log_ratio.float(), terms.clipped, terms.drift.float()
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        (slope,) = ctx.saved_tensors
        return (slope * dloss, *(None,) * 6)


def cpgd_objective(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, *,
                   clip_eps_low: float | torch.Tensor = 0.2, clip_eps_high: float | torch.Tensor = 0.2,
                   drift_coef: float = 0.01, drift_clip: float = 2.0, backend: str | None = None) -> ObjectiveTerms:
    """CPGD loss of each token, to be minimised; the formulas stand at the top of this file.

    Args:
        logprobs: (N,) float32 or float64, nats, of the policy in training.
        old_logprobs: (N,), nats, of the policy that sampled; no gradient.
        advantages: (N,), w(x) * (reward - baseline); no gradient.
        clip_eps_low, clip_eps_high: distance of the ratio's bounds from 1, in [0, 1] and [0, inf]; floats or (N,).
        drift_coef: alpha. drift_clip: c.
        backend: None or "torch".
    Returns:
        ObjectiveTerms; computed in float64, rounded to float32 at the end. `loss` and `drift` are inf beyond l = 88.
    Raises:
        ValueError: shapes, dtypes, devices or ranges do not fit, or (on CPU) an advantage is not finite.
    Source: arXiv:2505.12504 sec. 4.3; the constants are the authors' code's, the paper gives none.
    """
    launch.check_backend(backend)
    launch.require(logprobs.ndim == 1, f"logprobs has shape {tuple(logprobs.shape)}; give (N,), one value per token")
    size, device = logprobs.shape[0], logprobs.device
    values = launch.wants_values(None, device)
    launch.check_vector("logprobs", logprobs, size, device)
    launch.check_vector("old_logprobs", old_logprobs, size, device)
    launch.check_vector("advantages", advantages, size, device, finite=values)
    launch.check_clip(clip_eps_low, clip_eps_high, drift_coef, drift_clip, size, device, values)
    return ObjectiveTerms(*_CPGDObjective.apply(
        logprobs, old_logprobs.detach(), advantages.detach(), clip_eps_low, clip_eps_high, drift_coef, drift_clip))
