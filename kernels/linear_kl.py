"""Exact KL(pi_old || pi_theta) over the vocabulary from two pairs of hidden states and LM head: no logits are kept.

The drift term of `objective.drift = exact`: the old hidden states and a copy of the old head stand for pi_old. On CUDA
one pass over the vocabulary folds both log-sum-exps and the weighted gap between the two tiles of logits.
"""

# Triton's type hints describe what a kernel's author writes, not what a launch takes.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
from torch.autograd.function import once_differentiable

from . import launch, reference
from .gemm import head_gradients, matmul
from .launch import LOWEST, TensorDescriptor, tl, triton
from .linear_logprob import (
    RAGGED,
    ROW_BLOCK,
    ROW_WARPS,
    Tiles,
    block_and_split,
    exp,
    fold_row,
    load_tile,
    multiply,
    plan_splits,
    reads_ragged,
    refolds,
)
from .reference import Stats


def kl_tiles(dtype: torch.dtype, capability: tuple[int, int], ragged: bool) -> Tiles:
    """The shipped configuration of a chip; two float32 accumulators must fit into its registers."""
    if dtype == torch.float32:
        return Tiles(64, 64, 16, num_warps=8, num_stages=2)
    if ragged:
        return RAGGED
    if capability >= (9, 0):
        return Tiles(128, 128, 64, num_warps=8, num_stages=4)
    return Tiles(64, 128, 32, num_warps=8, num_stages=4)


@triton.jit(do_not_specialize=("size", "splits", "tiles_per_split"))
def _partial_kl_kernel(old_hidden, old_weight, hidden, weight, bias, partials, size, vocab, old_dim, dim,
                       old_hidden_stride, old_weight_stride, hidden_stride, weight_stride, inverse_temperature, splits,
                       tiles_per_split, SHARED: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_DIM: tl.constexpr,
                       TMA: tl.constexpr, TOKENS: tl.constexpr, VOCAB: tl.constexpr, DIM: tl.constexpr,
                       GROUP: tl.constexpr, INTERPRET: tl.constexpr):
    """partials (5, splits, size) float32: old peak and mass, new peak and mass, sum e^(z_old - peak) (z_old - z).

    All but the masses before the division by the temperature, as in linear_logprob.
    """
    blocks = tl.cdiv(size, TOKENS)
    tiles = tl.cdiv(vocab, VOCAB)
    for item in range(tl.program_id(0), blocks * splits, tl.num_programs(0)):
        block, split = block_and_split(item, blocks, splits, GROUP)
        row = block * TOKENS
        old_peak = tl.full((TOKENS,), LOWEST, tl.float32)
        old_mass = tl.zeros((TOKENS,), tl.float32)
        peak = tl.full((TOKENS,), LOWEST, tl.float32)
        mass = tl.zeros((TOKENS,), tl.float32)
        gap = tl.zeros((TOKENS,), tl.float32)
        for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
            col = tile * VOCAB
            z_old = tl.zeros((TOKENS, VOCAB), tl.float32)
            z = tl.zeros((TOKENS, VOCAB), tl.float32)
            for k in range(0, dim, DIM):
                h = load_tile(hidden, row, k, hidden_stride, size, dim, TOKENS, DIM, EVEN_DIM, TMA)
                w = load_tile(weight, col, k, weight_stride, vocab, dim, VOCAB, DIM, EVEN_DIM, TMA)
                z = multiply(h, w, z, INTERPRET)
                if SHARED:  # one tile of the head for both policies
                    h_old = load_tile(old_hidden, row, k, old_hidden_stride, size, dim, TOKENS, DIM, EVEN_DIM, TMA)
                    z_old = multiply(h_old, w, z_old, INTERPRET)
            if not SHARED:
                for k in range(0, old_dim, DIM):
                    h = load_tile(old_hidden, row, k, old_hidden_stride, size, old_dim, TOKENS, DIM, EVEN_DIM, TMA)
                    w = load_tile(old_weight, col, k, old_weight_stride, vocab, old_dim, VOCAB, DIM, EVEN_DIM, TMA)
                    z_old = multiply(h, w, z_old, INTERPRET)
            cols = col + tl.arange(0, VOCAB)
            if HAS_BIAS:
                shift = tl.load(bias + cols, mask=cols < vocab, other=0.0)[None, :]
                z += shift
                z_old += shift
            if col + VOCAB > vocab:
                z = tl.where(cols[None, :] < vocab, z, LOWEST)
                z_old = tl.where(cols[None, :] < vocab, z_old, LOWEST)
            top = tl.maximum(peak, tl.max(z, axis=1))
            mass = (exp(peak - top, inverse_temperature) * mass
                    + tl.sum(exp(z - top[:, None], inverse_temperature), axis=1))
            peak = top
            old_top = tl.maximum(old_peak, tl.max(z_old, axis=1))
            decay = exp(old_peak - old_top, inverse_temperature)
            e = exp(z_old - old_top[:, None], inverse_temperature)
            old_mass = decay * old_mass + tl.sum(e, axis=1)
            gap = decay * gap + tl.sum(e * (z_old - z), axis=1)
            old_peak = old_top
        rows = row + tl.arange(0, TOKENS)
        inside = rows < size
        here = partials + split.to(tl.int64) * size + rows
        plane = splits.to(tl.int64) * size
        tl.store(here, old_peak, mask=inside)
        tl.store(here + plane, old_mass, mask=inside)
        tl.store(here + 2 * plane, peak, mask=inside)
        tl.store(here + 3 * plane, mass, mask=inside)
        tl.store(here + 4 * plane, gap, mask=inside)


