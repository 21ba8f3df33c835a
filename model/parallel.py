"""Processes and sharding: one FSDP2 policy on 1 to 64 ranks, the same code on one CPU process.

The loss is a sum over tokens whose weights already hold the global normaliser, so gradients are summed over ranks and
never divided. Parameters are sharded per decoder layer and per vision block; embedding, head, patch embedding and
merger form the root's group, which keeps a tied head tied. A frozen tower is replicated: no collective in it.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cosmo_rl.data.errors import UserError

from .policy import Policy

T = TypeVar("T")
_thread = threading.local()


def init_distributed() -> torch.device:
    """Join the process group of torchrun, or form one of a single process; returns this rank's device.

    NCCL for CUDA tensors and gloo for CPU tensors when a GPU is there, else gloo alone.

    Raises:
        UserError: the host has fewer GPUs than ranks.
    """
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise UserError(f"LOCAL_RANK is {local}, and this host shows {count} GPUs; give --nproc-per-node {count}, "
                            "or hide them (CUDA_VISIBLE_DEVICES=) to run on the CPU")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        # First choice on Hopper since torch 2.11: NaN gradients where there is a mask and the length % 128 is 64
        # (pytorch issue 196678), and a graph of its own, built in 30 ms, for every length of the KV cache.
        torch.backends.cuda.enable_cudnn_sdp(False)
        backend = "cpu:gloo,cuda:nccl"
    if dist.is_initialized():
        return device
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return device


def close_distributed() -> None:
    """Leave the process group; only where all ranks have succeeded, or one may wait here for another."""
    if dist.is_initialized():
        dist.barrier()  # or the first to leave may break a connection that another still reads from
        dist.destroy_process_group()


def together(action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank; all ranks must call it.

    Returns:
        The value of each rank, by rank. Works without torch.distributed too: one value.
    Raises:
        UserError: on every rank, the message of the first rank whose action raised UserError, so that none hangs; on
            that rank the error itself.
    """
    value, problem = None, None
    try:
        value = action()
    except UserError as error:
        problem = error
    mine = (value, None if problem is None else str(problem))
    outcomes: list[Any] = [mine] * world()
    if world() > 1:
        dist.all_gather_object(outcomes, mine, group=getattr(_thread, "group", None))
    for _, found in outcomes:
        if found is not None:
            raise problem if problem is not None and str(problem) == found else UserError(found)
    return [cast(T, value) for value, _ in outcomes]


@contextmanager
def beside(group: Any) -> Iterator[None]:
    """`together` of this thread by a group of its own: ranks would else meet each other in different calls."""
    _thread.group = group
    try:
        yield
    finally:
        del _thread.group


def agree(value: str, complaint: str) -> None:
    """All ranks hold the same `value`, which each has read of its host's files; all ranks must call it.

    Raises:
        UserError: `complaint`, on every rank.
    """
    if len(set(together(lambda: value))) > 1:
        raise UserError(complaint)


def on_main(action: Callable[[], object]) -> None:
    """Run `action` on rank 0; all ranks must call it.

    Raises:
        UserError: on every rank, what `action` raised as UserError or, for a full disk or a missing right, OSError.
    """
    def guarded() -> None:
        if rank():
            return
        try:
            action()
        except OSError as error:
            raise UserError(
                f"cannot write {error.filename or 'the run directory'}: {error.strerror or error}; free space or make "
                "it writable, then repeat the command to continue from the last checkpoint"
            ) from error

    together(guarded)


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(policy: Policy, *, device: torch.device, dtype: torch.dtype, freeze_vision: bool) -> Policy:
    """Apply FSDP2 to `policy` in place; all ranks must hold equal float32 weights and call it together.

    Args:
        device: where this rank computes.
        dtype: of weights and activations in forward and backward; masters and gradients stay float32.
        freeze_vision: the tower needs no gradient (`load_model` set it so) and stays replicated, in `dtype`.
    """
    policy.to(device)
    visual, text = policy.model.model.visual, policy.model.model.language_model
    frozen = {p for p in visual.parameters() if not p.requires_grad}
    assert bool(frozen) == freeze_vision, "freeze_vision and the parameters' requires_grad disagree"
    for parameter in frozen:
        parameter.data = parameter.data.to(dtype)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world(),)),
        # Inputs are not cast: that would round old log-probs and advantages to bfloat16.
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    for block in [*text.layers, *([] if freeze_vision else visual.blocks)]:
        fully_shard(block, **options)
    fully_shard(policy, ignored_params=frozen, **options)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other scaled reduction
    policy.register_forward_hook(_reshard_after_inference)
    return policy


def _reshard_after_inference(policy: nn.Module, _inputs: Any, _output: Any) -> None:
    # FSDP leaves the root gathered for a backward; without one, the next optimizer step would not reach those copies.
    if not torch.is_grad_enabled() and isinstance(policy, FSDPModule):
        policy.reshard()


def clip_grad_norm(policy: Policy, max_norm: float) -> float:
    """Scale the gradients to a global 2-norm of at most `max_norm`; all ranks must call it together.

    Returns:
        The norm before, summed in float64, the same on all ranks. If it is not finite the gradients are left as they
        are, and the caller skips the step on all ranks.
    """
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    # [sum of squares of sharded gradients, of replicated ones]
    squares = torch.zeros(2, dtype=torch.float64, device=policy.head.bias.device)
    for gradient, part in zip(gradients, local, strict=True):
        square = torch.linalg.vector_norm(part, dtype=torch.float64).square()
        squares[0 if isinstance(gradient, DTensor) else 1] += square
    if world() > 1:
        dist.all_reduce(squares[:1])
    norm = squares.sum().sqrt().item()
    if max_norm < norm < float("inf"):
        for part in local:
            part.mul_(max_norm / norm)
    return norm
