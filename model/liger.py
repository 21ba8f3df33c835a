"""Liger's Triton kernels for what stands between attention and head on CUDA: RMSNorm, SwiGLU, M-RoPE.

Liger's own patch of Qwen2.5-VL is not used: it does not import beside transformers 5.23, and it replaces an M-RoPE
function that this release no longer has. There cos and sin arrive with the three sections merged, so that the plain
rotary kernel is the M-RoPE kernel.
"""

# A replaced forward may name its parameters otherwise.
# pyright: reportAttributeAccessIssue=false

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from cosmo_rl.data.errors import MissingPackage, UserError
from cosmo_rl.kernels.launch import INTERPRET

_PLAIN_ROTARY = modeling_qwen2_5_vl.apply_rotary_pos_emb


def wants_liger(setting: str, device: torch.device) -> bool:
    """auto: on CUDA, if liger-kernel is installed; on: an error where it is not; off: never.

    Raises:
        UserError: it was asked for on a device without Triton, or is not installed.
    """
    if setting == "off" or (setting == "auto" and device.type != "cuda"):
        return False
    if setting == "on" and device.type != "cuda":
        raise UserError(f"--model.liger on needs a GPU, and this run is on {device}; give auto or off")
    if find_spec("liger_kernel") is None:
        if setting == "on":
            raise MissingPackage("--model.liger on needs liger-kernel: pip install liger-kernel, or give auto or off")
        return False
    return True


def use_liger(model: nn.Module) -> None:
    """Let the language model's norms, MLPs and rotary positions, and the tower's norms, run Liger's kernels.

    Args:
        model: a Qwen2_5_VLForConditionalGeneration; parameters and state dict stay as they are. The rotary function is
            transformers' own global: CPU tensors still take the plain one.
    Raises:
        MissingPackage: liger-kernel is not installed.
    """
    try:
        from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction
    except ImportError as error:
        raise MissingPackage("liger kernels need liger-kernel: pip install liger-kernel") from error

    def norm(module: Any, states: torch.Tensor) -> torch.Tensor:
        # Not in place: the backward would overwrite a gradient that the residual stream still needs.
        return LigerRMSNormFunction.apply(states, module.weight, module.variance_epsilon, 0.0, "llama", False)

    def swiglu(module: Any, states: torch.Tensor) -> torch.Tensor:
        return module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(states), module.up_proj(states)))

    def rotary(q, k, cos, sin, unsqueeze_dim=1):
        if not (q.is_cuda or INTERPRET):
            return _PLAIN_ROTARY(q, k, cos, sin, unsqueeze_dim)
        return LigerRopeFunction.apply(q, k, cos, sin, None, unsqueeze_dim)

    for module in model.modules():
        if isinstance(module, modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm):
            module.forward = partial(norm, module)
        elif isinstance(module, modeling_qwen2_5_vl.Qwen2MLP):
            assert module.config.hidden_act == "silu", module.config.hidden_act
            module.forward = partial(swiglu, module)
    modeling_qwen2_5_vl.apply_rotary_pos_emb = rotary
