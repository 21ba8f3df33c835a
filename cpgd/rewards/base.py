"""What a reward term is, how terms become one reward, and what happens when they fail.

A term ends in one of three outcomes: a Score in [0, 1]; NotApplicable, and the other terms' weights are renormalised;
or Failed, and the response leaves its group. A failure is counted and never becomes a zero, which would be a signal.

    R = sum_k w_k r_k / sum_k w_k        over the terms that apply
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cosmo_rl.data.errors import UserError

from ..rollout.values import Response


@dataclass(frozen=True, slots=True)
class Score:
    """The term applies."""

    value: float
    """In [0, 1]."""

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:  # catches NaN
            raise UserError(f"a reward term returned {self.value}; map it to [0, 1], or return Failed(reason)")


@dataclass(frozen=True, slots=True)
class NotApplicable:
    """The term says nothing about this row."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The term applies, but no value could be had."""

    reason: str
    """What went wrong and the mend, without the sample's id."""


Outcome = Score | NotApplicable | Failed


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the policy adds for Visual-Focus `contrast`: mean log-prob of the answer's tokens, in nats."""

    seen: float
    """Given the row's image."""
    blank: float
    """Given a blank image of the same size; see `visual_focus.blank_prompt`."""


class Term(Protocol):
    """One term of the reward, by rule, by a judge or by the user's function.

    The same response has the same outcome, whatever else is scored at the time: a resumed run gives the same values.
    """

    async def __call__(self, response: Response, /) -> Outcome:
        """The term's outcome for one response."""
        ...


def combine(
    outcomes: Mapping[str, Outcome], weights: Mapping[str, float]
) -> tuple[float | None, dict[str, float], str]:
    """One reward from the outcomes of all terms.

    Args:
        outcomes: by name of the term.
        weights: by name, >= 0; every term of `outcomes` has one.
    Returns:
        reward: in [0, 1], or None when a term failed or none applies.
        terms: value of each term that applied, unweighted.
        failure: why the reward is None, naming the terms; "" otherwise.
    """
    terms = {name: outcome.value for name, outcome in outcomes.items() if isinstance(outcome, Score)}
    reasons = [f"{name}: {outcome.reason}" for name, outcome in outcomes.items() if isinstance(outcome, Failed)]
    if reasons:
        return None, terms, "; ".join(reasons)
    total = math.fsum(weights[name] for name in terms)
    if total == 0:
        return None, terms, "no term applies; give one of them a weight above 0, or remove such rows"
    return math.fsum(weights[name] * value for name, value in terms.items()) / total, terms, ""


class RewardBudgetError(UserError):
    """More rewards failed than the run tolerates."""


def check_budget(failures: Sequence[str], total: int, budget: float) -> None:
    """Stop a run whose rewards fail too often.

    Args:
        failures: one text per failed response, its id and the reason.
        total: responses of the rollout.
        budget: largest share of failures, in [0, 1].
    Raises:
        RewardBudgetError: names share, budget and the first three reasons.
    """
    share = len(failures) / total
    if share > budget:
        raise RewardBudgetError(
            f"the reward failed for {len(failures)} of {total} responses ({share:.1%}), more than the budget of "
            f"{budget:.1%}; mend the cause, or raise --reward.failure-budget. First reasons: {' | '.join(failures[:3])}"
        )
