"""The reward terms of a run, from its settings and its rows."""

from collections.abc import Iterable

from cosmo_rl.data.schema import Row

from ..config import RewardConfig
from . import task_aware
from .base import RewardFn
from .format import Format
from .helpful import Helpful
from .judged import BY_TASK, JudgedFn, Judging, judged_terms, open_seats, parse_place
from .visual_focus import Contrast, Elements


def build_rewards(
    config: RewardConfig, rows: Iterable[Row]
) -> tuple[dict[str, RewardFn], Judging | None, dict[str, float]]:
    """The terms with a weight above 0 and their weights, by name: what `combine` takes.

    Args:
        config: weights, modes and judges.
        rows: all rows that will be scored; read for their tasks and key elements.
    Returns:
        the terms by rule; the judges of those that have one, whose outcomes stand in the rules' place (None without
        any); the weights.
    Raises:
        ValueError: no term has a weight; refusal_value is outside [0, 1]; Task-Aware has neither rule nor judge for a
            row, before any sampling is spent on it; or a judge is named wrongly, missing or of no use.
    """
    rows = list(rows)
    if not 0 <= config.refusal_value <= 1:
        raise ValueError(f"--reward.refusal-value is {config.refusal_value}; give a value in [0, 1]")
    weights = {"format": config.format, "visual_focus": config.visual_focus, "helpful": config.helpful,
               "task_aware": config.task_aware}
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    if not weights:
        raise ValueError("every reward weight is 0; give one of --reward.format, --reward.visual-focus, "
                         "--reward.helpful, --reward.task-aware a value above 0")
    seats = open_seats(map(parse_place, config.judges), refusal_value=config.refusal_value,
                       cache_dir=config.judge_cache or None, max_in_flight=config.judge_in_flight,
                       timeout_s=config.judge_timeout, attempts=config.judge_attempts)
    judged = judged_terms(seats, safety=config.safety, both=config.judge_thinking)
    if "visual_focus" in judged and config.visual_focus_mode == "contrast":
        raise ValueError("--reward.visual-focus-mode contrast and judge visual_focus both score Visual-Focus; drop one")
    if "task_aware" in weights:
        _check_tasks(rows, judged.get("task_aware"))
    terms: dict[str, RewardFn] = {
        "format": Format(),
        "visual_focus": Contrast() if config.visual_focus_mode == "contrast"
        else Elements(element for row in rows for element in row.key_elements),
        "helpful": Helpful(),
        "task_aware": task_aware.TaskAware(config.refusal_value),
    }
    judged = {name: term for name, term in judged.items() if name in weights}
    judging = Judging(seats, judged) if judged else None
    return {name: terms[name] for name in weights}, judging, weights


def _check_tasks(rows: Iterable[Row], judged: JudgedFn | None) -> None:
    for row in rows:
        by_rule = row.task in task_aware.SUPPORTED
        if not by_rule and not (judged and judged.handles(row)):
            judge = BY_TASK.get(row.task)
            mend = f"name judge {judge} in --reward.judges, " if judge else ""
            raise ValueError(f"row {row.id}: there is no reward rule for task {row.task}; use one of "
                             f"{', '.join(task_aware.SUPPORTED)}, {mend}or set --reward.task-aware 0")
        if row.task in ("general", "knowledge") and not row.answer:
            raise ValueError(f"row {row.id}: task {row.task} is rewarded against `answer`, which is missing; add it")
