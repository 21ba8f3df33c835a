"""Every kernel in plain PyTorch: the definition (dense, for autograd and float64) and the chunked CPU path.

With z = (hidden @ weight.T + bias) / temperature, p = softmax(z), y the target of a token:

    logprob = z_y - lse(z)        d logprob / d z_v = [v == y] - p_v
    entropy = -sum_v p_v ln p_v   d entropy / d z_v = -p_v (ln p_v + entropy)
    kl      = sum_v p_old (ln p_old - ln p)         d kl / d z_v = p_v - p_old_v

The chunked functions walk tiles of (tokens, vocabulary) and hold no N x V tensor. Products and sums are float32
(float64 for float64 inputs, which only the tests give). Softmax is kept as (peak, log_mass) with
ln p = (z - peak) - log_mass, because the rounding of lse = peak + log_mass alone is 4e-6 nats at |z| = 80.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .launch import IGNORE_INDEX

TILE_ROWS = 1024
TILE_ELEMENTS = 1 << 22
"""Size of a tile of logits, of hidden and of weight (16 MiB of float32); a few live at once."""


class Stats(NamedTuple):
    """Softmax statistics of N tokens, all (N,); peak and log_mass are of real logits on ignored rows too."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    peak: torch.Tensor
    log_mass: torch.Tensor


class CPGDTerms(NamedTuple):
    """Per-token terms of the CPGD loss, all (N,) float64 but `clipped` (bool)."""

    loss: torch.Tensor
    log_ratio: torch.Tensor
    clipped: torch.Tensor
    drift: torch.Tensor
    dlogprobs: torch.Tensor
    """d loss / d logprob, the drift's coefficient clipped."""


# Definitions: dense, differentiable by autograd, any floating dtype.