@triton.jit(do_not_specialize=("size", "splits"))
def _merge_kl_kernel(partials, stats, size, inverse_temperature, splits, TOKENS: tl.constexpr):
    """stats (5, size): KL, old peak and log_mass, new peak and log_mass; peaks of undivided logits."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = rows < size
    plane = splits.to(tl.int64) * size
    old_peak = tl.full((TOKENS,), LOWEST, tl.float32)
    old_mass = tl.zeros((TOKENS,), tl.float32)
    peak = tl.full((TOKENS,), LOWEST, tl.float32)
    mass = tl.zeros((TOKENS,), tl.float32)
    gap = tl.zeros((TOKENS,), tl.float32)
    for split in range(splits):
        here = partials + tl.cast(split, tl.int64) * size + rows
        next_old_peak = tl.load(here, mask=inside, other=0.0)
        next_peak = tl.load(here + 2 * plane, mask=inside, other=0.0)
        old_top, top = tl.maximum(old_peak, next_old_peak), tl.maximum(peak, next_peak)
        decay = exp(old_peak - old_top, inverse_temperature)
        next_decay = exp(next_old_peak - old_top, inverse_temperature)
        old_mass = decay * old_mass + next_decay * tl.load(here + plane, mask=inside, other=1.0)
        gap = decay * gap + next_decay * tl.load(here + 4 * plane, mask=inside, other=0.0)
        mass = exp(peak - top, inverse_temperature) * mass
        mass += exp(next_peak - top, inverse_temperature) * tl.load(here + 3 * plane, mask=inside, other=1.0)
        old_peak, peak = old_top, top
    # sum p_old (ln p_old - ln p): the peaks cancel first, they are the large numbers, and the masses before their ln.
    # div_rn, because `/` multiplies by a reciprocal: x / x would not be 1, nor the KL of equal policies 0.
    kl = (gap / old_mass - (old_peak - peak)) * inverse_temperature - tl.log(tl.div_rn(old_mass, mass))
    here = stats + rows
    tl.store(here, tl.where(kl < 0, 0.0, kl), mask=inside)  # keeps NaN
    tl.store(here + size, old_peak, mask=inside)
    tl.store(here + 2 * size, tl.log(old_mass), mask=inside)
    tl.store(here + 3 * size, peak, mask=inside)
    tl.store(here + 4 * size, tl.log(mass), mask=inside)


@triton.jit
def _dkl_kernel(old_logits, logits, dlogits, bias, old_peak, old_log_mass, peak, log_mass, dkl, scale, vocab,
                inverse_temperature, HAS_BIAS: tl.constexpr, REFOLD: tl.constexpr, BLOCK: tl.constexpr):
    """dlogits (rows, vocab) = dkl (p - p_old) / (temperature scale)."""
    row = tl.program_id(0).to(tl.int64)
    here, old_here = logits + row * vocab, old_logits + row * vocab
    if REFOLD:
        row_peak, mass, _ = fold_row(here, bias, vocab, inverse_temperature, HAS_BIAS, BLOCK)
        row_old_peak, old_mass, _ = fold_row(old_here, bias, vocab, inverse_temperature, HAS_BIAS, BLOCK)
        row_log_mass, row_old_log_mass = tl.log(mass), tl.log(old_mass)
    else:
        row_peak, row_log_mass = tl.load(peak + row), tl.load(log_mass + row)
        row_old_peak, row_old_log_mass = tl.load(old_peak + row), tl.load(old_log_mass + row)
    g = tl.load(dkl + row) * (inverse_temperature / tl.load(scale))
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < vocab
        z = tl.load(here + cols, mask=inside, other=0.0)
        z_old = tl.load(old_here + cols, mask=inside, other=0.0)
        if HAS_BIAS:
            shift = tl.load(bias + cols, mask=inside, other=0.0)
            z += shift
            z_old += shift
        p = exp((z - row_peak) * inverse_temperature - row_log_mass)
        p_old = exp((z_old - row_old_peak) * inverse_temperature - row_old_log_mass)
        tl.store(dlogits + row * vocab + cols, (g * (p - p_old)).to(dlogits.dtype.element_ty), mask=inside)


def _triton_forward(old_hidden, old_weight, hidden, weight, temperature, bias) -> tuple[torch.Tensor, Stats, Stats]:
    """(KL, old stats, new stats); only peak and log_mass of the stats are there."""
    (size, dim), vocab, device = hidden.shape, weight.shape[0], hidden.device
    old_dim = old_hidden.shape[1]
    stats = torch.empty((5, size), device=device)
    if size:
        tensors = (old_hidden, old_weight, hidden, weight)
        tma = launch.takes_tma(*tensors)
        tiles = kl_tiles(hidden.dtype, launch.capability(device), reads_ragged(tma, dim, old_dim))
        shared = (old_weight.data_ptr(), old_weight.shape, old_weight.stride()) == (
            weight.data_ptr(), weight.shape, weight.stride())
        programs = launch.num_programs(device)
        splits, per_split = plan_splits(triton.cdiv(size, tiles.tokens), triton.cdiv(vocab, tiles.vocab), programs)
        partials = torch.empty((5, splits, size), device=device)
        operands = tensors
        if tma:
            operands = [TensorDescriptor.from_tensor(t, [rows, tiles.dim])
                        for t, rows in zip(tensors, (tiles.tokens, tiles.vocab) * 2, strict=True)]
        with launch.on(device):
            _partial_kl_kernel[(programs,)](
                *operands, bias, partials, size, vocab, old_dim, dim, *(t.stride(0) for t in tensors),
                1.0 / temperature, splits, per_split, SHARED=shared, HAS_BIAS=bias is not None,
                EVEN_DIM=dim % tiles.dim == 0 and old_dim % tiles.dim == 0, TMA=tma, TOKENS=tiles.tokens,
                VOCAB=tiles.vocab, DIM=tiles.dim, GROUP=tiles.group, INTERPRET=launch.INTERPRET,
                num_warps=tiles.num_warps, num_stages=tiles.num_stages)
            _merge_kl_kernel[(triton.cdiv(size, 128),)](partials, stats, size, 1.0 / temperature, splits, TOKENS=128)
    kl, old_peak, old_log_mass, peak, log_mass = stats
    return kl, Stats(kl, kl, old_peak, old_log_mass), Stats(kl, kl, peak, log_mass)


def _triton_backward(old_hidden, old_weight, hidden, weight, temperature, bias, old: Stats, new: Stats, dkl, needs):
    """(dhidden, dweight); both policies' logits are formed again."""
    vocab, device = weight.shape[0], hidden.device
    dkl = dkl.float().contiguous()
    scale = torch.ones((), device=device)
    if hidden.dtype == torch.float16 and dkl.numel():
        scale = (dkl.abs().max() / temperature).clamp(min=1e-30)
    old_logits = torch.empty(0, device=device)

    def fill(rows: slice, logits: torch.Tensor, dlogits: torch.Tensor | None) -> None:
        nonlocal old_logits
        assert dlogits is not None
        if old_logits.shape[0] < logits.shape[0] or old_logits.ndim == 1:
            old_logits = torch.empty_like(logits)
        z_old = matmul(old_hidden[rows], old_weight.T, old_logits[:logits.shape[0]])
        with launch.on(device):
            _dkl_kernel[(logits.shape[0],)](
                z_old, logits, dlogits, bias, old.peak[rows], old.log_mass[rows], new.peak[rows], new.log_mass[rows],
                dkl[rows], scale, vocab, 1.0 / temperature, HAS_BIAS=bias is not None, REFOLD=refolds(hidden.dtype),
                BLOCK=ROW_BLOCK, num_warps=ROW_WARPS)

    dhidden, dweight = head_gradients(hidden, weight, fill, needs=needs, scale=scale)
    return dhidden, None if dweight is None else dweight.to(weight.dtype)


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused, old_hidden, old_weight, hidden, weight, temperature, bias):
        forward = _triton_forward if fused else reference.linear_kl_forward
        kl, old, new = forward(old_hidden, old_weight, hidden, weight, temperature, bias)
        ctx.save_for_backward(old_hidden, old_weight, hidden, weight, bias, *old, *new)
        ctx.fused, ctx.temperature = fused, temperature
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, dkl):
        old_hidden, old_weight, hidden, weight, bias, *stats = ctx.saved_tensors
        backward = _triton_backward if ctx.fused else reference.linear_kl_backward
        dhidden, dweight = backward(
            old_hidden, old_weight, hidden, weight, ctx.temperature, bias, Stats(*stats[:4]), Stats(*stats[4:]), dkl,
            needs=ctx.needs_input_grad[3:5])
        return None, None, None, dhidden, dweight, None, None


