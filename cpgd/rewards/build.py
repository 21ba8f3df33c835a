"""The reward terms of a run, from its settings and its rows."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import Row

from ..config import RewardConfig
from . import task_aware
from .base import RewardFn
from .format import Format
from .function import load_function
from .helpful import Helpful
from .judged import BY_TASK, JudgedFn, Judging, judged_terms, open_seats
from .visual_focus import Contrast, Elements


class RowNeeds:
    """What the rows ask of a run's rewards: one rank of a host looks at each row, the others load what it found."""

    def __init__(self, config: RewardConfig) -> None:
        """
        Raises:
            UserError: no term has a weight, refusal_value is outside [0, 1], or the judges do not fit.
        """
        self.weights = _weights(config)
        seats = open_seats(replace(config, judge_cache=""))
        self.judged = judged_terms(seats, safety=config.safety, both=config.judge_thinking)
        self.rules = task_aware.TaskAware(config.refusal_value)
        self.tasks: set[str] = set()
        """Of all rows."""
        self.elements: set[str] = set()
        """Key elements of all rows."""

    def problem(self, row: Row) -> str:
        """Take the row in; why Task-Aware cannot score it, and the mend, or "" if it can.

        Raises:
            MissingPackage: as `TaskAware.problem`.
        """
        self.tasks.add(row.task)
        self.elements.update(row.key_elements)
        return _task_problem(row, self.rules, self.judged.get("task_aware")) if "task_aware" in self.weights else ""

    def state_dict(self) -> dict[str, list[str]]:
        """What was found, JSON-able."""
        return {"tasks": sorted(self.tasks), "elements": sorted(self.elements), "ruled": sorted(self.rules.asked)}

    def load_state_dict(self, state: Mapping[str, Iterable[str]]) -> None:
        """Take over what another one found."""
        self.tasks, self.elements, self.rules.asked = (set(state[name]) for name in ("tasks", "elements", "ruled"))


def _weights(config: RewardConfig) -> dict[str, float]:
    if not 0 <= config.refusal_value <= 1:
        raise UserError(f"--reward.refusal-value is {config.refusal_value}; give a value in [0, 1]")
    weights = {"format": config.format, "visual_focus": config.visual_focus, "helpful": config.helpful,
               "task_aware": config.task_aware, "function": config.function_weight if config.function else 0.0}
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    if not weights:
        raise UserError("every reward weight is 0; give one of --reward.format, --reward.visual-focus, "
                        "--reward.helpful, --reward.task-aware a value above 0, or name a --reward.function")
    return weights


def build_rewards(
    config: RewardConfig, rows: Iterable[Row] | RowNeeds, rejected: list[tuple[int, str]] | None = None
) -> tuple[dict[str, RewardFn], Judging | None, dict[str, float]]:
    """The terms with a weight above 0 and their weights, by name: what `combine` takes.

    Args:
        config: weights, modes and judges.
        rows: all rows that will be scored; read once, for their tasks and key elements.
        rejected: takes (index of the row, what is wrong) of every row that Task-Aware cannot score, which is
            then no error.
    Returns:
        the terms by rule; the judges of those that have one, whose outcomes stand in the rules' place (None without
        any); the weights.
    Raises:
        UserError: no term has a weight; refusal_value is outside [0, 1]; Task-Aware has neither rule nor judge for a
            row, or its rule cannot use the row's answer, options or constraints, before any sampling is spent on it; or
            a judge is named wrongly, missing or of no use; or the user's function cannot be loaded, or scores no row.
    """
    weights = _weights(config)
    function = load_function(config.function, config.function_tasks) if "function" in weights else None
    seats = open_seats(config)
    judged = judged_terms(seats, safety=config.safety, both=config.judge_thinking)
    if "visual_focus" in judged and config.visual_focus_mode == "contrast":
        raise UserError("--reward.visual-focus-mode contrast and judge visual_focus both score Visual-Focus; drop one")
    needs = rows if isinstance(rows, RowNeeds) else RowNeeds(config)
    for i, row in enumerate(() if isinstance(rows, RowNeeds) else rows):
        problem = needs.problem(row)
        if problem and rejected is None:
            raise UserError(f"row {row.id}: {problem}")
        if problem and rejected is not None:
            rejected.append((i, problem))
    tasks, elements, rules = needs.tasks, needs.elements, needs.rules
    terms: dict[str, RewardFn] = {
        "format": Format(),
        "visual_focus": Contrast() if config.visual_focus_mode == "contrast"
        else Elements(elements),
        "helpful": Helpful(),
        "task_aware": rules,
    }
    if function:
        terms["function"] = function
        if tasks and function.tasks and not function.tasks & tasks:
            raise UserError(f"--reward.function-tasks names {', '.join(sorted(function.tasks))}, and the rows have "
                            f"{', '.join(sorted(tasks))}; name one of these")
        if function.waits:
            judged["function"] = function
    judged = {name: term for name, term in judged.items() if name in weights}
    judging = Judging(seats, judged) if judged else None
    return {name: terms[name] for name in weights}, judging, weights


def _task_problem(row: Row, rules: task_aware.TaskAware, judged: JudgedFn | None) -> str:
    """Why Task-Aware cannot score the row; empty if it can."""
    by_judge = judged is not None and judged.handles(row)
    if row.task == "value" and not row.answer and not by_judge:
        return (f"there is no reward rule for task value without `answer`; add it, name judge {BY_TASK['value']} in "
                "--reward.judges, or set --reward.task-aware 0")
    if row.task in ("general", "knowledge") and not row.answer:  # their judges need it too
        return f"task {row.task} is rewarded against `answer`, which is missing; add it"
    return "" if by_judge else rules.problem(row)
