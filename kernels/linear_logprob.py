"""Log-prob and entropy of response tokens straight from hidden states and LM head: no logits are kept.

First call of every forward of the policy: old log-probs, the canary and any objective that autograd differentiates.

On CUDA the forward is one persistent kernel: an item is a block of tokens times a share of the vocabulary, so that few
tokens still fill the chip; it folds each float32 tile of logits into (peak, mass, moment) while it is in registers, and
a second kernel merges the shares in a fixed order. The backward forms the logits again, by chunks (gemm.py).
"""

# Triton's type hints describe what a kernel's author writes, not what a launch takes.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import launch, reference
from .gemm import head_gradients
from .launch import LOWEST, TensorDescriptor, tl, triton
from .reference import Stats


class TokenStats(NamedTuple):
    """Statistics of N tokens, all (N,) float32, in nats."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True)
class Tiles:
    """Shape of a tile of the forward kernel, and how it is run."""

    tokens: int
    vocab: int
    dim: int
    num_warps: int
    num_stages: int
    group: int = 16
    """Blocks of tokens that walk the vocabulary side by side; their hidden states stay in L2."""


RAGGED = Tiles(64, 128, 32, num_warps=8, num_stages=2)
"""16-bit rows that neither TMA nor a vector load can read; larger tiles would spill."""
ROW_BLOCK, ROW_WARPS = 4096, 8
"""Columns that a program of a kernel over rows of logits reads at a time, and its warps."""


def reads_ragged(tma: bool, *dims: int) -> bool:
    """Whether tiles of `dims` columns end beyond a row, which a pointer must mask element by element."""
    return not tma and any(dim % 64 for dim in dims)


def forward_tiles(dtype: torch.dtype, capability: tuple[int, int], ragged: bool) -> Tiles:
    """The shipped configuration of a chip."""
    if dtype == torch.float32:  # no tensor cores at full precision
        return Tiles(64, 64, 16, num_warps=8, num_stages=2)
    if ragged:
        return RAGGED
    if capability >= (9, 0):
        return Tiles(128, 256, 64, num_warps=8, num_stages=4)
    return Tiles(128, 128, 32, num_warps=8, num_stages=4)


def plan_splits(blocks: int, tiles: int, programs: int) -> tuple[int, int]:
    """(splits, tiles of a split) of the vocabulary for which the persistent programs end most evenly."""
    best = min(range(1, min(tiles, 64) + 1),
               key=lambda s: (-(-blocks * s // programs) * -(-tiles // s) + s / 64, s))  # a split costs a merge
    per_split = -(-tiles // best)
    return -(-tiles // per_split), per_split


@triton.jit
def load_tile(tensor, row, col, stride, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, EVEN_COLS: tl.constexpr,
              TMA: tl.constexpr):
    """(ROWS, COLS) tile of `tensor` (rows, cols), a descriptor under TMA, else a pointer; 0 beyond the edges."""
    if TMA:
        tile = tensor.load([row, col])
    else:
        at_row = row + tl.arange(0, ROWS)
        at_col = col + tl.arange(0, COLS)
        mask = at_row[:, None] < rows
        if not EVEN_COLS:
            mask = mask & (at_col[None, :] < cols)
        tile = tl.load(tensor + at_row[:, None].to(tl.int64) * stride + at_col[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def multiply(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a @ b.T in float32."""
    if INTERPRET:  # its bfloat16 dot multiplies bit patterns
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b.T, acc, input_precision="ieee")


@triton.jit
def exp(x, scale=1.0):
    """e^(scale x) in two instructions: tl.exp spends four more on results below 1e-38."""
    return tl.exp2(x * (scale * 1.4426950408889634))


@triton.jit
def block_and_split(item, blocks, splits, GROUP: tl.constexpr):
    """Order of the items: GROUP blocks of tokens for one split, then the same blocks for the next."""
    first = item // (GROUP * splits) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    within = item - first * splits
    return first + within % size, within // size


