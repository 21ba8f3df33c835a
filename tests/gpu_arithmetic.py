"""Triton's interpreter with what a GPU computes otherwise: exponentials, quotients, fused multiply-adds, tensor cores.

numpy rounds every operation of float32 correctly, and a kernel that is right only then passes on a CPU and fails on a
GPU. Sources: PTX ISA, ex2.approx (relative error up to 2^-22) and div.full (2 ulp: a reciprocal, multiplied); Fasi et
al. 2021, "Numerical behavior of NVIDIA tensor cores" (products exact, sums truncated).
"""

import numpy as np
import torch

TERMS = 16
"""Products that a tensor core adds to its accumulator at once."""


def install(monkeypatch) -> None:
    """Change the interpreter, and the 16-bit products that the Triton backends leave to torch, until the test ends."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from cosmo_rl.kernels import gemm, linear_kl

    multiply, divide, add, subtract = (getattr(InterpreterBuilder, f"create_f{name}")
                                       for name in ("mul", "div", "add", "sub"))
    dot = InterpreterBuilder.create_dot

    def create_exp2(self, arg):
        return self.unary_op(arg, exp2)

    def create_fdiv(self, a, b):  # div_rn is create_precise_divf, and not this
        if a.data.dtype != np.float32:
            return divide(self, a, b)
        return TensorHandle(a.data * (np.float32(1) / b.data), a.dtype.scalar)

    def create_fmul(self, a, b):
        out = multiply(self, a, b)
        if out.data.dtype == np.float32:
            out.factors = a.data.astype(np.float64), b.data.astype(np.float64)
        return out

    def contracted(plain, sign):
        def create(self, a, b):
            out = plain(self, a, b)
            if out.data.dtype == np.float32 and hasattr(a, "factors"):
                out.data = np.asarray(np.prod(np.broadcast_arrays(*a.factors), axis=0) + sign * b.data, np.float32)
            elif out.data.dtype == np.float32 and hasattr(b, "factors"):
                out.data = np.asarray(a.data + sign * np.prod(np.broadcast_arrays(*b.factors), axis=0), np.float32)
            return out

        return create

    def create_dot(self, a, b, d, *settings):
        if not (holds_16_bits(a.data) and holds_16_bits(b.data)):
            return dot(self, a, b, d, *settings)
        return TensorHandle(tensor_core(a.data, b.data, d.data), d.dtype.scalar)

    for name, method in (("exp2", create_exp2), ("fmul", create_fmul), ("fdiv", create_fdiv),
                         ("fadd", contracted(add, 1)), ("fsub", contracted(subtract, -1)), ("dot", create_dot)):
        monkeypatch.setattr(InterpreterBuilder, f"create_{name}", method)

    plain, plain_add = gemm.matmul, gemm.add_matmul

    def matmul(a, b, out):
        return plain(a, b, out) if a.dtype == torch.float32 else out.copy_(product(a, b, torch.zeros_like(out)))

    def add_matmul(out, a, b):
        return plain_add(out, a, b) if a.dtype == torch.float32 else out.copy_(product(a, b, out))

    for module in (gemm, linear_kl):
        monkeypatch.setattr(module, "matmul", matmul)
    monkeypatch.setattr(gemm, "add_matmul", add_matmul)


def exp2(x: np.ndarray) -> np.ndarray:
    """2^x with a relative error of up to 2^-22.5 that depends on the bits of x alone, and none at 0."""
    if x.dtype != np.float32:
        return np.exp2(x)
    mixed = np.asarray(x).view(np.uint32).astype(np.uint64) * np.uint64(2654435761) & np.uint64(0xFFFFFFFF)
    mixed = (mixed ^ mixed >> np.uint64(15)) * np.uint64(2246822519) >> np.uint64(8) & np.uint64(0xFFFF)
    error = (mixed.astype(np.float64) / 32767.5 - 1) * 2.0 ** -22.5 * (x != 0)
    return (np.exp2(x.astype(np.float64)) * (1 + error)).astype(np.float32)


def tensor_core(a: np.ndarray, b: np.ndarray, accumulator: np.ndarray) -> np.ndarray:
    """accumulator + a @ b, float32: TERMS exact products and the accumulator are summed, and truncated."""
    a, b, total = a.astype(np.float64), b.astype(np.float64), accumulator.astype(np.float32)
    for k in range(0, a.shape[1], TERMS):
        exact = total + a[:, k:k + TERMS] @ b[k:k + TERMS]
        nearest = exact.astype(np.float32)
        total = np.where(np.abs(nearest) > np.abs(exact), np.nextafter(nearest, np.float32(0)), nearest)
    return total


def holds_16_bits(values: np.ndarray) -> bool:
    """Whether float32 values were bfloat16 or float16 ones: kernels cast those for the interpreter's `tl.dot`."""
    if values.dtype != np.float32:
        return False
    bits = np.ascontiguousarray(values).view(np.uint32)
    with np.errstate(over="ignore"):
        return bool((bits & 0xFFFF == 0).all() or (values == values.astype(np.float16)).all())


def product(a: torch.Tensor, b: torch.Tensor, accumulator: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(tensor_core(a.detach().float().numpy(), b.detach().float().numpy(), accumulator.numpy()))
