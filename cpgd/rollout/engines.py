"""Which engine a run samples with."""

from pathlib import Path
from typing import Any

import torch

from cosmo_rl.model.load import Processor, unfilled_model

from ..config import DataConfig, RolloutConfig
from .engine import Engine
from .hf import HFEngine
from .vllm.local import LocalEngine
from .vllm.server import ServerEngine


def open_engine(path: Path, processor: Processor, rollout: RolloutConfig, data: DataConfig, *, device: torch.device,
                dtype: torch.dtype, folder: Path, **options: Any) -> Engine:
    """The engine of a run, on this rank's device or in servers; all ranks open theirs together.

    Args:
        path: model folder; the weights come by `sync`.
        folder: for the logs of servers. options: of `unfilled_model`.
    """
    if rollout.engine == "server":
        return ServerEngine(path, processor, rollout, data, device=device, dtype=dtype, folder=folder)
    if rollout.engine == "vllm":
        return LocalEngine(path, processor, rollout, data, device=device, dtype=dtype)
    return HFEngine(unfilled_model(processor.config, device=device, dtype=dtype, **options), processor, rollout)