# An argument of 1 would be compiled in, once more for each batch size and as a constant that has no .to().
@triton.jit(do_not_specialize=("size", "splits", "tiles_per_split"))
def _partial_stats_kernel(hidden, weight, targets, bias, partials, size, vocab, dim, hidden_stride, weight_stride,
                          inverse_temperature, splits, tiles_per_split, HAS_BIAS: tl.constexpr, EVEN_DIM: tl.constexpr,
                          TMA: tl.constexpr, TOKENS: tl.constexpr, VOCAB: tl.constexpr, DIM: tl.constexpr,
                          GROUP: tl.constexpr, INTERPRET: tl.constexpr):
    """partials (4, splits, size) float32: peak, mass, moment, logit at the target.

    All but the mass before the division by the temperature: a scaled peak is rounded, and a fused multiply-add takes it
    from logits that are not, which put the largest probability above 1.
    """
    blocks = tl.cdiv(size, TOKENS)
    tiles = tl.cdiv(vocab, VOCAB)
    for item in range(tl.program_id(0), blocks * splits, tl.num_programs(0)):
        block, split = block_and_split(item, blocks, splits, GROUP)
        rows = block * TOKENS + tl.arange(0, TOKENS)
        inside = rows < size
        target = tl.load(targets + rows, mask=inside, other=-1)
        peak = tl.full((TOKENS,), LOWEST, tl.float32)
        mass = tl.zeros((TOKENS,), tl.float32)
        moment = tl.zeros((TOKENS,), tl.float32)
        at_target = tl.zeros((TOKENS,), tl.float32)
        for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
            z = tl.zeros((TOKENS, VOCAB), tl.float32)
            for k in range(0, dim, DIM):
                h = load_tile(hidden, block * TOKENS, k, hidden_stride, size, dim, TOKENS, DIM, EVEN_DIM, TMA)
                w = load_tile(weight, tile * VOCAB, k, weight_stride, vocab, dim, VOCAB, DIM, EVEN_DIM, TMA)
                z = multiply(h, w, z, INTERPRET)
            col = tile * VOCAB
            cols = col + tl.arange(0, VOCAB)
            if HAS_BIAS:
                z += tl.load(bias + cols, mask=cols < vocab, other=0.0)[None, :]
            if col + VOCAB > vocab:  # before the maximum: beyond the edge z is 0, which would enter the sum
                z = tl.where(cols[None, :] < vocab, z, LOWEST)
            if tl.max(((target >= col) & (target < col + VOCAB)).to(tl.int32), axis=0) > 0:  # of few tiles only
                at_target += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), axis=1)
            top = tl.maximum(peak, tl.max(z, axis=1))
            shift = peak - top
            decay = exp(shift, inverse_temperature)
            z -= top[:, None]
            e = exp(z, inverse_temperature)
            # moment = sum e^(z - peak) (z - peak); moving the peak shifts the second factor too.
            moment = decay * (moment + shift * mass) + tl.sum(e * z, axis=1)
            mass = decay * mass + tl.sum(e, axis=1)
            peak = top
        here = partials + split.to(tl.int64) * size + rows
        plane = splits.to(tl.int64) * size
        tl.store(here, peak, mask=inside)
        tl.store(here + plane, mass, mask=inside)
        tl.store(here + 2 * plane, moment, mask=inside)
        tl.store(here + 3 * plane, at_target, mask=inside)


@triton.jit
def finish_stats(target, peak, mass, moment, at_target, vocab, inverse_temperature, IGNORE_INDEX: tl.constexpr):
    """(logprob, entropy, log_mass) as in reference.linear_logprob_forward: 0 where ignored, NaN where out of range.

    peak, moment and at_target are those of logits before the division by the temperature.
    """
    ignored = target == IGNORE_INDEX
    bad = (target != IGNORE_INDEX) & ((target < 0) | (target >= vocab))
    log_mass = tl.where(bad, float("nan"), tl.log(mass))
    logprob = tl.where(ignored, 0.0, (at_target - peak) * inverse_temperature - log_mass)
    return logprob, tl.where(ignored, 0.0, log_mass - moment / mass * inverse_temperature), log_mass


