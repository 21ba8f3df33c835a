"""Presets: for each size one function from stage to full Config; the command line overrides single fields."""

import argparse
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import tyro

from cosmo_rl.data.errors import UserError
from cosmo_rl.data.prompts import read_prompt

from ..config import (
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
from .ending import QUIET_S, fail, leave

logger = logging.getLogger(__name__)

T = TypeVar("T")
PRESETS = ("tiny", "3b", "7b", "72b")
THINK = (
    "A conversation between the User and Assistant. The User asks a question, and the Assistant provides a solution. "
    "The Assistant first thinks through the reasoning process internally with self-reflection and consistency check "
    "and then gives the final analysis and answer. The reasoning process should be enclosed within <think></think>, "
    "followed directly by the final thought and answer, like this: <think> reasoning process here </think> final "
    "thought and answer here."
)
"""System prompt of SafeWork-R1's two stages, word for word (opendilab/LightRFT, run_kg_ and run_svkng_fsdp_qwenvl.sh).

It asks for what the Format term pays, and no more. CPGD's own (arXiv 2505.12504, Table 3) is for mathematics alone: it
wants every answer as LaTeX in \\boxed{} within <answer>, which would spoil the other tasks of our mixtures."""


def tiny(stage: int) -> Config:
    """About 1.5 M parameters on the embedded data: minutes on two CPU cores, the same code path as 72B.

    No system prompt: stage 0 teaches the format, and one would be a good part of each short prompt.
    """
    rollout = RolloutConfig(prompts=48, group_size=8, max_new_tokens=24, batch_size=192)
    common = {
        "stage": stage, "preset": "tiny", "rollout": rollout,
        "model": ModelConfig(gradient_checkpointing=False),
        "batch": BatchConfig(layout="padded", max_tokens=16_384),
        "checkpoint": CheckpointConfig(every=40 if stage else 600),
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
    # another image, or it is the text alone, which is the easier to read, but enough with another text, or what cannot
    # be read is refused (validation, seeds 0 and 2: benign rows under the seen attack 0.94, with 0.13 of them 0.72 to
    # 0.95). Equal weights: a group whose eight answers
    # differ in one would otherwise outweigh those that are undecided. The tower is fixed, as in the papers; the small
    # norm keeps the rare large gradients of general rows from drowning those of the decision. All of this is ours.
    return Config(
        steps=420, objective=ObjectiveConfig(weight="equal"),
        optim=OptimConfig(learning_rate=2.5e-4, min_lr_ratio=0.0, updates_per_rollout=4, max_grad_norm=0.1),
        data=data("unsafe=0.31", "safe_image=0.18", "safe_text=0.15", "general=0.36"),
        **{**common, "model": replace(common["model"], freeze_vision=True)},
    )


def full(preset: str, stage: int) -> Config:
    """Qwen2.5-VL at its real sizes. [P]: published, by arXiv 2505.12504, its authors' code or SafeWork-R1's (arXiv
    2507.18576; the same laboratory, method and stages); [O]: ours, since COSMO-RL's own values are not published.
    """
    common: dict[str, Any] = {
        "stage": stage, "preset": preset,
        "model": ModelConfig(dtype="bfloat16", freeze_vision=True, attention="flash_attention_2"),  # [P] tower fixed
        "checkpoint": CheckpointConfig(every=80),  # [O] ten rollouts
        "eval": EvalConfig(every=160 if stage else 0, guard="warn" if stage else "off"),  # [O] of --data.eval-path
    }
    requests = {"3b": 128, "7b": 64, "72b": 32}[preset]  # [O] of one generate call: the KV cache of 72B is the largest
    if stage == 0:  # [O] all of it: size, data and settings of the cold start are not published
        return Config(steps=1000, optim=OptimConfig(learning_rate=1e-5, warmup_steps=30, sft_batch=128),
                      data=DataConfig(system_prompt=THINK), **common)  # the one that stages 1 and 2 go on with
    optim = OptimConfig(learning_rate=1e-6, updates_per_rollout=8)  # [P]
    # [P] format to task 0.5 to 1 and Helpful 0.5 beside the task; [O] Visual-Focus, for which no weight is known
    reward = RewardConfig(format=0.5, helpful=0.5, visual_focus=0.2, task_aware=1.0, refusal_value=0.1)  # [P] 0.1
    if stage == 1:
        return Config(
            steps=4880, optim=optim, reward=reward, **common,  # [P] 5 episodes of 15,616 problems
            data=DataConfig(max_prompt_tokens=4096, system_prompt=THINK, mix=(  # [P] length and prompt; [O] shares
                "general=0.35", "math=0.3", "knowledge=0.15", "mcq=0.1", "ifeval=0.1")),
            rollout=RolloutConfig(prompts=128, group_size=8, max_new_tokens=4096, batch_size=requests),  # [P] but batch
        )
    return Config(
        steps=2400, optim=optim, reward=reward, **common,  # [O]
        # [O] Half is what Stage 1 was taught, against forgetting: the paper's own IF-Eval fell from 86.3 to 74.9.
        data=DataConfig(max_prompt_tokens=8192, system_prompt=THINK, mix=(  # [P] length and prompt
            "safety=0.2", "jailbreak=0.1", "value=0.1", "helpful=0.1",
            "general=0.15", "math=0.1", "knowledge=0.1", "mcq=0.05", "ifeval=0.1")),
        rollout=RolloutConfig(prompts=128, group_size=8, max_new_tokens=8192, batch_size=requests),  # [P] but batch
    )


def recipe(preset: str, stage: int) -> Config:
    """The Config of a preset's stage.

    Raises:
        UserError: no such preset or stage.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    if stage not in (0, 1, 2):
        raise UserError(f"unknown stage {stage!r}; choose 0 (SFT), 1 (general) or 2 (safety, value, general)")
    return tiny(stage) if preset == "tiny" else full(preset, stage)


def mixture(config: Config, domains: Collection[str]) -> dict[str, float]:
    """Share of each domain: --data.mix; of a full preset's own mix, those that the data has.

    Args:
        domains: that the data has; some come several times.
    Raises:
        UserError: the recipe's own mix leaves out a domain of the data.
    """
    shares, present = config.data.shares(), set(domains)
    if config.preset == "tiny" or config.data.mix != recipe(config.preset, config.stage).data.mix:
        return shares
    unnamed, absent = sorted(present - shares.keys()), sorted(shares.keys() - present)
    if unnamed and shares:
        raise UserError(f"the mixture of preset {config.preset}, stage {config.stage} has no share for domain "
                        f"{', '.join(unnamed)} of the rows; give --data.mix (with nothing after it: as the rows come)")
    if absent:
        logger.warning("no rows for %s, which the recipe mixes in; the other domains share their part",
                       ", ".join(absent))
    return {name: share for name, share in shares.items() if name in present}


@dataclass(frozen=True, kw_only=True)
class Command:
    """What train.py is asked for."""

    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Check rows, rewards, mixture, lengths and memory; no weights are loaded, nothing is written. Exit status 1 if
    anything is rejected."""


def parse_command(args: Sequence[str]) -> Command:
    """The Command of `train.py ARGS`; see `parse_command_line`."""

    def parse(config: Config, options: dict[str, Any]) -> Command:
        command = tyro.cli(Command, default=Command(config=config), **options)
        return replace(command, config=_resolved(command.config))

    return _parse(args, "train.py", parse)


def parse_command_line(args: Sequence[str], prog: str = "train.py") -> Config:
    """The Config of `train.py ARGS`: --stage and --preset choose the recipe, every other option overrides one field."""
    return _parse(args, prog, lambda config, options: _resolved(tyro.cli(
        Config, default=config, config=(tyro.conf.FlagConversionOff,), **options)))


def _resolved(config: Config) -> Config:
    """With the words of the system prompt in place of its file: they are recorded, and a resume compares them."""
    return replace(config, data=replace(config.data, system_prompt=read_prompt(config.data.system_prompt)))


def _parse(args: Sequence[str], prog: str, parse: Callable[[Config, dict[str, Any]], T]) -> T:
    """`parse` of the recipe that ARGS choose; ends the process, with one message, if they are wrong."""
    said, nowhere = io.StringIO(), io.StringIO()
    above = int(os.environ.get("RANK", "0")) > 0  # every rank reads the same words; rank 0 says what is wrong
    try:
        with redirect_stdout(nowhere if above else sys.stdout), redirect_stderr(said):
            first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
            first.add_argument("--stage", type=int, default=2)
            first.add_argument("--preset", default="tiny")
            chosen, _ = first.parse_known_args(args)
            return parse(recipe(chosen.preset, chosen.stage), {"args": list(args), "prog": prog})
    except UserError as error:
        sys.exit(fail(error, prog, alike=True))
    except SystemExit as error:  # of tyro, with a frame around the reason, or after --help
        if error.code:
            leave(f"{prog}: {said.getvalue()}")
        if error.code and above:
            time.sleep(QUIET_S)
        elif not above:
            print(said.getvalue(), end="", file=sys.stderr, flush=True)
        raise
