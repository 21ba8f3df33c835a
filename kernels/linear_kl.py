"""Exact KL(pi_old || pi_theta) over the vocabulary from two pairs of hidden states and LM head: no logits are kept.

The drift term of `objective.drift = exact`: the old hidden states and a copy of the old head stand for pi_old.
"""

import torch
from torch.autograd.function import once_differentiable

from . import launch, reference
from .reference import Stats


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, old_hidden, old_weight, hidden, weight, temperature, bias):
        kl, old, new = reference.linear_kl_forward(old_hidden, old_weight, hidden, weight, temperature, bias)
        ctx.save_for_backward(old_hidden, old_weight, hidden, weight, bias, *old, *new)
        ctx.temperature = temperature
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, dkl):
        old_hidden, old_weight, hidden, weight, bias, *stats = ctx.saved_tensors
        dhidden, dweight = reference.linear_kl_backward(
            old_hidden, old_weight, hidden, weight, ctx.temperature, bias, Stats(*stats[:4]), Stats(*stats[4:]), dkl,
            needs=ctx.needs_input_grad[2:4])
        return None, None, dhidden, dweight, None, None


def linear_kl(old_hidden: torch.Tensor, old_weight: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, *,
              temperature: float = 1.0, bias: torch.Tensor | None = None, backend: str | None = None) -> torch.Tensor:
    """KL(pi_old || pi_theta) of each token, summed over the whole vocabulary.

    Args:
        old_hidden: (N, D'), old_weight: (V, D'): the old policy, float32, float16 or bfloat16; no gradient.
        hidden: (N, D), weight: (V, D): the policy in training, same N, V, dtype and device as the old one.
        temperature: above 0, of both policies.
        bias: (V,) float32, finite, added to both policies' logits before the division; no gradient.
        backend: None or "torch", the PyTorch reference on any device.
    Returns:
        (N,) float32, nats, >= 0, gradients to hidden and weight; exactly 0 for equal heads and hidden states.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit; the message has both.
    Memory: the gradients and tiles of 4M logits beyond the inputs; both passes recompute the logits.
    Source: written here from the formulas in reference.py.
    """
    launch.check_backend(backend)
    launch.check_temperature(temperature)
    launch.check_head(hidden, weight)
    launch.check_head(old_hidden, old_weight, ("old_hidden", "old_weight"))
    for name, old, new in (("hidden", old_hidden, hidden), ("weight", old_weight, weight)):
        launch.require(old.shape[0] == new.shape[0],
                       f"old_{name} has shape {tuple(old.shape)} and {name} {tuple(new.shape)}; "
                       f"both policies need the same {'tokens' if name == 'hidden' else 'vocabulary'}")
        launch.require(old.dtype == new.dtype and old.device == new.device,
                       f"old_{name} is {old.dtype} on {old.device} and {name} {new.dtype} on {new.device}; "
                       "cast or move the old one")
    launch.check_bias(bias, weight, launch.wants_values(None, weight.device))
    return _LinearKL.apply(old_hidden.detach(), old_weight.detach(), hidden, weight, float(temperature),
                           None if bias is None else bias.detach())
