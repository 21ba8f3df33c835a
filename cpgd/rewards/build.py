"""The reward terms of a run, from its settings and its rows."""

from collections.abc import Iterable, Mapping

from cosmo_rl.data.schema import Row

from ..config import RewardConfig
from . import judged as judged_terms
from . import task_aware
from .base import RewardFn
from .format import Format
from .helpful import Helpful
from .judged import (
    BY_TASK,
    SAFETY_JUDGES,
    Asked,
    Hybrid,
    JudgedFn,
    Judging,
    Ruled,
    SafeGRPO,
    Seat,
    open_seats,
    parse_place,
)
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
    by_task = _judges_of_tasks(config, seats)
    if "task_aware" in weights:
        _check_tasks(rows, by_task)
    judged: dict[str, JudgedFn] = {}
    if by_task:
        judged["task_aware"] = judged_terms.TaskAware(by_task)
    if "helpful" in seats:
        judged["helpful"] = judged_terms.Helpful(Asked(seats["helpful"], both=config.judge_thinking))
    if config.visual_focus_mode == "judge":
        seat = _seat(seats, "visual_focus", "--reward.visual-focus-mode judge")
        judged["visual_focus"] = judged_terms.VisualFocus(seat)
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


def _judges_of_tasks(config: RewardConfig, seats: Mapping[str, Seat]) -> dict[str, JudgedFn]:
    """Who scores which task in place of its rule."""
    asked = lambda seat: Asked(seat, both=config.judge_thinking)
    by_task: dict[str, JudgedFn] = {task: asked(seats[name]) for task, name in BY_TASK.items() if name in seats}
    option = f"--reward.safety-rule {config.safety_rule}"
    match config.safety_rule:
        case "judge":
            named = [name for name in SAFETY_JUDGES if name in seats]
            if len(named) != 1:
                raise ValueError(f"{option} needs one of {', '.join(SAFETY_JUDGES)} in --reward.judges, which has "
                                 f"{', '.join(named) or 'none'}; name one")
            by_task["safety"] = asked(seats[named[0]])
            by_task["jailbreak"] = asked(seats.get("safework_jailbreak", seats[named[0]]))
        case "safegrpo":
            by_task["safety"] = by_task["jailbreak"] = Ruled(SafeGRPO())
        case "hybrid":
            by_task["safety"] = by_task["jailbreak"] = Hybrid(
                _seat(seats, "qwen3guard", option), _seat(seats, "scalar", option))
    return by_task


def _seat(seats: Mapping[str, Seat], name: str, option: str) -> Seat:
    if name not in seats:
        raise ValueError(f"{option} asks judge {name}, which --reward.judges does not name; add {name}=URL,MODEL")
    return seats[name]


def _check_tasks(rows: Iterable[Row], by_task: Mapping[str, JudgedFn]) -> None:
    known = {*task_aware.SUPPORTED, *by_task}
    for row in rows:
        if row.task not in known:
            judge = BY_TASK.get(row.task)
            mend = f"name judge {judge} in --reward.judges, " if judge else ""
            raise ValueError(f"row {row.id}: there is no reward rule for task {row.task}; use one of "
                             f"{', '.join(sorted(known))}, {mend}or set --reward.task-aware 0")
        if row.task in ("general", "knowledge") and not row.answer:
            raise ValueError(f"row {row.id}: task {row.task} is rewarded against `answer`, which is missing; add it")