def linear_kl(old_hidden: torch.Tensor, old_weight: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, *,
              temperature: float = 1.0, bias: torch.Tensor | None = None, backend: str | None = None) -> torch.Tensor:
    """KL(pi_old || pi_theta) of each token, summed over the whole vocabulary.

    Args:
        old_hidden: (N, D'), old_weight: (V, D'): the old policy, float32, float16 or bfloat16; no gradient.
        hidden: (N, D), weight: (V, D): the policy in training, same N, V, dtype and device as the old one.
        temperature: above 0, of both policies.
        bias: (V,) float32, at most 1e31 in size, added to both policies' logits before the division; no gradient.
        backend: None takes Triton on CUDA and the PyTorch reference elsewhere; "triton" and "torch" force one.
    Returns:
        (N,) float32, nats, >= 0, gradients to hidden and weight; exactly 0 for equal heads and hidden states.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit; the message has both.
    Memory beyond the inputs, Triton: forward 20 bytes x N x (at most 64 splits); backward as linear_logprob, and one
        more (512, V) float32. Reference: the gradients and tiles of 4M logits.
    Source: written here from the formulas in reference.py.
    """
    fused = launch.use_triton(backend, hidden.device)
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
    heads = old_hidden.detach(), old_weight.detach(), hidden, weight
    if fused:
        heads = [launch.rows_contiguous(t) for t in heads]
        bias = None if bias is None else bias.contiguous()
    return _LinearKL.apply(fused, *heads, float(temperature), None if bias is None else bias.detach())
