"""The reward terms of a run, from its settings and its rows."""

from collections.abc import Iterable

from cosmo_rl.data.schema import Row

from ..config import RewardConfig
from . import task_aware
from .base import RewardFn
from .format import Format
from .helpful import Helpful
from .visual_focus import Contrast, Elements


def build_rewards(config: RewardConfig, rows: Iterable[Row]) -> tuple[dict[str, RewardFn], dict[str, float]]:
    """The terms with a weight above 0, and their weights, by name: what `combine` takes.

    Args:
        config: weights and modes.
        rows: all rows that will be scored; read for their tasks and key elements.
    Raises:
        ValueError: no term has a weight; refusal_value is outside [0, 1]; or Task-Aware has no rule for a row, before
            any sampling is spent on it.
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
    if "task_aware" in weights:
        for row in rows:
            if row.task not in task_aware.SUPPORTED:
                raise ValueError(f"row {row.id}: there is no reward rule for task {row.task}; use one of "
                                 f"{', '.join(task_aware.SUPPORTED)}, or set --reward.task-aware 0")
            if row.task == "general" and not row.answer:
                raise ValueError(f"row {row.id}: task general is rewarded against `answer`, which is missing; add it")
    terms: dict[str, RewardFn] = {
        "format": Format(),
        "visual_focus": Contrast() if config.visual_focus_mode == "contrast"
        else Elements(element for row in rows for element in row.key_elements),
        "helpful": Helpful(),
        "task_aware": task_aware.TaskAware(config.refusal_value),
    }
    return {name: terms[name] for name in weights}, weights