def dense_linear_logprob(hidden, weight, targets, temperature=1.0, bias=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target and entropy, (N,) each in the inputs' dtype, from the whole N x V log_softmax."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias.to(hidden.dtype)
    logp = torch.log_softmax(logits / temperature, dim=-1)
    keep = targets != IGNORE_INDEX
    at_target = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(keep, at_target, 0.0), torch.where(keep, -(logp.exp() * logp).sum(dim=-1), 0.0)


def dense_linear_kl(old_hidden, old_weight, hidden, weight, temperature=1.0, bias=None) -> torch.Tensor:
    """KL(pi_old || pi_theta) of each token, (N,) in the inputs' dtype, from two whole N x V log_softmaxes."""
    shift = 0.0 if bias is None else bias.to(hidden.dtype)
    old = torch.log_softmax((old_hidden @ old_weight.T + shift) / temperature, dim=-1)
    new = torch.log_softmax((hidden @ weight.T + shift) / temperature, dim=-1)
    return (old.exp() * (old - new)).sum(dim=-1)


def dense_cpgd(logprobs, old_logprobs, advantages, clip_eps_low=0.2, clip_eps_high=0.2, drift_coef=0.01,
               drift_clip=2.0) -> torch.Tensor:
    """CPGD loss of each token, (N,), with the drift's clipped coefficient as a straight-through gradient."""
    log_ratio = logprobs - old_logprobs
    upper, lower = math.log1p(clip_eps_high), math.log1p(-clip_eps_low)
    phi = advantages * torch.where(advantages > 0, log_ratio.clamp(max=upper), log_ratio.clamp(min=lower))
    slope = torch.expm1(log_ratio.detach()).clamp(max=drift_clip)
    value = torch.expm1(log_ratio.detach()) - log_ratio.detach()
    return -phi + drift_coef * (value + slope * (log_ratio - log_ratio.detach()))


# Chunked path.

@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply float32 in float32: no autocast, no tf32, no bfloat16 in oneDNN, whatever the caller has set."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [s.fp32_precision for s in settings]
    try:
        for s in settings:
            s.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for s, value in zip(settings, before, strict=True):
            s.fp32_precision = value


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """float32 for the three supported dtypes, float64 for float64."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _spans(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _tile_shape(num_tokens: int, vocab_size: int, dim: int) -> tuple[int, int]:
    """(tokens, vocabulary) of a tile: one tile when the logits are few, else about TILE_ROWS tokens."""
    rows = max(1, min(num_tokens, max(TILE_ROWS, TILE_ELEMENTS // max(vocab_size, dim))))
    return rows, min(vocab_size, max(TILE_ROWS, TILE_ELEMENTS // max(rows, dim)))


class _Head:
    """hidden and weight in tiles of compute dtype; rows in `ignored` read as 0, so that a NaN there goes nowhere."""

    def __init__(self, hidden, weight, temperature, bias=None, ignored=None):
        self.hidden, self.weight, self.temperature, self.bias, self.ignored = hidden, weight, temperature, bias, ignored
        self.dtype = compute_dtype(hidden)
        self.row_step, self.col_step = _tile_shape(hidden.shape[0], *weight.shape)

    def cols(self) -> Iterator[slice]:
        return _spans(self.weight.shape[0], self.col_step)

    def rows(self) -> Iterator[slice]:
        return _spans(self.hidden.shape[0], self.row_step)

    def w(self, cols: slice) -> torch.Tensor:
        return self.weight[cols].to(self.dtype)

    def h(self, rows: slice) -> torch.Tensor:
        h = self.hidden[rows].to(self.dtype)
        return h if self.ignored is None else h.masked_fill(self.ignored[rows, None], 0.0)

    def logits(self, h: torch.Tensor, w: torch.Tensor, cols: slice) -> torch.Tensor:
        z = torch.mm(h, w.T)
        if self.bias is not None:
            z += self.bias[cols].to(self.dtype)
        return z if self.temperature == 1.0 else z.div_(self.temperature)


def _local_targets(targets: torch.Tensor, rows: slice, cols: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each row's target in the tile, (rows, 1), clamped, and whether it lies there, (rows,)."""
    local = targets[rows] - cols.start
    inside = (local >= 0) & (local < cols.stop - cols.start)
    return local.clamp(0, cols.stop - cols.start - 1)[:, None], inside


def _stats(head: _Head, targets: torch.Tensor | None) -> Stats:
    n, device = head.hidden.shape[0], head.hidden.device
    # The lowest finite number, not -inf: (-inf) * 0 in the first rescaling would be NaN.
    peak = torch.full((n,), torch.finfo(head.dtype).min, dtype=head.dtype, device=device)
    mass, moment, at_target = (torch.zeros(n, dtype=head.dtype, device=device) for _ in range(3))
    for cols in head.cols():
        w = head.w(cols)
        for rows in head.rows():
            z = head.logits(head.h(rows), w, cols)
            if targets is not None:
                local, inside = _local_targets(targets, rows, cols)
                at_target[rows] = torch.where(inside, z.gather(1, local)[:, 0], at_target[rows])
            top = torch.maximum(peak[rows], z.amax(dim=1))
            shift = peak[rows] - top
            decay = shift.exp()
            z.sub_(top[:, None])
            e = z.exp()
            # moment = sum e^(z - peak) (z - peak); moving the peak shifts the second factor too.
            moment[rows] = decay * (moment[rows] + shift * mass[rows]) + z.mul_(e).sum(dim=1)
            mass[rows] = decay * mass[rows] + e.sum(dim=1)
            peak[rows] = top
    log_mass = mass.log()
    return Stats((at_target - peak) - log_mass, log_mass - moment / mass, peak, log_mass)


def linear_logprob_forward(hidden, weight, targets, temperature=1.0, bias=None) -> Stats:
    """Stats of each token in compute dtype; ignored rows have logprob and entropy 0, targets out of range NaN."""
    ignored = targets == IGNORE_INDEX
    bad = ~ignored & ((targets < 0) | (targets >= weight.shape[0]))
    with full_precision(hidden.device):
        stats = _stats(_Head(hidden, weight, temperature, bias, ignored), targets)
    # NaN in log_mass makes the lse, and every gradient of the call, NaN as well.
    logprobs, entropy, log_mass = (t.masked_fill(bad, float("nan")) for t in (stats[0], stats[1], stats[3]))
    return Stats(logprobs.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0), stats.peak, log_mass)


