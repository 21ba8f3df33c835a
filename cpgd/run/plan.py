"""What a stage starts from: its model folder, and the rows that it trains on.

`plan` finds out about the rows what can be known before the first step, in one pass over their files that one process
of a host makes: they are whole (data/index.py), within the token budgets, of use to their rewards, and not in an
evaluation set. The trainer stops at what is wrong; `--dry-run` gathers it, and shows the rest.
"""

import hashlib
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cosmo_rl.data.collate import check_prompt
from cosmo_rl.data.disk import remove, replace_file, replacing
from cosmo_rl.data.errors import MissingPackage, RowError, UserError
from cosmo_rl.data.index import Index, Picture, index_rows, load_rows
from cosmo_rl.data.schema import Row
from cosmo_rl.model.load import Processor
from cosmo_rl.model.parallel import agree, on_main, together, world
from cosmo_rl.model.tiny import TINY_PATH, build_tiny

from ..config import Config, DataConfig
from ..rewards.build import RowNeeds
from ..update import chosen_ids
from .rundir import RunDir

logger = logging.getLogger(__name__)


# -- the model folder -------------------------------------------------------------------------------------------------


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
        from cosmo_rl.data.prepare.mini import mini_texts

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


# -- the rows ---------------------------------------------------------------------------------------------------------


class RowSize(NamedTuple):
    """What a row takes of the budgets, in tokens."""

    prompt: int
    """Image tokens included."""
    image: int
    response: int
    """Of `chosen` in stage 0, else the longest there may be."""


