"""Presets: for each size one function from stage to full Config; the command line overrides single fields."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import Any

import tyro

from .config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
)

PRESETS = ("tiny", "3b", "7b", "72b")


def tiny(stage: int) -> Config:
    """About 1.5 M parameters on the embedded data: minutes on two CPU cores, the same code path as 72B."""
    rollout = RolloutConfig(prompts=48, group_size=8, max_new_tokens=24, batch_size=192, canary_limit=0.05)
    common = {
        "stage": stage, "preset": "tiny", "rollout": rollout,
        "model": ModelConfig(gradient_checkpointing=False),
        "batch": BatchConfig(layout="padded", max_tokens=16_384),
        "checkpoint": CheckpointConfig(every=40 if stage else 600),
        "eval": EvalConfig(batch_size=384),
    }
    data = lambda *mix: DataConfig(mix=mix, resize_pixels=56 * 56, max_prompt_tokens=512)
    if stage == 0:
        return Config(
            steps=1800, optim=OptimConfig(learning_rate=1.2e-3, warmup_steps=50, sft_batch=64, min_lr_ratio=0.02),
            data=data("caption=0.5", "general=0.3", "unsafe=0.07", "safe_image=0.065", "safe_text=0.065"), **common,
        )
    if stage == 1:
        optim = OptimConfig(learning_rate=1e-4, min_lr_ratio=0.0, updates_per_rollout=4)
        return Config(steps=60, optim=optim, data=data("general=1"), **common)
    # As many unsafe rows as safe ones, or the first thing learnt is one answer for all; among these, more twins with
    # another image, or it is the text alone, which is the easier to read. Equal weights: a group whose eight answers
    # differ in one would otherwise outweigh those that are undecided. The tower is fixed, as in the papers; the small
    # norm keeps the rare large gradients of general rows from drowning those of the decision. All of this is ours.
    return Config(
        steps=420, objective=ObjectiveConfig(weight="equal"),
        optim=OptimConfig(learning_rate=2.5e-4, min_lr_ratio=0.0, updates_per_rollout=4, max_grad_norm=0.1),
        data=data("unsafe=0.31", "safe_image=0.20", "safe_text=0.13", "general=0.36"),
        **{**common, "model": replace(common["model"], freeze_vision=True)},
    )


def full(preset: str, stage: int) -> Config:
    """Qwen2.5-VL at its real sizes. Rollout, group, learning rate and updates as in the paper; see config.py."""
    optim = OptimConfig(learning_rate=1e-5, warmup_steps=20) if stage == 0 else OptimConfig(learning_rate=1e-6)
    place: dict[str, Any] = {"stage": stage, "preset": preset}
    return Config(
        **place, steps=1000, optim=optim,
        model=ModelConfig(dtype="bfloat16", freeze_vision=True, attention="flash_attention_2"),
        reward=RewardConfig(refusal_value=0.1), objective=ObjectiveConfig(),
        rollout=RolloutConfig(prompts=128, group_size=8, max_new_tokens=4096),
    )


def recipe(preset: str, stage: int) -> Config:
    """The Config of a preset's stage.

    Raises:
        ValueError: no such preset or stage.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    if stage not in (0, 1, 2):
        raise ValueError(f"unknown stage {stage!r}; choose 0 (SFT), 1 (general) or 2 (safety, value, general)")
    return tiny(stage) if preset == "tiny" else full(preset, stage)


def parse_command_line(args: Sequence[str]) -> Config:
    """The Config of `train.py ARGS`: --stage and --preset choose the recipe, every other option overrides one field."""
    quiet = int(os.environ.get("RANK", "0")) > 0  # every rank reads the same words; rank 0 says what is wrong
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if quiet else sys.stdout), \
            redirect_stderr(nowhere if quiet else sys.stderr):
        try:
            return _parse(args)
        except ValueError as error:
            sys.exit(1 if quiet else f"train.py: {error}")


def _parse(args: Sequence[str]) -> Config:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage", type=int, default=2)
    first.add_argument("--preset", default="tiny")
    chosen, _ = first.parse_known_args(args)
    return tyro.cli(Config, default=recipe(chosen.preset, chosen.stage), args=list(args), prog="train.py",
                    config=(tyro.conf.FlagConversionOff,))
