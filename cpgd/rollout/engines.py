"""Which engine a run samples with."""

from pathlib import Path
from typing import Any

import torch

from cosmo_rl.model.load import Processor, load_model

from ..config import DataConfig, RolloutConfig
from .engine import Engine
from .hf import HFEngine
from .vllm.server import ServerEngine


def open_engine(path: Path, processor: Processor, rollout: RolloutConfig, data: DataConfig, *, device: torch.device,
                dtype: torch.dtype, folder: Path, **options: Any) -> Engine:
    """The engine of a run, on this rank's device or in servers; all ranks open theirs together.

    Args:
        path: model folder, for the shapes; the weights come by `sync`.
        folder: for the logs of servers. options: of `load_model`.
    """
    if rollout.engine == "server":
        return ServerEngine(path, processor, rollout, data, device=device, dtype=dtype, folder=folder)
    model: Any = load_model(path, dtype=dtype, **options)
    return HFEngine(model.to(device), processor, rollout)
