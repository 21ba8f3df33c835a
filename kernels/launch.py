"""Which backend runs, how a Triton kernel is launched, and the argument checks shared by the public functions.

Shapes, dtypes and devices are checked always (they cost nothing). Values are read only where `wants_values` says so,
because reading a CUDA tensor stalls the stream.
"""

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch


class _Absent:
    """In place of a missing Triton: kernels are still defined, and never launched."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else self


try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = _Absent()  # pyright: ignore

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's CPU interpreter: for tests. Its bfloat16 `tl.dot` is wrong, so kernels cast to float32 under this flag."""
MINIMUM_CAPABILITY = (8, 0)
LOWEST = tl.constexpr(-1e36)
"""Stands for -inf in running maxima, where (-inf) * 0 would be NaN; below the -1e30 of a banned token."""
IGNORE_INDEX = -100
INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STATISTIC_DTYPES = (torch.float32, torch.float64)


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def use_triton(backend: str | None, device: torch.device) -> bool:
    """None: Triton on CUDA, the PyTorch reference elsewhere; "triton" and "torch" force one.

    Raises:
        ValueError: no such backend, or Triton was asked for where it cannot run.
    """
    require(backend in (None, "torch", "triton"), f"backend is {backend!r}; give None, 'triton' or 'torch'")
    if backend == "torch" or (backend is None and device.type != "cuda"):
        return False
    missing = _what_triton_misses(device)
    require(backend is None or missing is None, f"backend is 'triton', but {missing}; give None or 'torch'")
    if missing is not None:
        _warn_once(missing)
    return missing is None


def _what_triton_misses(device: torch.device) -> str | None:
    if isinstance(triton, _Absent):
        return "triton is not installed (pip install triton)"
    if INTERPRET:
        return None
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability}, below {MINIMUM_CAPABILITY}"
    return None


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"cosmo_rl.kernels runs its PyTorch reference, which is slow, because {reason}", stacklevel=4)


def on(device: torch.device) -> AbstractContextManager:
    """Kernels launched inside run on `device`, whatever the current one is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def num_programs(device: torch.device) -> int:
    """Programs of a persistent kernel: one a multiprocessor; few in the interpreter, but more than one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter plays a Hopper."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last dimension is dense, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def takes_tma(*tensors: torch.Tensor) -> bool:
    """TMA descriptors need Hopper, and bases and row strides of multiples of 16 bytes."""
    return capability(tensors[0].device) >= (9, 0) and all(
        t.data_ptr() % 16 == 0 and t.stride(1) == 1 and t.stride(0) > 0 and t.stride(0) * t.element_size() % 16 == 0
        for t in tensors)


def check_backward(backward: str, tile_threshold: float) -> None:
    """Only the exact backward exists; `tile_threshold` has no part in it."""
    require(backward == "exact", f"backward is {backward!r}; this build has only 'exact'")
    require(0 <= tile_threshold < 1, f"tile_threshold is {tile_threshold}; give a probability in [0, 1)")


def check_temperature(temperature: float) -> None:
    """A positive finite number."""
    require(0 < temperature < float("inf"), f"temperature is {temperature}; give a finite value above 0")


def wants_values(check: bool | None, device: torch.device) -> bool:
    """check=None reads the values of CPU tensors only."""
    return device.type == "cpu" if check is None else check


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def check_head(hidden: torch.Tensor, weight: torch.Tensor, names: tuple[str, str] = ("hidden", "weight")) -> None:
    """hidden (N, D) and weight (V, D) of one supported dtype and one device, V and D at least 1."""
    h, w = names
    require(hidden.ndim == 2, f"{h} has shape {_shape(hidden)}; give (N, D), response tokens only")
    require(weight.ndim == 2, f"{w} has shape {_shape(weight)}; give (V, D), as nn.Linear stores it")
    require(hidden.shape[1] == weight.shape[1],
            f"{h} has shape {_shape(hidden)} and {w} {_shape(weight)}; their last dimensions must agree")
    require(weight.shape[0] > 0 and weight.shape[1] > 0, f"{w} has shape {_shape(weight)}; V and D must be at least 1")
    require(hidden.dtype in INPUT_DTYPES, f"{h} has dtype {hidden.dtype}; give one of {INPUT_DTYPES}")
    require(hidden.dtype == weight.dtype,
            f"{h} has dtype {hidden.dtype} and {w} {weight.dtype}; cast one to the other's")
    require(hidden.device == weight.device,
            f"{h} is on {hidden.device} and {w} on {weight.device}; move one to the other's device")