@triton.jit(do_not_specialize=("size", "splits"))
def _merge_kernel(partials, targets, stats, size, vocab, inverse_temperature, splits, IGNORE_INDEX: tl.constexpr,
                  TOKENS: tl.constexpr):
    """stats (5, size): log-prob, entropy, peak of the undivided logits, log_mass, lse; the splits in their order."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = rows < size
    plane = splits.to(tl.int64) * size
    peak = tl.full((TOKENS,), LOWEST, tl.float32)
    mass = tl.zeros((TOKENS,), tl.float32)
    moment = tl.zeros((TOKENS,), tl.float32)
    at_target = tl.zeros((TOKENS,), tl.float32)
    for split in range(splits):
        here = partials + tl.cast(split, tl.int64) * size + rows
        other_peak = tl.load(here, mask=inside, other=0.0)
        other_mass = tl.load(here + plane, mask=inside, other=1.0)
        other_moment = tl.load(here + 2 * plane, mask=inside, other=0.0)
        at_target += tl.load(here + 3 * plane, mask=inside, other=0.0)
        top = tl.maximum(peak, other_peak)
        shift, other_shift = peak - top, other_peak - top
        decay, other_decay = exp(shift, inverse_temperature), exp(other_shift, inverse_temperature)
        moment = decay * (moment + shift * mass) + other_decay * (other_moment + other_shift * other_mass)
        mass = decay * mass + other_decay * other_mass
        peak = top
    target = tl.load(targets + rows, mask=inside, other=0)
    logprob, entropy, log_mass = finish_stats(target, peak, mass, moment, at_target, vocab, inverse_temperature,
                                              IGNORE_INDEX)
    here = stats + rows
    tl.store(here, logprob, mask=inside)
    tl.store(here + size, entropy, mask=inside)
    tl.store(here + 2 * size, peak, mask=inside)
    tl.store(here + 3 * size, log_mass, mask=inside)
    lse = tl.where(target == IGNORE_INDEX, 0.0, peak * inverse_temperature + log_mass)
    tl.store(here + 4 * size, lse, mask=inside)


@triton.jit
def fold_row(logits, bias, vocab, inverse_temperature, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """(peak, mass, moment) of one row of float32 logits, (vocab,), in memory; see _partial_stats_kernel."""
    lane = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), LOWEST, tl.float32)  # of each lane: one reduction a row, not one a block
    mass = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        cols = start + lane
        z = tl.load(logits + cols, mask=cols < vocab, other=LOWEST)
        if HAS_BIAS:
            z += tl.load(bias + cols, mask=cols < vocab, other=0.0)
        z = tl.where(cols < vocab, z, LOWEST)
        top = tl.maximum(peaks, z)
        shift = peaks - top
        decay = exp(shift, inverse_temperature)
        z -= top
        e = exp(z, inverse_temperature)
        moment = decay * (moment + shift * mass) + e * z
        mass = decay * mass + e
        peaks = top
    peak = tl.max(peaks, axis=0)
    shift = peaks - peak
    decay = exp(shift, inverse_temperature)  # 0 in a lane beyond the vocabulary, whose peak and shift are LOWEST
    return peak, tl.sum(decay * mass, axis=0), tl.sum(decay * (moment + shift * mass), axis=0)


@triton.jit
def _dlogits_kernel(logits, dlogits, targets, bias, entropy, peak, log_mass, dlogprobs, dentropy, scale, vocab,
                    inverse_temperature, HAS_BIAS: tl.constexpr, HAS_DENTROPY: tl.constexpr, REFOLD: tl.constexpr,
                    IGNORE_INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """dlogits (rows, vocab) = (dlogprobs ([v == y] - p) - dentropy p (ln p + entropy)) / (temperature scale)."""
    row = tl.program_id(0).to(tl.int64)
    here = logits + row * vocab
    target = tl.load(targets + row)
    if REFOLD:
        row_peak, mass, moment = fold_row(here, bias, vocab, inverse_temperature, HAS_BIAS, BLOCK)
        _, row_entropy, row_log_mass = finish_stats(target, row_peak, mass, moment, 0.0, vocab, inverse_temperature,
                                                    IGNORE_INDEX)
    else:
        row_peak, row_log_mass, row_entropy = tl.load(peak + row), tl.load(log_mass + row), tl.load(entropy + row)
    factor = inverse_temperature / tl.load(scale)
    g = tl.load(dlogprobs + row) * factor
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < vocab
        z = tl.load(here + cols, mask=inside, other=0.0)
        if HAS_BIAS:
            z += tl.load(bias + cols, mask=inside, other=0.0)
        logp = (z - row_peak) * inverse_temperature - row_log_mass
        p = exp(logp)
        dz = tl.where(cols == target, g, 0.0) - g * p
        if HAS_DENTROPY:
            dz -= tl.load(dentropy + row) * factor * p * (logp + row_entropy)
        tl.store(dlogits + row * vocab + cols, dz.to(dlogits.dtype.element_ty), mask=inside)


def refolds(dtype: torch.dtype) -> bool:
    """Whether a backward folds its own logits again, instead of taking the statistics of the forward.

    They come from another product, and differ in the last bits: in float32 that would be the largest error.
    """
    return dtype == torch.float32


def _triton_forward(hidden, weight, targets, temperature, bias) -> tuple[Stats, torch.Tensor]:
    """(stats, lse) of each token; the peak in the stats is of logits before the division by the temperature."""
    (size, dim), vocab, device = hidden.shape, weight.shape[0], hidden.device
    stats = torch.empty((5, size), device=device)
    if size:
        tma = launch.takes_tma(hidden, weight)
        tiles = forward_tiles(hidden.dtype, launch.capability(device), reads_ragged(tma, dim))
        programs = launch.num_programs(device)
        splits, per_split = plan_splits(triton.cdiv(size, tiles.tokens), triton.cdiv(vocab, tiles.vocab), programs)
        partials = torch.empty((4, splits, size), device=device)
        operands = hidden, weight
        if tma:
            operands = (TensorDescriptor.from_tensor(hidden, [tiles.tokens, tiles.dim]),
                        TensorDescriptor.from_tensor(weight, [tiles.vocab, tiles.dim]))
        with launch.on(device):
            _partial_stats_kernel[(programs,)](
                *operands, targets, bias, partials, size, vocab, dim, hidden.stride(0), weight.stride(0),
                1.0 / temperature, splits, per_split, HAS_BIAS=bias is not None, EVEN_DIM=dim % tiles.dim == 0,
                TMA=tma, TOKENS=tiles.tokens, VOCAB=tiles.vocab, DIM=tiles.dim, GROUP=tiles.group,
                INTERPRET=launch.INTERPRET, num_warps=tiles.num_warps, num_stages=tiles.num_stages)
            _merge_kernel[(triton.cdiv(size, 128),)](partials, targets, stats, size, vocab, 1.0 / temperature, splits,
                                                     IGNORE_INDEX=launch.IGNORE_INDEX, TOKENS=128)
    logprobs, entropy, peak, log_mass, lse = stats
    return Stats(logprobs, entropy, peak, log_mass), lse


def _triton_backward(hidden, weight, targets, temperature, bias, stats: Stats, dlogprobs, dentropy, needs):
    """(dhidden, dweight, dbias); tokens without gradient are dropped before any product."""
    grads = [dlogprobs] if dentropy is None else [dlogprobs, dentropy]
    ignored = targets == launch.IGNORE_INDEX
    grads = [g.float().masked_fill(ignored, 0.0) for g in grads]
    live = torch.stack(grads).ne(0).any(dim=0)  # NaN is not 0
    live = None if live.all() else live.nonzero()[:, 0]  # a wait for the device, worth its GEMMs
    pick = (lambda t: t) if live is None else (lambda t: t.index_select(0, live))
    dlogprobs, dentropy, *_ = *(pick(g) for g in grads), None
    states, targets, stats = pick(hidden), pick(targets), Stats(*map(pick, stats))
    vocab, device = weight.shape[0], hidden.device
    scale = torch.ones((), device=device)
    if hidden.dtype == torch.float16 and states.shape[0]:
        scale = (torch.stack(grads).abs().max() / temperature).clamp(min=1e-30)
    dbias = torch.zeros(vocab, device=device) if needs[2] else None

    def fill(rows: slice, logits: torch.Tensor, dlogits: torch.Tensor | None) -> None:
        assert dlogits is not None
        part = [None if t is None else t[rows] for t in (targets, stats.entropy, stats.peak, stats.log_mass, dlogprobs,
                                                         dentropy)]
        with launch.on(device):
            _dlogits_kernel[(logits.shape[0],)](
                logits, dlogits, part[0], bias, *part[1:], scale, vocab, 1.0 / temperature, HAS_BIAS=bias is not None,
                HAS_DENTROPY=dentropy is not None, REFOLD=refolds(hidden.dtype), IGNORE_INDEX=launch.IGNORE_INDEX,
                BLOCK=ROW_BLOCK, num_warps=ROW_WARPS)
        if dbias is not None:
            dbias.add_(dlogits.sum(dim=0, dtype=torch.float32))

    # A bias that learns has a weight that learns.
    dhidden, dweight = head_gradients(states, weight, fill, needs=(needs[0], needs[1] or needs[2]), scale=scale)
    if dhidden is not None and live is not None:
        dhidden = hidden.new_zeros(hidden.shape).index_copy_(0, live, dhidden)
    if dweight is not None:
        dweight = dweight.to(weight.dtype) if needs[1] else None
    return dhidden, dweight, None if dbias is None else dbias * scale


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, bias, fused):
        if fused:
            hidden, weight = launch.rows_contiguous(hidden), launch.rows_contiguous(weight)
            targets = targets.contiguous()
            bias = None if bias is None else bias.contiguous()
            stats, lse = _triton_forward(hidden, weight, targets, temperature, bias)
        else:
            stats = reference.linear_logprob_forward(hidden, weight, targets, temperature, bias)
            lse = (stats.peak + stats.log_mass).masked_fill(targets == launch.IGNORE_INDEX, 0.0)
        ctx.save_for_backward(hidden, weight, targets, bias, *stats)
        ctx.temperature, ctx.fused = temperature, fused
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return stats.logprobs, stats.entropy, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogprobs, dentropy, _dlse):
        hidden, weight, targets, bias, *stats = ctx.saved_tensors
        if dlogprobs is None and dentropy is None:
            return (None,) * 6
        if dlogprobs is None:
            dlogprobs = torch.zeros_like(dentropy)
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4])
        backward = _triton_backward if ctx.fused else reference.linear_logprob_backward
        dhidden, dweight, dbias = backward(
            hidden, weight, targets, ctx.temperature, bias, Stats(*stats), dlogprobs, dentropy, needs=needs)
        return dhidden, dweight, None, None, dbias, None


def linear_logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, temperature: float = 1.0,
                   bias: torch.Tensor | None = None, backend: str | None = None, check: bool | None = None,
                   backward: str = "exact", tile_threshold: float = 1e-4) -> TokenStats:
    """Log-prob of each target and entropy under softmax((hidden @ weight.T + bias) / temperature), logits not stored.

    Args:
        hidden: (N, D) float32, float16 or bfloat16; N may be 0.
        weight: (V, D), dtype and device of `hidden`.
        targets: (N,) int64 in [0, V); `IGNORE_INDEX` (-100) gives log-prob 0, entropy 0, lse 0 and no gradient.
        temperature: above 0, unitless.
        bias: (V,) float32, at most 1e31 in size, added before the division by the temperature; -1e30 bans a token.
        backend: None takes Triton on CUDA and the PyTorch reference elsewhere; "triton" and "torch" force one.
        check: read the values of targets and bias; None: on CPU tensors only. Unchecked, a target out of range gives
            NaN, never a read out of bounds.
        backward: "exact". tile_threshold: no part in "exact".
    Returns:
        TokenStats, gradients to hidden, weight and bias from `logprobs` and `entropy`; `lse` is not differentiable.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit; the message has both.
    Memory beyond the inputs, Triton: forward 16 bytes x N x (at most 64 splits of the vocabulary); backward the
        gradients, 4 V D bytes (dW in float32, if it is needed), `gemm.SCRATCH_BYTES`, a float32 (outer, D) of
        `gemm.plan_chunks`, and a copy of `hidden` if some tokens have no gradient. Reference: the gradients and tiles
        of 4M logits.
    Numerics: 16-bit products are summed in float32, float32 ones never in tf32; the logits are never rounded.
        Deterministic: the same bits for the same input on the same device.
    Source: arXiv:2411.09009 for never storing the logits; written here from the formulas in reference.py.
    """
    fused = launch.use_triton(backend, hidden.device)
    launch.check_backward(backward, tile_threshold)
    launch.check_temperature(temperature)
    launch.check_head(hidden, weight)
    values = launch.wants_values(check, hidden.device)
    launch.check_bias(bias, weight, values)
    launch.check_targets(targets, hidden, weight.shape[0], values)
    return TokenStats(*_LinearLogprob.apply(hidden, weight, targets, float(temperature), bias, fused))
