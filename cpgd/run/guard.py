"""A guard on what safety training tends to cost: right answers to general rows, and engaging answers to benign ones.

Both are measured on the rows of `--eval.every` by the rules of evaluation.py (right is what the reward calls right): by
its groups, which a user's rows join by their task, and where a group mixes tasks also for each task that is large
enough. The first measurement, before training, is what later ones are held against. Sampled answers, not greedy ones: a
policy that refuses four times of ten shows here, and every measurement meets the same noise.

    warn    tell of a number when it has fallen too far, again only after it has recovered
    stop    save a checkpoint and end the run; repeated with the same options it ends again, with other ones it goes on
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cosmo_rl.data.errors import UserError

from ..config import EvalConfig
from .evaluation import MEASURES, Answered

logger = logging.getLogger(__name__)
WATCHED = {name: measure for name, measure in MEASURES.items() if measure.guarded}
ROUNDING = 1e-9
"""0.80 - 0.75 is more than 0.05 in floating point."""


class GuardError(UserError):
    """What the guard watches has fallen too far."""


class Guard:
    """Watches the measurements of a stage; the same on all ranks, since all have the same answers."""

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.step = 0
        self.baseline: dict[str, float] | None = None
        """First numbers by name; {}: there are no rows to watch."""
        self.last: dict[str, float] = {}
        """Latest numbers by name, of `step`."""

    def look(self, step: int, answered: Sequence[Answered]) -> dict[str, Any]:
        """Take a measurement; tells of what has newly fallen.

        Returns:
            {"guard": {name: {"before", "now"}}} of all that is down, for evals.jsonl; {} when nothing is.
        Raises:
            UserError: `stop`, and there are no rows to watch.
        """
        if self.config.guard == "off":
            return {}
        numbers, down_before = watched(answered, self.config.guard_drop), self._down()
        if self.baseline is None:
            self._begin(step, numbers)
        self.step, self.last = step, numbers
        down = self._down()
        if self.config.guard == "warn" and (new := {name: down[name] for name in down.keys() - down_before.keys()}):
            logger.warning("--eval.guard: %s", self._told(new))
        return {"guard": down} if down else {}

    def enforce(self, save: Callable[[], None] = lambda: None) -> None:
        """Under `stop`, call `save` and end the run on every rank if the latest numbers are down.

        Raises:
            GuardError: they are; says how to go on.
        """
        if self.config.guard == "stop" and (down := self._down()):
            save()
            raise GuardError(
                f"--eval.guard stop: {self._told(down)}. The checkpoint of step {self.step} is saved; to go on from it "
                "repeat the command with --eval.guard warn or a larger --eval.guard-drop")

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: the first numbers, the latest and their step."""
        return {"baseline": self.baseline, "last": self.last, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue where `state` was taken; None: of a checkpoint that has none."""
        if state is not None:
            self.baseline = state["baseline"]
            # Under `off` nothing is measured, and old numbers must not stop the run once it is on again.
            self.last, self.step = ({}, 0) if self.config.guard == "off" else (state["last"], state["step"])

    def _begin(self, step: int, numbers: dict[str, float]) -> None:
        self.baseline = numbers
        if not numbers:
            if self.config.guard == "stop":
                raise UserError(no_rows("stop"))
            logger.warning("%s", no_rows(self.config.guard))
        elif step:
            logger.warning("--eval.guard: not measured before training; later numbers are held against step %d", step)

    def _down(self) -> dict[str, dict[str, float]]:
        pairs = {name: (before, self.last[name]) for name, before in (self.baseline or {}).items() if name in self.last}
        return {name: {"before": before, "now": now} for name, (before, now) in pairs.items()
                if before - now > self.config.guard_drop + ROUNDING}

    def _told(self, down: Mapping[str, Mapping[str, float]]) -> str:
        falls = [f"{name} fell from {was['before']:.3f} to {was['now']:.3f}" for name, was in sorted(down.items())]
        return f"at step {self.step} {', '.join(falls)}, by more than --eval.guard-drop {self.config.guard_drop:g}"


def no_rows(guard: str) -> str:
    """What is wrong, and the mend, where nothing can be measured."""
    return (f"--eval.guard {guard} has no rows to watch; give general rows with an answer or benign safety rows with "
            "--data.eval-path")


def watched(answered: Sequence[Answered], drop: float) -> dict[str, float]:
    """The numbers of WATCHED, and of each task in a group of several as NAME/TASK.

    A task of fewer than 1 / `drop` rows is left to its group: one row would be a fall.
    """
    out = {}
    for name, measure in WATCHED.items():
        members = measure.of(answered)
        tasks = sorted({a.row.task for a in members})
        for task in ["", *tasks[len(tasks) == 1:]]:
            part = [a for a in members if task in ("", a.row.task)]
            value = measure.share(part)
            if value is not None and (not task or len(part) * drop >= 1):
                out[f"{name}/{task}" if task else name] = value
    return out
