"""What a stage measures: the report's rows before and after training, and every --eval.every steps the watched ones.

The report's are the user's --data.eval-path or the embedded split of --eval.split; watched, for evals.jsonl and the
guard, are the same, or of the embedded data the validation split. Due at one step, one evaluation serves both.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path

from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import Row
from cosmo_rl.model.load import Processor
from cosmo_rl.model.parallel import on_main, together

from ..config import Config
from ..rollout.engine import Engine
from .evaluation import Answered, Encode, eval_suite, evaluate, not_compared, numbers
from .guard import Guard
from .metrics import MetricsWriter
from .report import read_measured, write_measured

logger = logging.getLogger(__name__)
Suite = Mapping[str, Sequence[Row]]


class Measurements:
    """Measures a stage; every method is called by all ranks together.

    Args:
        rows: of --data.eval-path; None without.
        engine: answers the rows.
        encode: a row as the engine takes it.
        sync: gives the engine the policy's weights; called before an evaluation only.
        stage_dir: before.json and after.json go there.
        metrics: evals.jsonl; used on rank 0 only.
    Raises:
        UserError: on every rank, when the rows cannot be read on one of them.
    """

    def __init__(self, config: Config, rows: Sequence[Row] | None, engine: Engine, encode: Encode, processor: Processor,
                 sync: Callable[[], None], stage_dir: Path, metrics: MetricsWriter) -> None:
        self.config, self.rows, self.engine, self.encode, self.processor = config, rows, engine, encode, processor
        self.sync, self.stage_dir, self.metrics = sync, stage_dir, metrics
        self.guard = Guard(config.eval)  # its state is part of a checkpoint
        self.left_out: list[str] = []
        """ "row ID: why" of each of the report's rows that no rule can use."""
        self.suite = self._read(config.eval.split, self.left_out)
        if self.left_out:
            logger.warning("evaluation: %d rows of --data.eval-path are not measured, as no rule can use them; the "
                           "first: %s", len(self.left_out), self.left_out[0])
        self.watched = (self.suite if config.data.eval_path or not config.eval.every else self._read("validation"))
        self._latest: tuple[int, Suite, list[Answered], list[Answered]] | None = None

    def before(self, step: int, save: Callable[[], None]) -> None:
        """At the start of a run, at its checkpoint's `step`: what is to be known of the policy before training.

        Raises:
            UserError: on every rank, when the run goes on and the report's first numbers are not there.
        """
        if self.suite and self.config.stage > 0:
            if not step:  # again, if it is there: a try without a checkpoint may have had another model
                self._report("before", step)
            elif not read_measured(self.stage_dir, "before"):
                raise UserError(f"{self.stage_dir} has a checkpoint at step {step} but no measurement from before "
                                "training; remove the folder and start the stage again")
        if self.config.eval.guard != "off" and not step:
            self._watch(step, save)

    def due(self, earlier: int, step: int) -> bool:
        """Whether a multiple of --eval.every is among the steps from `earlier` to `step`."""
        every = self.config.eval.every
        return every > 0 and step // every > earlier // every

    def between(self, earlier: int, step: int, save: Callable[[], None]) -> None:
        """After the steps from `earlier` to `step`: the watched rows, if they are `due`.

        Args:
            save: writes the checkpoint of `step`, before the guard ends the run.
        Raises:
            GuardError: on every rank, see `Guard.enforce`.
        """
        if self.due(earlier, step):
            self._watch(step, save)

    def after(self, step: int) -> None:
        """At the end of training: the report's rows."""
        if self.suite:
            self._report("after", step)

    def _read(self, split: str, left_out: list[str] | None = None) -> dict[str, Sequence[Row]]:
        """Rows by group, on each rank its own: nothing is returned that would go to other ranks."""
        suite: dict[str, Sequence[Row]] = {}
        together(lambda: suite.update(eval_suite(self.config, split, self.rows, left_out)))
        return suite

    def _report(self, when: str, step: int) -> None:
        sampled, greedy = self._answers(self.suite, step)
        on_main(lambda: write_measured(self.stage_dir, when, sampled, greedy, _shown(sampled, self.suite)))

    def _watch(self, step: int, save: Callable[[], None]) -> None:
        sampled, greedy = self._answers(self.watched, step)
        line = {"step": step, "sampled": numbers(sampled), "greedy": numbers(greedy), **self.guard.look(step, sampled)}
        on_main(lambda: self.metrics.append("evals", line))
        self.guard.enforce(save)

    def _answers(self, suite: Suite, step: int) -> tuple[list[Answered], list[Answered]]:
        """A sampled and a greedy answer to each row, of the policy as it is."""
        if not suite:
            return [], []
        if self._latest and self._latest[0] == step and self._latest[1] is suite:
            return self._latest[2:]
        self.sync()
        sampled, greedy = evaluate(self.engine, suite, self.encode, self.processor, self.config)
        if problems := not_compared(sampled):
            logger.warning("evaluation: %d of %d answers could not be compared, and are neither right nor wrong; the "
                           "first: %s", len(problems), len(sampled), problems[0])
        self._latest = step, suite, sampled, greedy
        return sampled, greedy


def _shown(answered: Sequence[Answered], suite: Suite, each: int = 6) -> list[Answered]:
    """The first few of every group, for the report's table, with their images."""
    groups = groupby(answered, key=lambda a: a.group)
    return [replace(a, row=suite[group][i]) for group, members in groups for i, a in enumerate(islice(members, each))]
