"""The CPGD loss of an update straight from hidden states and LM head, its gradients formed in the forward.

A token's slope depends on its own log-prob alone, so the gradients of hidden and weight are known as soon as the
log-probs are: the backward only scales them. Call it outside checkpointed regions, which would run it twice.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import launch, reference


class CPGDOutput(NamedTuple):
    """`loss` is () float32 and the only differentiable one; the others (N,), float32 in nats, `clipped` bool."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    clipped: torch.Tensor
    drift: torch.Tensor


def _forward(hidden, weight, targets, old_logprobs, advantages, token_weights, temperature, bias, *settings):
    """(CPGDOutput, stats, d loss / d logprobs (N,) float64)."""
    stats = reference.linear_logprob_forward(hidden, weight, targets, temperature, bias)
    terms = reference.cpgd_terms(stats.logprobs, old_logprobs, advantages, *settings)
    ignored = targets == launch.IGNORE_INDEX
    token_weights = token_weights.double()
    loss = (token_weights * terms.loss).masked_fill(ignored, 0.0).sum()
    # With old_logprobs=None the terms never read the log-probs: carry a NaN of theirs (target out of range) over.
    loss = loss + (stats.logprobs * 0.0).sum()
    output = CPGDOutput(loss.float(), stats.logprobs, stats.entropy, terms.clipped & ~ignored,
                        terms.drift.float().masked_fill(ignored, 0.0))
    return output, stats, token_weights * terms.dlogprobs


class _LinearCPGD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, old_logprobs, advantages, token_weights, temperature, bias, *settings):
        output, stats, slope = _forward(hidden, weight, targets, old_logprobs, advantages, token_weights, temperature,
                                        bias, *settings)
        # Token weights hold 1 / (tokens of the update): before the loss scale float16 would round these to 0.
        dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        dhidden, dweight, _ = reference.linear_logprob_backward(
            hidden, weight, targets, temperature, bias, stats, slope,
            needs=(*ctx.needs_input_grad[:2], False), out_dtype=dtype)
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(*output[1:])
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        # Out of place: a second backward of a retained graph must find the gradients unscaled.
        scaled = [None if g is None else (g * dloss).to(ctx.dtype) for g in ctx.saved_tensors]
        return (*scaled, *(None,) * 10)


def linear_cpgd(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, old_logprobs: torch.Tensor | None,
                advantages: torch.Tensor, token_weights: torch.Tensor, *, temperature: float = 1.0,
                bias: torch.Tensor | None = None, clip_eps_low: float | torch.Tensor = 0.2,
                clip_eps_high: float | torch.Tensor = 0.2, drift_coef: float = 0.01, drift_clip: float = 2.0,
                backend: str | None = None, check: bool | None = None, backward: str = "exact",
                tile_threshold: float = 1e-4) -> CPGDOutput:
    """loss = sum_i token_weights_i * loss_i of the CPGD objective (see cpgd_objective), logits not stored.

    Args:
        hidden, weight, targets, temperature, bias, backend, backward, tile_threshold: as linear_logprob; the bias gets
            no gradient here.
        old_logprobs: (N,) float32 or float64, nats; None: the ratio is 1 (the first update of a rollout).
        advantages, token_weights: (N,) float32 or float64; the weights hold the global normaliser.
        clip_eps_low, clip_eps_high, drift_coef, drift_clip: as cpgd_objective.
        check: read the values of targets, bias, advantages, token_weights and clip bounds; None: on CPU tensors only.
    Returns:
        CPGDOutput. Gradients flow from `loss` to hidden and weight; an entropy bonus uses linear_logprob and
        cpgd_objective instead. Log-probs have the same bits with and without gradient.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit; the message has both.
    Memory: the gradients (N, D) and (V, D) and tiles of 4M logits beyond the inputs.
    """
    launch.check_backend(backend)
    launch.check_backward(backward, tile_threshold)
    launch.check_temperature(temperature)
    launch.check_head(hidden, weight)
    size, device = hidden.shape[0], hidden.device
    values = launch.wants_values(check, device)
    launch.check_bias(bias, weight, values)
    launch.check_targets(targets, hidden, weight.shape[0], values)
    if old_logprobs is not None:
        launch.check_vector("old_logprobs", old_logprobs, size, device)
    launch.check_vector("advantages", advantages, size, device, finite=values)
    launch.check_vector("token_weights", token_weights, size, device, finite=values)
    launch.check_clip(clip_eps_low, clip_eps_high, drift_coef, drift_clip, size, device, values)
    args = (hidden, weight, targets, old_logprobs, advantages, token_weights, float(temperature), bias,
            clip_eps_low, clip_eps_high, drift_coef, drift_clip)
    # Tested here, because grad mode is always off inside a Function's forward.
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return CPGDOutput(*_LinearCPGD.apply(*args))
    with torch.no_grad():
        return _forward(*args)[0]
