"""Where a stage starts from, and the rows it trains on."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cosmo_rl.data.collate import check_prompt
from cosmo_rl.data.dataset import load_rows
from cosmo_rl.data.disk import replacing
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.prepare.contamination import Report, drop_contaminated, find_contaminated, load_evaluation_sets
from cosmo_rl.data.prepare.mini import mini_rows, mini_texts
from cosmo_rl.data.schema import Row
from cosmo_rl.model.load import Processor
from cosmo_rl.model.parallel import on_main
from cosmo_rl.model.tiny import TINY_PATH, build_tiny

from ..config import Config, DataConfig
from ..sft import chosen_ids
from .rundir import RunDir

logger = logging.getLogger(__name__)


def start_path(config: Config, run: RunDir) -> Path:
    """Folder the stage starts from: --model.path, else the previous stage's hf/ of this run, else the preset's own.

    Raises:
        UserError: the preset ships no weights and none were given.
    """
    found = given_path(config, run.path)
    if found:
        return found
    fresh = run.stage_dir / "init"

    def build() -> None:
        if not (fresh / "preprocessor_config.json").exists():
            with replacing(fresh) as beside:
                build_tiny(mini_texts(), config.seed, beside)

    on_main(build)
    return fresh


def given_path(config: Config, run: Path) -> Path | None:
    """`start_path` in run directory `run`; None where the model must be built first: stage 0 of `tiny`."""
    if config.model.path:
        return Path(config.model.path)
    previous = run / f"stage{config.stage - 1}" / "hf"
    if config.stage > 0 and previous.is_dir():
        return previous
    if config.preset != "tiny":
        raise UserError(f"preset {config.preset} has no weights of its own and {previous} does not exist; give a "
                        "local Qwen2.5-VL folder with --model.path")
    return TINY_PATH if config.stage > 0 else None


def prompt_files(path: Path) -> list[str]:
    """The files of the model folder `path` that decide a prompt's tokens and where a response ends."""
    return [name for name in ("tokenizer.json", "preprocessor_config.json", "config.json", "tokenizer_config.json",
                              "chat_template.jinja", "chat_template.json", "generation_config.json")
            if (path / name).is_file()]


def model_fingerprint(path: Path) -> str:
    """16 hex digits over the `prompt_files` of the model folder `path`."""
    digest = hashlib.blake2b(digest_size=8)
    for name in prompt_files(path):
        digest.update(hashlib.blake2b((path / name).read_bytes()).digest())
    return digest.hexdigest()


class RowSize(NamedTuple):
    """What a row takes of the budgets, in tokens."""

    prompt: int
    """Image tokens included."""
    image: int
    response: int
    """Of `chosen` in stage 0, else the longest there may be."""


def row_size(row: Row, config: Config, processor: Processor) -> RowSize:
    """The row's size, from its text and the headers of its images.

    Raises:
        UserError: its prompt is over --data.max-prompt-tokens, or with the response over --batch.max-tokens; or stage
            0 cannot imitate its `chosen`.
    """
    prompt, image = check_prompt(row, processor, max_prompt_tokens=config.data.max_prompt_tokens,
                                 system_prompt=config.data.system_prompt)
    response = len(chosen_ids(row, processor)) if config.stage == 0 else config.rollout.max_new_tokens
    if prompt + response > config.batch.max_tokens:
        raise UserError(f"row {row.id}: a prompt of {prompt} tokens and up to {response} of response do not fit into "
                        f"--batch.max-tokens {config.batch.max_tokens}; raise it, or drop the row")
    return RowSize(prompt, image, response)


def load_training_rows(config: Config, processor: Processor) -> Sequence[Row]:
    """The rows that the stage trains on; a user's are checked whole, not hours later when one is drawn.

    Raises:
        UserError: a row is bad or its prompt over the budget, there are none (left, after those that are in an
            evaluation set), or the preset has no data of its own.
    """
    if not config.data.path:
        return embedded_rows(config)
    rows: Sequence[Row] = load_rows(config.data.path, max_image_pixels=config.data.max_image_pixels)
    report = find_evaluated(rows, config.data)
    if report.matches:
        logger.warning("%s", report.table())
    if config.data.contaminated == "drop":
        kept = drop_contaminated(rows, report)
        if not kept:
            raise UserError(f"all {len(rows)} training rows are in an evaluation set "
                            f"({', '.join(config.data.named_sets())}); give other rows with --data.path")
        rows = kept
    for row in rows:
        row_size(row, config, processor)
    return rows


def embedded_rows(config: Config) -> Sequence[Row]:
    """The data that the preset brings along; raises UserError if it has none."""
    if config.preset != "tiny":
        raise UserError(f"preset {config.preset} has no embedded data; give row files with --data.path")
    return mini_rows(config.stage)


def find_evaluated(rows: Sequence[Row], data: DataConfig) -> Report:
    """Which of the rows are in --data.eval-path or one of --data.evaluation-sets."""
    named, pixels = data.named_sets(), data.max_image_pixels
    if not named:
        return Report((), len(rows))
    return find_contaminated(rows, load_evaluation_sets(named, max_image_pixels=pixels), max_image_pixels=pixels)
