"""Products around the fused kernels: logits by chunks of tokens, and the gradients of head and hidden states from them.

16-bit operands are multiplied by cuBLAS with float32 results (logits are never rounded; dW is one float32 accumulator,
each row of dX one product over the whole vocabulary); float32 operands in float32, not tf32.

Two levels of chunks: float32 logits of INNER_ROWS tokens at a time, and their gradients, in the operands' dtype, of as
many tokens as SCRATCH_BYTES holds, because every further chunk reads and writes the whole dW accumulator once more.
"""

from collections.abc import Callable

import torch

from .reference import full_precision

INNER_ROWS = 512
"""Fills an H100 many times over at a vocabulary of 150,000."""
SCRATCH_BYTES = 1_420_000_000
"""Logits and their gradients; with the float32 piece of dX the 7B head stays under 1.5 GB."""

Fill = Callable[[slice, torch.Tensor, torch.Tensor | None], None]


def plan_chunks(size: int, vocab_size: int, itemsize: int) -> tuple[int, int]:
    """(outer, inner) tokens of a chunk; outer is a multiple of inner unless it is all of them."""
    inner = max(1, min(size, INNER_ROWS, SCRATCH_BYTES // 2 // (4 * vocab_size)))
    outer = (SCRATCH_BYTES - 4 * inner * vocab_size) // (itemsize * vocab_size) // inner * inner
    return min(size, max(outer, inner)), inner


def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = a @ b in float32; a and b float32, float16 or bfloat16."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def add_matmul(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """out += a @ b in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    return out.addmm_(a.float(), b.float())


@torch.no_grad()
def head_gradients(hidden: torch.Tensor, weight: torch.Tensor, fill: Fill, *, needs: tuple[bool, bool],
                   ignored: torch.Tensor | None = None, scale: torch.Tensor | None = None,
                   dtype: torch.dtype | None = None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Walk all tokens: logits of a chunk, their gradient by `fill`, and the two products that spend it.

    Args:
        hidden, weight: (N, D) and (V, D), one dtype and device, rows contiguous.
        fill: fill(rows, logits, dlogits) is given float32 `hidden[rows] @ weight.T` (it may overwrite it) and writes
            the gradient with respect to it, divided by `scale`, to `dlogits` in the operands' dtype, which is None
            when nobody needs it.
        needs: whether hidden and weight need a gradient; without one its product is not computed.
        ignored: (N,) bool, rows whose dlogits are 0 and whose hidden states may be NaN.
        scale: () float32; float16 would round small gradients to 0.
        dtype: of dhidden; that of `hidden` if None.
    Returns:
        (dhidden (N, D) in `dtype`, dweight (V, D) float32); None where not needed.
    Memory: SCRATCH_BYTES, one float32 (outer, D) and the results.
    """
    (size, dim), vocab_size = hidden.shape, weight.shape[0]
    device, any_grad = hidden.device, any(needs)
    dhidden = hidden.new_zeros((size, dim), dtype=dtype or hidden.dtype) if needs[0] else None
    if not size:
        return dhidden, torch.zeros((vocab_size, dim), device=device) if needs[1] else None
    dweight = torch.empty((vocab_size, dim), device=device) if needs[1] else None
    outer, inner = plan_chunks(size, vocab_size, hidden.element_size())
    logits = torch.empty((inner, vocab_size), device=device)
    dlogits = hidden.new_empty((outer, vocab_size)) if any_grad else None
    with full_precision(device):
        for start in range(0, size, outer):
            stop = min(start + outer, size)
            for first in range(start, stop, inner):
                rows = slice(first, min(first + inner, stop))
                chunk = matmul(hidden[rows], weight.T, logits[:rows.stop - first])
                fill(rows, chunk, None if dlogits is None else dlogits[first - start:rows.stop - start])
            if dlogits is None:
                continue
            spent = dlogits[:stop - start]
            if dhidden is not None:
                product = matmul(spent, weight, torch.empty((stop - start, dim), device=device))
                dhidden[start:stop] = product if scale is None else product.mul_(scale)
                del product  # or it would live beside the next chunk's
            if dweight is not None:
                states = hidden[start:stop]
                if ignored is not None:  # 0 * NaN
                    states = states.masked_fill(ignored[start:stop, None], 0.0)
                if start:
                    add_matmul(dweight, spent.T, states)
                else:  # neither zeros to write nor a sum of 2 GB to read
                    matmul(spent.T, states, dweight)
                del states
    if dweight is not None and scale is not None:
        dweight.mul_(scale)
    return dhidden, dweight
