"""Log-prob and entropy of response tokens straight from hidden states and LM head: no logits are kept.

First call of every forward of the policy: old log-probs, the canary and any objective that autograd differentiates.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import launch, reference
from .reference import Stats


class TokenStats(NamedTuple):
    """Statistics of N tokens, all (N,) float32, in nats."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, bias):
        stats = reference.linear_logprob_forward(hidden, weight, targets, temperature, bias)
        lse = (stats.peak + stats.log_mass).masked_fill(targets == launch.IGNORE_INDEX, 0.0)
        ctx.save_for_backward(hidden, weight, targets, bias, *stats)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return stats.logprobs, stats.entropy, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogprobs, dentropy, _dlse):
        hidden, weight, targets, bias, *stats = ctx.saved_tensors
        if dlogprobs is None and dentropy is None:
            return (None,) * 5
        if dlogprobs is None:
            dlogprobs = torch.zeros_like(dentropy)
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4])
        dhidden, dweight, dbias = reference.linear_logprob_backward(
            hidden, weight, targets, ctx.temperature, bias, Stats(*stats), dlogprobs, dentropy, needs=needs)
        return dhidden, dweight, None, None, dbias


def linear_logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, temperature: float = 1.0,
                   bias: torch.Tensor | None = None, backend: str | None = None, check: bool | None = None,
                   backward: str = "exact", tile_threshold: float = 1e-4) -> TokenStats:
    """Log-prob of each target and entropy under softmax((hidden @ weight.T + bias) / temperature), logits not stored.

    Args:
        hidden: (N, D) float32, float16 or bfloat16; N may be 0.
        weight: (V, D), dtype and device of `hidden`.
        targets: (N,) int64 in [0, V); `IGNORE_INDEX` (-100) gives log-prob 0, entropy 0, lse 0 and no gradient.
        temperature: above 0, unitless.
        bias: (V,) float32, finite, added before the division by the temperature; -1e30 bans a token.
        backend: None or "torch", the PyTorch reference on any device.
        check: read the values of targets and bias; None: on CPU tensors only. Unchecked, a target out of range gives
            NaN, never a read out of bounds.
        backward: "exact". tile_threshold: no part in "exact".
    Returns:
        TokenStats, gradients to hidden, weight and bias from `logprobs` and `entropy`; `lse` is not differentiable.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit; the message has both.
    Memory: O(N D + V D) for the gradients and tiles of 4M logits beyond the inputs; backward recomputes the logits.
    Numerics: products and sums in float32 (never tf32); error within 2 x that of torch's log_softmax in float32.
    Source: arXiv:2411.09009 for never storing the logits; written here from the formulas in reference.py.
    """
    launch.check_backend(backend)
    launch.check_backward(backward, tile_threshold)
    launch.check_temperature(temperature)
    launch.check_head(hidden, weight)
    values = launch.wants_values(check, hidden.device)
    launch.check_bias(bias, weight, values)
    launch.check_targets(targets, hidden, weight.shape[0], values)
    return TokenStats(*_LinearLogprob.apply(hidden, weight, targets, float(temperature), bias))