def linear_logprob_backward(hidden, weight, targets, temperature, bias, stats: Stats, dlogprobs, dentropy=None, *,
                            needs=(True, True, False), out_dtype=None):
    """(dhidden, dweight, dbias) of sum(dlogprobs * logprobs + dentropy * entropy); None where `needs` says no.

    dlogprobs and dentropy are (N,); `out_dtype` is that of dhidden and dweight, the inputs' own if None.
    Sums over tokens and over the vocabulary stay in compute dtype until the end.
    """
    ignored = targets == IGNORE_INDEX
    head = _Head(hidden, weight, temperature, bias, ignored)
    out_dtype = out_dtype or hidden.dtype
    dlogprobs = dlogprobs.to(head.dtype).masked_fill(ignored, 0.0)
    dentropy = None if dentropy is None else dentropy.to(head.dtype).masked_fill(ignored, 0.0)
    dhidden = torch.zeros(hidden.shape, dtype=head.dtype, device=hidden.device) if needs[0] else None
    dweight = torch.empty(weight.shape, dtype=out_dtype, device=hidden.device) if needs[1] else None
    dbias = torch.zeros(weight.shape[0], dtype=head.dtype, device=hidden.device) if needs[2] else None
    with full_precision(hidden.device):
        for cols in head.cols():
            w = head.w(cols)
            dw = None if dweight is None else torch.zeros_like(w)
            for rows in head.rows():
                h = head.h(rows)
                logp = head.logits(h, w, cols).sub_(stats.peak[rows, None]).sub_(stats.log_mass[rows, None])
                g = dlogprobs[rows]
                if dentropy is None:
                    dz = logp.exp_().mul_(-g[:, None])
                else:
                    dh = dentropy[rows]
                    p = logp.exp()
                    dz = logp.mul_(-dh[:, None]).sub_((g + dh * stats.entropy[rows])[:, None]).mul_(p)
                local, inside = _local_targets(targets, rows, cols)
                # Gather, add and scatter rather than scatter_add: one element a row, deterministic on CUDA too.
                dz.scatter_(1, local, dz.gather(1, local) + torch.where(inside, g, 0.0)[:, None])
                _accumulate(dz, h, w, rows, cols, dhidden, dw, dbias)
            if dweight is not None and dw is not None:
                dweight[cols] = dw.div_(temperature)
    return _finish(dhidden, dweight, dbias, temperature, out_dtype)


def linear_kl_forward(old_hidden, old_weight, hidden, weight, temperature=1.0, bias=None):
    """(kl (N,), old stats, new stats) in compute dtype, kl >= 0."""
    with full_precision(hidden.device):
        old, new = _Head(old_hidden, old_weight, temperature, bias), _Head(hidden, weight, temperature, bias)
        old_stats, new_stats = _stats(old, None), _stats(new, None)
        kl = torch.zeros(hidden.shape[0], dtype=new.dtype, device=hidden.device)
        for cols in new.cols():
            w_old, w = old.w(cols), new.w(cols)
            for rows in new.rows():
                old_logp, logp = _log_softmax_pair(old, new, old_stats, new_stats, w_old, w, rows, cols)
                # sum p_old (ln p_old - ln p) + p - p_old: the last two sum to 0, make each term non-negative
                # and cancel the first order of the errors in log_mass.
                p_old = old_logp.exp()
                difference = old_logp.sub_(logp).mul_(p_old).add_(logp.exp_()).sub_(p_old)
                kl[rows] += difference.sum(dim=1)
    return kl.clamp_(min=0.0), old_stats, new_stats  # the clamp keeps NaN


