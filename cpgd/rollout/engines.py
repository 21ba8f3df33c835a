"""Which engine a run samples with."""

from pathlib import Path
from typing import Any

import torch

from cosmo_rl.model.load import Processor, load_model

from ..config import RolloutConfig
from .engine import Engine
from .hf import HFEngine


def open_engine(path: Path, processor: Processor, rollout: RolloutConfig, *, device: torch.device, dtype: torch.dtype,
                **options: Any) -> Engine:
    """The engine of a run, on this rank's device.

    Args:
        path: model folder, for the shapes; the weights come by `sync`. options: of `load_model`.
    """
    model: Any = load_model(path, dtype=dtype, **options)
    return HFEngine(model.to(device), processor, rollout)
