"""The CPGD loss of an update straight from hidden states and LM head, its gradients formed in the forward.

A token's slope depends on its own log-prob alone, so the gradients of hidden and weight are known as soon as the
log-probs are: the backward only scales them. Call it outside checkpointed regions, which would run it twice.
"""

# Triton's type hints describe what a kernel's author writes, not what a launch takes.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import launch, reference
from .cpgd_objective import objective_settings, objective_terms
from .gemm import head_gradients
from .launch import tl, triton
from .linear_logprob import ROW_BLOCK, ROW_WARPS, exp, finish_stats, fold_row


class CPGDOutput(NamedTuple):
    """`loss` is () float32 and the only differentiable one; the others (N,), float32 in nats, `clipped` bool."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    clipped: torch.Tensor
    drift: torch.Tensor


@triton.jit(do_not_specialize=("size",))
def _fold_kernel(logits, dlogits, targets, bias, old_logprobs, advantages, token_weights, upper, lower, coefs, scale,
                 stats, losses, clipped_out, size, vocab, upper_stride, lower_stride, inverse_temperature,
                 HAS_BIAS: tl.constexpr, HAS_OLD: tl.constexpr, HAS_GRADIENT: tl.constexpr, IGNORE_INDEX: tl.constexpr,
                 BLOCK: tl.constexpr):
    """One token a program: fold its logits, evaluate the objective, write the gradient with respect to them.

    stats (3, size) float32: log-prob, entropy, drift; losses, token weights included, float64.
    """
    row = tl.program_id(0).to(tl.int64)
    here = logits + row * vocab
    target = tl.load(targets + row)
    peak, mass, moment = fold_row(here, bias, vocab, inverse_temperature, HAS_BIAS, BLOCK)
    at_target = 0.0
    if (target >= 0) & (target < vocab):
        at_target = tl.load(here + target)
        if HAS_BIAS:
            at_target += tl.load(bias + target)
    logprob, entropy, log_mass = finish_stats(target, peak, mass, moment, at_target, vocab, inverse_temperature,
                                              IGNORE_INDEX)

    log_ratio = tl.zeros((), tl.float64)
    if HAS_OLD:
        log_ratio = logprob.to(tl.float64) - tl.load(old_logprobs + row).to(tl.float64)
    loss, clipped, drift, slope = objective_terms(
        log_ratio, tl.load(advantages + row).to(tl.float64), tl.load(upper + row * upper_stride),
        tl.load(lower + row * lower_stride), tl.load(coefs), tl.load(coefs + 1))
    counts = target != IGNORE_INDEX
    weight = tl.load(token_weights + row).to(tl.float64)
    slope = tl.where(counts, weight * slope, 0.0)
    # Without old log-probs the terms never read the log-prob: carry a NaN of it (target out of range) over.
    loss = tl.where(counts, weight * loss, 0.0) + logprob.to(tl.float64) * 0.0
    tl.store(stats + row, logprob)
    tl.store(stats + size + row, entropy)
    tl.store(stats + 2 * size + row, tl.where(counts, drift, 0.0).to(tl.float32))
    tl.store(losses + row, loss)
    tl.store(clipped_out + row, clipped & counts)

    if HAS_GRADIENT:
        g = (slope / tl.load(scale).to(tl.float64)).to(tl.float32) * inverse_temperature
        for back in range(tl.cdiv(vocab, BLOCK)):  # the end of the row was read last and may still be in L2
            cols = (tl.cdiv(vocab, BLOCK) - 1 - back) * BLOCK + tl.arange(0, BLOCK)
            inside = cols < vocab
            z = tl.load(here + cols, mask=inside, other=0.0)
            if HAS_BIAS:
                z += tl.load(bias + cols, mask=inside, other=0.0)
            p = exp((z - peak) * inverse_temperature - log_mass)
            dz = tl.where(counts, tl.where(cols == target, g, 0.0) - g * p, 0.0)  # ignored: p may be NaN
            tl.store(dlogits + row * vocab + cols, dz.to(dlogits.dtype.element_ty), mask=inside)


def _triton_forward(hidden, weight, targets, old_logprobs, advantages, token_weights, temperature, bias, *settings,
                    needs: tuple[bool, bool] = (False, False)):
    """(CPGDOutput, dhidden, dweight): the logits of a chunk are folded, and spent, before those of the next."""
    size, vocab, device = hidden.shape[0], weight.shape[0], hidden.device
    found = objective_settings(*settings, device)
    vectors = [None if t is None else t.contiguous() for t in (targets, old_logprobs, advantages, token_weights)]
    stats = torch.empty((3, size), device=device)
    losses = torch.empty(size, dtype=torch.float64, device=device)
    clipped = torch.empty(size, dtype=torch.bool, device=device)
    scale = torch.ones((), device=device)
    if hidden.dtype == torch.float16 and size:  # the largest slope that can occur, or float16 rounds small ones to 0
        drift_coef, drift_clip = settings[2:]
        bound = token_weights.abs() * (advantages.abs() + drift_coef * max(1.0, min(drift_clip, 1e4)))
        bound = bound.masked_fill(targets == launch.IGNORE_INDEX, 0.0).max() / temperature
        scale = bound.clamp(min=1e-30).float()

    def fill(rows: slice, logits: torch.Tensor, dlogits: torch.Tensor | None) -> None:
        target, old, advantage, token_weight = (None if t is None else t[rows] for t in vectors)
        upper, lower = (t[rows] if t.numel() > 1 else t for t in found[:2])
        with launch.on(device):
            _fold_kernel[(logits.shape[0],)](
                logits, dlogits, target, bias, old, advantage, token_weight, upper, lower, found.coefs, scale,
                stats[:, rows], losses[rows], clipped[rows], size, vocab, *found.strides(), 1.0 / temperature,
                HAS_BIAS=bias is not None, HAS_OLD=old is not None, HAS_GRADIENT=dlogits is not None,
                IGNORE_INDEX=launch.IGNORE_INDEX, BLOCK=ROW_BLOCK, num_warps=ROW_WARPS)

    ignored = targets == launch.IGNORE_INDEX
    # Token weights hold 1 / (tokens of the update): before the loss scale float16 would round these to 0.
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    dhidden, dweight = head_gradients(hidden, weight, fill, needs=needs, ignored=ignored, dtype=dtype,
                                      scale=scale if hidden.dtype == torch.float16 else None)
    logprobs, entropy, drift = stats
    return CPGDOutput(losses.sum().float(), logprobs, entropy, clipped, drift), dhidden, dweight


def _reference_forward(hidden, weight, targets, old_logprobs, advantages, token_weights, temperature, bias, *settings,
                       needs: tuple[bool, bool] = (False, False)):
    """(CPGDOutput, dhidden, dweight)."""
    stats = reference.linear_logprob_forward(hidden, weight, targets, temperature, bias)
    terms = reference.cpgd_terms(stats.logprobs, old_logprobs, advantages, *settings)
    ignored = targets == launch.IGNORE_INDEX
    token_weights = token_weights.double()
    loss = (token_weights * terms.loss).masked_fill(ignored, 0.0).sum()
    # With old_logprobs=None the terms never read the log-probs: carry a NaN of theirs (target out of range) over.
    loss = loss + (stats.logprobs * 0.0).sum()
    output = CPGDOutput(loss.float(), stats.logprobs, stats.entropy, terms.clipped & ~ignored,
                        terms.drift.float().masked_fill(ignored, 0.0))
    if not any(needs):
        return output, None, None
    # Token weights hold 1 / (tokens of the update): before the loss scale float16 would round these to 0.
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    dhidden, dweight, _ = reference.linear_logprob_backward(
        hidden, weight, targets, temperature, bias, stats, token_weights * terms.dlogprobs, needs=(*needs, False),
        out_dtype=dtype)
    return output, dhidden, dweight


class _LinearCPGD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, hidden, weight, *args):
        output, dhidden, dweight = forward(hidden, weight, *args, needs=ctx.needs_input_grad[1:3])
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(*output[1:])
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        # Out of place: a second backward of a retained graph must find the gradients unscaled.
        scaled = [None if g is None else torch.mul(g, dloss, out=torch.empty_like(g, dtype=ctx.dtype))
                  for g in ctx.saved_tensors]
        return (None, *scaled, *(None,) * 10)


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
    Memory beyond the inputs: the gradients, (N, D) and (V, D); Triton: dW in float32 instead, until the backward, and
        `gemm.SCRATCH_BYTES` and a float32 (outer, D) of `gemm.plan_chunks` (1.5 GB at the 7B head); reference: tiles of
        4M logits.
    """
    fused = launch.use_triton(backend, hidden.device)
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
    args = (targets, old_logprobs, advantages, token_weights, float(temperature),
            None if bias is None else bias.contiguous(),
            clip_eps_low, clip_eps_high, drift_coef, drift_clip)
    forward = _reference_forward
    if fused:
        hidden, weight, forward = launch.rows_contiguous(hidden), launch.rows_contiguous(weight), _triton_forward
    # Tested here, because grad mode is always off inside a Function's forward.
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return CPGDOutput(*_LinearCPGD.apply(forward, hidden, weight, *args))
    with torch.no_grad():
        return forward(hidden, weight, *args)[0]