def linear_kl_backward(old_hidden, old_weight, hidden, weight, temperature, bias, old_stats, new_stats, dkl, *,
                       needs=(True, True)):
    """(dhidden, dweight) of sum(dkl * kl), in the inputs' dtype; None where `needs` says no."""
    old, new = _Head(old_hidden, old_weight, temperature, bias), _Head(hidden, weight, temperature, bias)
    dkl = dkl.to(new.dtype)
    dhidden = torch.zeros(hidden.shape, dtype=new.dtype, device=hidden.device) if needs[0] else None
    dweight = torch.empty_like(weight) if needs[1] else None
    with full_precision(hidden.device):
        for cols in new.cols():
            w_old, w = old.w(cols), new.w(cols)
            dw = None if dweight is None else torch.zeros_like(w)
            for rows in new.rows():
                old_logp, logp = _log_softmax_pair(old, new, old_stats, new_stats, w_old, w, rows, cols)
                dz = logp.exp_().sub_(old_logp.exp_()).mul_(dkl[rows, None])
                _accumulate(dz, new.h(rows), w, rows, cols, dhidden, dw, None)
            if dweight is not None and dw is not None:
                dweight[cols] = dw.div_(temperature)
    return _finish(dhidden, dweight, None, temperature, hidden.dtype)[:2]


def _log_softmax_pair(old: _Head, new: _Head, old_stats: Stats, new_stats: Stats, w_old, w, rows, cols):
    return tuple(head.logits(head.h(rows), tile, cols).sub_(s.peak[rows, None]).sub_(s.log_mass[rows, None])
                 for head, tile, s in ((old, w_old, old_stats), (new, w, new_stats)))


def _accumulate(dz, h, w, rows: slice, cols: slice, dhidden, dw, dbias) -> None:
    if dhidden is not None:
        dhidden[rows].addmm_(dz, w)
    if dw is not None:
        dw.addmm_(dz.T, h)
    if dbias is not None:
        dbias[cols] += dz.sum(dim=0)


def _finish(dhidden, dweight, dbias, temperature: float, out_dtype: torch.dtype):
    return (None if dhidden is None else dhidden.div_(temperature).to(out_dtype), dweight,
            None if dbias is None else dbias.div_(temperature))


def _log1p(eps: float | torch.Tensor, sign: float, device: torch.device) -> torch.Tensor:
    if not isinstance(eps, torch.Tensor):  # as cpgd_objective has it: torch.log1p differs in the last bit
        bound = math.log1p(sign * eps) if sign * eps > -1 else -math.inf
        return torch.tensor(bound, dtype=torch.float64, device=device)
    return torch.log1p(sign * eps.to(device, torch.float64))


def cpgd_terms(logprobs, old_logprobs, advantages, clip_eps_low=0.2, clip_eps_high=0.2, drift_coef=0.01,
               drift_clip=2.0) -> CPGDTerms:
    """The CPGD loss of each token and its slope, in float64: expm1(l) - l cancels below l = 1e-3 in float32.

    All inputs (N,); old_logprobs=None: the ratio is 1. clip_eps_*: floats or (N,).
    """
    advantages = advantages.double()
    log_ratio = torch.zeros_like(advantages) if old_logprobs is None else logprobs.double() - old_logprobs.double()
    upper, lower = _log1p(clip_eps_high, 1.0, logprobs.device), _log1p(clip_eps_low, -1.0, logprobs.device)
    positive = advantages > 0
    clipped = (positive & (log_ratio > upper)) | ((advantages < 0) & (log_ratio < lower))
    bounded = torch.where(positive, torch.minimum(log_ratio, upper), torch.maximum(log_ratio, lower))
    excess = torch.expm1(log_ratio)
    drift = excess - log_ratio
    loss = drift_coef * drift - advantages * bounded
    dlogprobs = drift_coef * excess.clamp(max=drift_clip) - advantages.masked_fill(clipped, 0.0)
    return CPGDTerms(loss, log_ratio, clipped, drift, dlogprobs)
