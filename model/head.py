"""The language-model head: hidden states to log-probs, or straight to the objective, through the fused kernels.

Suppressed tokens get a bias of -1e30, so that they take no probability in training, as in sampling. (Not -inf: the
entropy of an impossible token would be 0 * inf.)
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from cosmo_rl.kernels.linear_cpgd import CPGDOutput, linear_cpgd
from cosmo_rl.kernels.linear_kl import linear_kl
from cosmo_rl.kernels.linear_logprob import TokenStats, linear_logprob

SUPPRESSED_BIAS = -1e30


@dataclass(frozen=True, slots=True, eq=False)
class CPGDInputs:
    """What CPGD needs beside the micro-batch; see `cosmo_rl.kernels.linear_cpgd`."""

    old_logprobs: torch.Tensor | None
    """(N,) float32, nats; None: the ratio is 1."""
    advantages: torch.Tensor
    """(N,) float32."""
    token_weights: torch.Tensor
    """(N,) float32, the global normaliser included."""
    clip_eps_low: float | torch.Tensor
    """Float or (N,) float32."""
    clip_eps_high: float | torch.Tensor
    """Float or (N,) float32."""
    drift_coef: float
    drift_clip: float


@dataclass(frozen=True, slots=True, eq=False)
class ExactDrift:
    """The drift over the whole vocabulary, in place of the sampled one."""

    old_hidden: torch.Tensor
    """(N, D), hidden states of the old policy at the targets."""
    old_weight: torch.Tensor
    """(V, D), head of the old policy."""
    token_weights: torch.Tensor
    """(N,) float32, as in CPGDInputs."""
    drift_coef: float


class LMHead(nn.Module):
    """The kernels with temperature and suppressed tokens filled in; it owns no weight, so tied weights stay tied."""

    bias: torch.Tensor

    def __init__(self, vocab_size: int, suppressed_ids: np.ndarray, temperature: float) -> None:
        """
        Args:
            vocab_size: rows of the head's weight, V.
            suppressed_ids: (n,) int64, tokens of probability 0.
            temperature: > 0, of log-probs and entropies alike.
        """
        super().__init__()
        bias = torch.zeros(vocab_size)
        bias[torch.from_numpy(suppressed_ids)] = SUPPRESSED_BIAS
        self.register_buffer("bias", bias, persistent=False)
        self.temperature = temperature

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cpgd: CPGDInputs | None = None,
                exact: ExactDrift | None = None) -> TokenStats | CPGDOutput:
        """Log-probs of `targets`, or with `cpgd` the objective.

        Args:
            hidden: (N, D), states that predict `targets`; N may be 0.
            weight: (V, D), same dtype and device.
            targets: (N,) int64, none of them suppressed.
            exact: adds drift_coef * sum_i token_weights_i * KL_i to the loss and replaces the output's `drift` by KL;
                needs `cpgd`, whose own drift_coef is then 0.
        """
        options = {"temperature": self.temperature, "bias": self.bias}
        if cpgd is None:
            assert exact is None, "the exact drift is added to the objective, so it needs cpgd"
            return linear_logprob(hidden, weight, targets, **options)
        output = linear_cpgd(
            hidden, weight, targets, cpgd.old_logprobs, cpgd.advantages, cpgd.token_weights,
            clip_eps_low=cpgd.clip_eps_low, clip_eps_high=cpgd.clip_eps_high, drift_coef=cpgd.drift_coef,
            drift_clip=cpgd.drift_clip, **options)
        if exact is None:
            return output
        assert cpgd.drift_coef == 0, "drift counted twice"
        kl = linear_kl(exact.old_hidden, exact.old_weight, hidden, weight, **options)
        drift = exact.drift_coef * (exact.token_weights * kl).sum()
        return output._replace(loss=output.loss + drift, drift=kl.detach())
