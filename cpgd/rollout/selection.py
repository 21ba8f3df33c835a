"""Which sampled groups are trained on: dynamic sampling, and the pass rates for the curriculum.

DAPO (arXiv:2503.14476 sec. 3.2) samples on until a batch holds only prompts whose responses were rewarded differently,
since the others have advantage 0. Here a group without a signal gives its place in the rollout to the next prompt of
its own domain, for at most N rounds; a place that still has none keeps its first group.

Shares: the first prompts of a rollout have them exactly, and since a place keeps its domain, so has what is trained on.
What is sampled in all has not: a domain in which much is dropped is sampled more. The number of prompts never changes,
so the updates of a rollout stay as many and as large as without, and a group left without a signal counts as a prompt
of its update, as it does without: with fewer prompts the mean over prompts would grow for the others, the more the
fewer of them teach.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ..advantages import DEGENERATE_SPAN
from .values import Group


def select(numbers: Sequence[int], attempt: Callable[[Sequence[int]], list[Group]],
           replace: Callable[[Sequence[int]], list[int]], rounds: int) -> tuple[list[Group], list[Group], dict]:
    """Sample the rows, and in at most `rounds` rounds others in the place of those without a signal.

    The same on all ranks, if `attempt` and `replace` are.

    Args:
        numbers: of the rows drawn.
        attempt: row numbers -> a group of scored samples for each.
        replace: row numbers -> as many others, each of the same domain.
    Returns:
        what is trained on, in prompt order; the groups of the prompts drawn first; and for metrics.jsonl rounds,
        groups dropped and groups left without a signal by domain, {} where `rounds` is 0.
    """
    first = attempt(numbers)
    groups, done = list(first), 0
    dropped: Counter[str] = Counter()
    while (bare := [i for i, group in enumerate(groups) if not has_signal(group)]) and done < rounds:
        for i, fresh in zip(bare, attempt(replace([numbers[i] for i in bare])), strict=True):
            worse = groups[i] if has_signal(fresh) else fresh
            dropped[worse[0].row.domain] += 1
            if worse is not fresh:
                groups[i] = fresh
        done += 1
    left = Counter(groups[i][0].row.domain for i in bare)
    refill = {"rounds": done, "dropped": dict(sorted(dropped.items())), "left": dict(sorted(left.items()))}
    return groups, first, refill if rounds else {}


def has_signal(group: Group) -> bool:
    """Whether the rewards of a group differ, as `advantages.group_advantages` means it; failed ones take no part."""
    rewards = [s.reward for s in group if s.reward is not None]
    return len(rewards) > 1 and bool(np.ptp(rewards) > DEGENERATE_SPAN)


def pass_rates(numbers: Sequence[int], groups: Sequence[Group]) -> dict[int, float]:
    """Mean Task-Aware value of each row's group, else its mean reward, by row number; all failed: left out."""
    out = {}
    for number, group in zip(numbers, groups, strict=True):
        passed = [s.terms["task_aware"] for s in group if "task_aware" in s.terms]
        passed = passed or [s.reward for s in group if s.reward is not None]
        if passed:
            out[number] = sum(passed) / len(passed)
    return out