@dataclass(slots=True)
class Faults:
    """What a dry run gathers, where training would stop at the first."""

    rejected: list[RowError] = field(default_factory=list)
    """Of rows and files that training would refuse, or leave out."""
    settings: list[str] = field(default_factory=list)
    """What is wrong beside the rows."""
    notes: list[str] = field(default_factory=list)

    def reject(self, where: str, text: str) -> None:
        """A row, with the problem and the mend of a UserError's text."""
        problem, _, mend = text.rpartition("; ")  # the problem may quote a "; " of the row
        self.rejected.append(RowError(where, "", problem or mend, mend if problem else "correct or drop the row"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one pass over the rows has found."""

    rows: Index
    """To train on."""
    needs: RowNeeds | None
    """What the rewards have to know of all rows; None in stage 0."""
    eval_rows: Index | None
    """Of --data.eval-path."""

    @property
    def domains(self) -> list[str]:
        """The domain of each row."""
        return self.rows.domains

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the rows in order and the content of their images, whatever folder they lie in."""
        return self.rows.fingerprint


def plan(config: Config, processor: Processor, stage_dir: Path | None = None, faults: Faults | None = None) -> Plan:
    """The rows of a stage, read once a host and checked; all ranks must call it together.

    Args:
        stage_dir: where the process that reads leaves what it found to the others of its launcher; None: each reads.
        faults: takes all that is wrong; such rows are left out.
    Raises:
        UserError: a row is bad, its prompt over the budget or of no use to its reward, there are none (left, after
            those that are in an evaluation set), or the preset has no data of its own; on all ranks.
    """
    made: list[Plan] = []
    shared: list[Path] = []
    local_rank = os.environ.get("LOCAL_RANK")  # absent: the launcher does not say who shares a host
    # the embedded rows are made, not read
    if stage_dir is not None and world() > 1 and config.data.path and local_rank is not None:
        # hosts in containers may have one name, and a host several launchers: each has a process of LOCAL_RANK 0
        host = f"{socket.gethostname()}-{os.environ.get('GROUP_RANK', '0')}"
        shared = [stage_dir / f".{name}-{host}.npz" for name in ("rows", "eval")]
    reads = not shared or local_rank == "0"

    def read() -> None:
        made.append(_read(config, processor, faults))
        needs, eval_rows = made[0].needs, made[0].eval_rows
        if shared:
            replace_file(shared[0], made[0].rows.dump({"needs": needs and needs.state_dict()}))
        if shared and eval_rows is not None:
            replace_file(shared[1], eval_rows.dump({}))

    def load() -> None:
        rows, more = Index.load(shared[0])
        needs = RowNeeds(config.reward) if config.stage > 0 else None
        if needs is not None:
            needs.load_state_dict(more["needs"])
        made.append(Plan(rows=rows, needs=needs, eval_rows=Index.load(shared[1])[0] if config.data.eval_path else None))

    try:
        together(lambda: read() if reads else None)
        together(lambda: None if reads else load())
    finally:
        for file in shared if reads else ():
            remove(file)
    agree(made[0].fingerprint, "the rows of --data.path, or their images, are not the same on all hosts; copy one "
                               "version to every host")
    return made[0]


def row_size(row: Row, config: Config, processor: Processor,
             image_sizes: Sequence[tuple[int, int]] | None = None) -> RowSize:
    """The row's size, from its text and the sizes of its images, which are read from their headers if not given.

    Raises:
        UserError: its prompt is over --data.max-prompt-tokens, or with the response over --batch.max-tokens; or stage
            0 cannot imitate its `chosen`.
    """
    prompt, image = check_prompt(row, processor, max_prompt_tokens=config.data.max_prompt_tokens,
                                 system_prompt=config.data.system_prompt, image_sizes=image_sizes)
    response = len(chosen_ids(row, processor)) if config.stage == 0 else config.rollout.max_new_tokens
    if prompt + response > config.batch.max_tokens:
        raise UserError(f"row {row.id}: a prompt of {prompt} tokens and up to {response} of response do not fit into "
                        f"--batch.max-tokens {config.batch.max_tokens}; raise it, or drop the row")
    return RowSize(prompt, image, response)


def embedded_rows(config: Config) -> Sequence[Row]:
    """The data that the preset brings along; raises UserError if it has none."""
    if config.preset != "tiny":
        raise UserError(f"preset {config.preset} has no embedded data; give row files with --data.path")
    from cosmo_rl.data.prepare.mini import mini_rows

    return mini_rows(config.stage)


class _Checks:
    """What the pass asks of each row; a row that fails does not stop it."""

    def __init__(self, config: Config, processor: Processor, faults: Faults | None) -> None:
        self.config, self.processor, self.faults, self.needs = config, processor, faults, None
        self.sized = bool(config.data.path) or faults is not None  # the embedded rows are known to fit
        self.problems: list[str] = []
        """Of each row, in the order of the pass; "" for none."""
        self.own_system = 0
        """Rows with a system message of their own."""
        try:
            self.needs = RowNeeds(config.reward) if config.stage > 0 else None
        except UserError as error:
            self._beside(error)

    def __call__(self, row: Row, pictures: Sequence[Picture]) -> RowSize | None:
        size, problem = None, ""
        self.own_system += row.messages[0]["role"] == "system"
        try:
            if self.sized:
                size = row_size(row, self.config, self.processor, [picture.size for picture in pictures])
            problem = self.needs.problem(row) if self.needs else ""
        except MissingPackage as error:  # of a reward, and no row's fault
            self.needs = self._beside(error)
        except UserError as error:
            problem = str(error).removeprefix(f"row {row.id}: ")
        self.problems.append(problem)
        return size

    def _beside(self, error: UserError) -> None:
        if self.faults is None:
            raise error
        self.faults.settings.append(str(error))


def _read(config: Config, processor: Processor, faults: Faults | None) -> Plan:
    """`plan` on a process that reads."""
    data, checks = config.data, _Checks(config, processor, faults)
    load = partial(load_rows, max_image_pixels=data.max_image_pixels, rejected=faults and faults.rejected)
    eval_rows, held = None, dict[int, str]()
    if not data.path:
        rows = index_rows(embedded_rows(config), max_image_pixels=data.max_image_pixels, check=checks)
        eval_rows = load(data.eval_path) if data.eval_path else None
    elif data.named_sets():
        rows, eval_rows, held = _compared(data, load, checks)
    else:
        rows = load(data.path, check=checks)
    dropped = held if data.contaminated == "drop" else {}
    for i, told in held.items():
        if faults and i in dropped:
            faults.reject(rows.where(i), f"{told}; remove it, or give --data.contaminated report to train on such rows")
        elif faults:
            faults.notes.append(f"{rows.where(i)}: {told}; it is kept (--data.contaminated report)")
    good: list[int] = []
    for i, number in enumerate(rows.records["order"].tolist()):
        if i in dropped:
            continue
        if not (problem := checks.problems[number]):
            good.append(i)
        elif faults is None:
            raise UserError(f"row {rows[i].id}: {problem}")
        else:
            faults.reject(rows.where(i), problem)
    if dropped and not good and faults is None:
        raise UserError(f"all {len(rows)} training rows are in an evaluation set ({', '.join(data.named_sets())}); "
                        "give other rows with --data.path")
    if faults and data.system_prompt and checks.own_system:
        faults.notes.append(f"{checks.own_system:,} rows have a system message of their own, which stands in place of "
                            "--data.system-prompt")
    if dropped and checks.needs:  # it saw them too
        checks.needs = RowNeeds(config.reward)
        for i in good:
            checks.needs.problem(rows[i])
    return Plan(rows=rows if len(good) == len(rows) else rows.select(good), needs=checks.needs, eval_rows=eval_rows)


def _compared(data: DataConfig, load: Callable[..., Index],
              checks: _Checks) -> tuple[Index, Index | None, dict[int, str]]:
    """The training rows, those of --data.eval-path, and of each training row that an evaluation set holds, which."""
    from cosmo_rl.data.prepare.contamination import DROPPED, Looks, compare

    looks, sets = Looks(checks), {}
    rows = load(data.path, check=looks, see=looks.see)
    for name, paths in data.named_sets().items():
        others = Looks()
        members = load(paths, check=others, see=others.see)
        sets[name] = members, others.of(members)
    report = compare(rows, looks.of(rows), sets)
    if report.matches and checks.faults is None:
        logger.warning("%s", report.table())
    held = {match.index: f"it is in evaluation set {match.evaluation_set} ({match.kind})" for match in report.matches
            if match.kind in DROPPED}
    return rows, sets["eval_path"][0] if data.eval_path else None, held
