"""The per-token CPGD loss (arXiv:2505.12504 eq. 2) from log-probs, with the drift clipped on its gradient.

With l = logprob - old_logprob, r = e^l:

    phi   = A * min(l, ln(1 + eps_high)) if A > 0 else A * max(l, ln(1 - eps_low))
    drift = expm1(l) - l                     # value: the k3 estimate of KL(pi_old || pi_theta), >= 0
    d drift / d logprob := min(r - 1, c)     # gradient: clipping the value instead would push r further out
    loss  = -phi + drift_coef * drift
    clipped = (A > 0 and r > 1 + eps_high) or (A < 0 and r < 1 - eps_low)
"""

# Triton's type hints describe what a kernel's author writes, not what a launch takes.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import launch, reference
from .launch import tl, triton


class ObjectiveTerms(NamedTuple):
    """Terms of N tokens, all (N,); float32 in nats, `clipped` bool. Only `loss` is differentiable."""

    loss: torch.Tensor
    log_ratio: torch.Tensor
    clipped: torch.Tensor
    drift: torch.Tensor


@triton.jit
def objective_terms(log_ratio, advantage, upper, lower, drift_coef, drift_clip):
    """(loss, clipped, drift, d loss / d logprob), all in the float64 of the arguments."""
    positive = advantage > 0
    clipped = (positive & (log_ratio > upper)) | ((advantage < 0) & (log_ratio < lower))
    # Comparisons that are false for NaN, which minimum and maximum would swallow.
    bounded = tl.where(positive & (log_ratio > upper), upper, log_ratio)
    bounded = tl.where((advantage <= 0) & (log_ratio < lower), lower, bounded)
    # expm1(l) - l cancels for small l; the series is exact to 1e-13 there.
    series = log_ratio * log_ratio * (1 / 2 + log_ratio * (1 / 6 + log_ratio * (
        1 / 24 + log_ratio * (1 / 120 + log_ratio * (1 / 720)))))
    small = tl.abs(log_ratio) < 1e-2
    excess = tl.where(small, series + log_ratio, tl.exp(log_ratio) - 1.0)  # not from drift: inf - inf
    drift = tl.where(small, series, excess - log_ratio)
    loss = drift_coef * drift - advantage * bounded
    slope = drift_coef * tl.where(excess > drift_clip, drift_clip, excess) - tl.where(clipped, 0.0, advantage)
    return loss, clipped, drift, slope


@triton.jit(do_not_specialize=("size",))
def _objective_kernel(logprobs, old_logprobs, advantages, upper, lower, coefs, loss, log_ratio, clipped, drift, slope,
                      size, upper_stride, lower_stride, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    ratio = (tl.load(logprobs + at, mask=inside, other=0.0).to(tl.float64)
             - tl.load(old_logprobs + at, mask=inside, other=0.0).to(tl.float64))
    terms = objective_terms(
        ratio, tl.load(advantages + at, mask=inside, other=0.0).to(tl.float64),
        tl.load(upper + at * upper_stride, mask=inside, other=0.0),
        tl.load(lower + at * lower_stride, mask=inside, other=0.0), tl.load(coefs), tl.load(coefs + 1))
    tl.store(loss + at, terms[0].to(tl.float32), mask=inside)
    tl.store(log_ratio + at, ratio.to(tl.float32), mask=inside)
    tl.store(clipped + at, terms[1], mask=inside)
    tl.store(drift + at, terms[2].to(tl.float32), mask=inside)
    tl.store(slope + at, terms[3].to(slope.dtype.element_ty), mask=inside)


class ObjectiveSettings(NamedTuple):
    """What `objective_terms` reads, float64 on the device: log bounds of 1 or N elements, (drift_coef, drift_clip)."""

    upper: torch.Tensor
    lower: torch.Tensor
    coefs: torch.Tensor

    def strides(self) -> tuple[int, int]:
        return int(self.upper.numel() > 1), int(self.lower.numel() > 1)


@lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)  # waits for the device: once


def objective_settings(clip_eps_low, clip_eps_high, drift_coef, drift_clip, device) -> ObjectiveSettings:
    """The settings of a call; float32 scalars, which kernels get otherwise, would move the bounds."""
    def bound(eps, sign: float) -> torch.Tensor:
        if isinstance(eps, torch.Tensor):
            return torch.log1p(sign * eps.double()).contiguous()
        return _on_device((math.log1p(sign * eps) if sign * eps > -1 else -math.inf,), device)

    return ObjectiveSettings(bound(clip_eps_high, 1.0), bound(clip_eps_low, -1.0),
                             _on_device((float(drift_coef), float(drift_clip)), device))


def _triton_terms(logprobs, old_logprobs, advantages, *settings) -> tuple[ObjectiveTerms, torch.Tensor]:
    """(terms, d loss / d logprob in the dtype of `logprobs`)."""
    size, device = logprobs.shape[0], logprobs.device
    found = objective_settings(*settings, device)
    loss, log_ratio, drift = torch.empty((3, size), device=device)
    clipped, slope = torch.empty(size, dtype=torch.bool, device=device), torch.empty_like(logprobs).contiguous()
    if size:
        with launch.on(device):
            _objective_kernel[(triton.cdiv(size, 1024),)](
                logprobs.contiguous(), old_logprobs.contiguous(), advantages.contiguous(), *found, loss, log_ratio,
                clipped, drift, slope, size, *found.strides(), BLOCK=1024, num_warps=4)
    return ObjectiveTerms(loss, log_ratio, clipped, drift), slope


class _CPGDObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused, logprobs, old_logprobs, advantages, *settings):
        if fused:
            outputs, slope = _triton_terms(logprobs, old_logprobs, advantages, *settings)
        else:
            terms = reference.cpgd_terms(logprobs, old_logprobs, advantages, *settings)
            outputs = ObjectiveTerms(terms.loss.float(), terms.log_ratio.float(), terms.clipped, terms.drift.float())
            slope = terms.dlogprobs.to(logprobs.dtype)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        (slope,) = ctx.saved_tensors
        return (None, slope * dloss, *(None,) * 6)


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
        backend: None takes Triton on CUDA and PyTorch elsewhere; "triton" and "torch" force one.
    Returns:
        ObjectiveTerms; computed in float64, rounded to float32 at the end. `loss` and `drift` are inf beyond l = 88.
    Raises:
        ValueError: shapes, dtypes, devices or ranges do not fit, or (on CPU) an advantage is not finite.
    Source: arXiv:2505.12504 sec. 4.3; the constants are the authors' code's, the paper gives none.
    """
    fused = launch.use_triton(backend, logprobs.device)
    launch.require(logprobs.ndim == 1, f"logprobs has shape {tuple(logprobs.shape)}; give (N,), one value per token")
    size, device = logprobs.shape[0], logprobs.device
    values = launch.wants_values(None, device)
    launch.check_vector("logprobs", logprobs, size, device)
    launch.check_vector("old_logprobs", old_logprobs, size, device)
    launch.check_vector("advantages", advantages, size, device, finite=values)
    launch.check_clip(clip_eps_low, clip_eps_high, drift_coef, drift_clip, size, device, values)
    return ObjectiveTerms(*_CPGDObjective.apply(
        fused, logprobs, old_logprobs.detach(), advantages.detach(), clip_eps_low, clip_eps_high, drift_coef,
        drift_clip))
