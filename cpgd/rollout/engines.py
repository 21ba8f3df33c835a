"""Which engine a run samples with."""

from pathlib import Path
from typing import Any

import torch

from cosmo_rl.model.load import Processor, unfilled_model

from ..config import RolloutConfig
from .engine import Engine
from .hf import HFEngine


def open_engine(path: Path, processor: Processor, rollout: RolloutConfig, *, device: torch.device, dtype: torch.dtype,
                **options: Any) -> Engine:
    """The engine of a run, on this rank's device.

    Args:
        path: model folder; the weights come by `sync`. options: of `unfilled_model`.
    """
    return HFEngine(unfilled_model(processor.config, device=device, dtype=dtype, **options), processor, rollout)