def check_bias(bias: torch.Tensor | None, weight: torch.Tensor, values: bool) -> None:
    """bias (V,) float32, of at most 1e31: -inf gives 0 * inf in the entropy, the lowest float32 overflows to it."""
    if bias is None:
        return
    require(bias.shape == weight.shape[:1],
            f"bias has shape {_shape(bias)} and weight {_shape(weight)}; give one bias per row of weight")
    require(bias.dtype == torch.float32, f"bias has dtype {bias.dtype}; give torch.float32")
    require(bias.device == weight.device, f"bias is on {bias.device} and weight on {weight.device}; move the bias")
    if values:
        _check_size("bias", bias, 1e31, "-1e30 to ban a token")


def check_targets(targets: torch.Tensor, hidden: torch.Tensor, vocab_size: int, values: bool) -> None:
    """targets (N,) int64 in [0, V) or IGNORE_INDEX."""
    require(targets.shape == hidden.shape[:1],
            f"targets has shape {_shape(targets)} and hidden {_shape(hidden)}; give one target per row of hidden")
    require(targets.dtype == torch.int64, f"targets has dtype {targets.dtype}; give torch.int64")
    require(targets.device == hidden.device,
            f"targets is on {targets.device} and hidden on {hidden.device}; move the targets")
    if values:
        bad = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= vocab_size))
        if bad.any():
            at = int(bad.nonzero()[0])
            raise ValueError(f"targets[{at}] is {int(targets[at])} and weight has {vocab_size} rows; "
                             f"give targets in [0, {vocab_size}) or {IGNORE_INDEX}")


def check_vector(name: str, vector: torch.Tensor, size: int, device: torch.device, *, finite: bool = False) -> None:
    """vector (size,) float32 or float64 on `device`; `finite` reads its values too."""
    require(vector.shape == (size,), f"{name} has shape {_shape(vector)}; give ({size},), one value per token")
    require(vector.dtype in STATISTIC_DTYPES, f"{name} has dtype {vector.dtype}; give one of {STATISTIC_DTYPES}")
    require(vector.device == device, f"{name} is on {vector.device} and the log-probs on {device}; move it there")
    if finite:
        _check_size(name, vector, torch.finfo(vector.dtype).max, "finite values")


def check_clip(clip_eps_low: float | torch.Tensor, clip_eps_high: float | torch.Tensor, drift_coef: float,
               drift_clip: float, size: int, device: torch.device, values: bool) -> None:
    """Clip bounds as floats or (N,) tensors, 0 <= low <= 1 and 0 <= high; drift numbers not negative."""
    for name, eps, top in (("clip_eps_low", clip_eps_low, 1.0), ("clip_eps_high", clip_eps_high, float("inf"))):
        if isinstance(eps, torch.Tensor):
            check_vector(name, eps, size, device)
            bad = ~((eps >= 0) & (eps <= top)) if values else None
            if bad is not None and bad.any():
                at = int(bad.nonzero()[0])
                raise ValueError(f"{name}[{at}] is {float(eps[at])}; give values in [0, {top}]")
        else:
            require(0 <= eps <= top, f"{name} is {eps}; give a value in [0, {top}]")
    require(0 <= drift_coef < float("inf"), f"drift_coef is {drift_coef}; give a finite value of at least 0")
    require(drift_clip >= 0, f"drift_clip is {drift_clip}; give a value of at least 0")


def _check_size(name: str, vector: torch.Tensor, most: float, mend: str) -> None:
    bad = ~(vector.abs() <= most)  # of NaN too
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"{name}[{at}] is {float(vector[at])}; give {mend}")
