"""Full weights out of a sharded policy: to the rollout engine, and to a Hugging Face folder.

Tensors go by their Hugging Face names, one at a time, so that no rank holds a second full model.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cosmo_rl.data.disk import replacing
from cosmo_rl.data.errors import UserError

from .load import Processor
from .parallel import rank, together
from .policy import Policy


@torch.no_grad()
def full_state_dict(policy: Policy, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, full tensor) of every parameter, a tied one once; all ranks must exhaust it together.

    Args:
        dtype: cast to, before the shards are gathered; None: the masters' dtype.
    Yields:
        Tensors on the policy's device, to be copied, not kept: unsharded ones share the policy's memory.
    """
    if isinstance(policy, FSDPModule):
        policy.reshard()
    for name, parameter in policy.model.named_parameters():
        tensor = parameter.detach()
        if dtype is not None:
            tensor = tensor.to(dtype)
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def load_into(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy `weights` into the parameters of the unsharded `model`, which must be the same set of names and shapes."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights:
        parameter = parameters.pop(name, None)
        assert parameter is not None, f"{name} is not in the model, or came twice"
        assert parameter.shape == tensor.shape, f"{name}: {tuple(tensor.shape)} into {tuple(parameter.shape)}"
        parameter.copy_(tensor)
    assert not parameters, f"no weights for {sorted(parameters)[:3]}"


def save_pretrained(policy: Policy, processor: Processor, folder: str | Path,
                    dtype: torch.dtype = torch.float32) -> None:
    """Write a folder that transformers loads, beside `folder`, then rename; all ranks must call it together.

    It is the folder that the stage started from, file by file, with new weights and their dtype in config.json.

    Args:
        folder: replaced if it exists; its parent is created.
        dtype: of all weights on disk; float32 is that of the masters (a frozen tower is held in the compute dtype).
    Raises:
        UserError: on every rank, when rank 0 cannot write; an earlier `folder` is then still whole.
    """
    state = {}
    for name, tensor in full_state_dict(policy, dtype):
        if rank() == 0:
            state[name] = tensor.cpu()

    def write() -> None:
        try:
            if rank() == 0:
                _write(policy, processor, Path(folder), state, dtype)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}: the model cannot be saved ({error}); free space or give another --run-dir"
                            ) from error

    together(write)


def _write(policy: Policy, processor: Processor, folder: Path, state: dict[str, torch.Tensor],
           dtype: torch.dtype) -> None:
    with replacing(folder) as new:
        new.mkdir(parents=True)
        policy.model.save_pretrained(new, state_dict=state)
        (new / "generation_config.json").unlink(missing_ok=True)  # made up; the folder's own, if any, comes below
        for name, content in processor.files.items():
            (new / name).write_bytes(content)
        (new / "config.json").write_bytes(_with_dtype(processor.files["config.json"], dtype))
        mode = (new / "config.json").stat().st_mode  # as the umask has it; safetensors writes for the owner alone
        for path in new.iterdir():
            path.chmod(mode)


def _with_dtype(config: bytes, dtype: torch.dtype) -> bytes:
    """config.json with another dtype, under the name that it has there."""
    content = json.loads(config)
    content.setdefault("dtype" if "torch_dtype" not in content else "torch_dtype")
    for part in (content, content.get("text_config"), content.get("vision_config")):
        for name in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and name in part:
                part[name] = str(dtype).removeprefix("torch.")
    return json.dumps(content, indent=2).encode() + b"\n"
