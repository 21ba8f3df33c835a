"""Which rewards of a run rest on word rules: lists of openings and phrases, which cannot judge free text.

They are good enough for the embedded data, whose answers come from a few templates. On free text they miss refusals in
other words, and a policy that is paid by them finds what they miss. So a run on other data says where it uses them.
"""

from collections.abc import Collection

from ..config import Config
from .build import SAFETY_JUDGES

CAUTION = ("they cannot judge free text: what is said in other words is missed, and a policy finds what is missed; "
           "name judges with --reward.judges")


def on_free_text(config: Config) -> bool:
    """Whether the answers are free text: on all data but the embedded."""
    return config.preset != "tiny" or bool(config.data.path)


def by_words(config: Config, tasks: Collection[str]) -> list[str]:
    """The terms of a run that word rules score, with the tasks of the rows, as "Task-Aware of safety rows".

    Args:
        tasks: of the run's rows.
    Returns:
        [] for the embedded data and for stage 0, which has no rewards.
    """
    reward = config.reward
    if not (config.stage and on_free_text(config)):
        return []
    named = {entry.judge for entry in reward.judge_entries()}
    judged = reward.safety == "hybrid" or (reward.safety == "judge" and not named.isdisjoint(SAFETY_JUDGES))
    safety = [task for task in ("safety", "jailbreak") if task in tasks]
    found = []
    if reward.task_aware > 0 and safety and not judged:
        how = " (SafeGRPO's: does the answer refuse?)" if reward.safety == "safegrpo" else ""
        found.append(f"Task-Aware of {' and '.join(safety)} rows{how}")
    if reward.helpful > 0 and "helpful" not in named and not ("scalar" in named and reward.safety != "hybrid"):
        found.append("Helpful of all rows that are not unsafe")
    return found
