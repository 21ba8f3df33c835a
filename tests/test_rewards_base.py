"""Outcomes, their combination into one reward, the failure budget, and what is built from settings and rows."""

import math

import pytest

from cosmo_rl.cpgd.rewards.base import (
    Failed,
    NotApplicable,
    RewardBudgetError,
    Score,
    check_budget,
    combine,
)
from cosmo_rl.data.schema import Row

WEIGHTS = {"format": 0.1, "visual_focus": 0.2, "helpful": 0.2, "task_aware": 1.0}


def row(task="general", **fields):
    return Row(id="r1", task=task, domain="d", messages=({"role": "user", "content": "q"},), source="test",
               licence="Apache-2.0", **fields)


@pytest.mark.parametrize("value", [-1e-9, 1.0000001, math.nan, math.inf])
def test_a_value_outside_0_to_1_is_refused(value):
    with pytest.raises(ValueError, match=r"map it to \[0, 1\]"):
        Score(value)


@pytest.mark.parametrize(("outcomes", "reward", "terms"), [
    ({"format": Score(1.0), "visual_focus": Score(0.5), "helpful": Score(0.0), "task_aware": Score(1.0)}, 1.2 / 1.5,
     {"format": 1.0, "visual_focus": 0.5, "helpful": 0.0, "task_aware": 1.0}),
    ({"format": Score(0.0), "visual_focus": NotApplicable(), "task_aware": Score(1.0)}, 1 / 1.1,
     {"format": 0.0, "task_aware": 1.0}),
    ({"helpful": Score(0.25), "task_aware": NotApplicable()}, 0.25, {"helpful": 0.25}),
    ({"format": Score(1.0), "visual_focus": Score(1.0), "helpful": Score(1.0), "task_aware": Score(1.0)}, 1.0,
     dict.fromkeys(WEIGHTS, 1.0)),
])
def test_terms_that_apply_share_the_weight(outcomes, reward, terms):
    got, values, failure = combine(outcomes, WEIGHTS)
    assert got == pytest.approx(reward, abs=1e-15) and values == terms and failure == ""


def test_a_failed_term_fails_the_response_and_is_never_a_zero():
    outcomes = {"format": Score(1.0), "task_aware": Failed("judge timed out"), "helpful": Failed("no answer")}
    assert combine(outcomes, WEIGHTS) == (None, {"format": 1.0}, "task_aware: judge timed out; helpful: no answer")


@pytest.mark.parametrize("outcomes", [{}, {"format": NotApplicable()}])
def test_without_an_applicable_term_the_response_fails(outcomes):
    reward, terms, failure = combine(outcomes, WEIGHTS)
    assert reward is None and terms == {} and failure.startswith("no term applies")


def test_the_budget_names_share_budget_and_reasons():
    reasons = [f"r{i}#0: task_aware: broken {i}" for i in range(5)]
    check_budget(reasons, 50, 0.1)
    check_budget([], 50, 0.0)
    with pytest.raises(RewardBudgetError) as error:
        check_budget(reasons, 49, 0.1)
    text = str(error.value)
    assert "5 of 49 responses (10.2%)" in text and "budget of 10.0%" in text and "--reward.failure-budget" in text
    assert "r0#0: task_aware: broken 0" in text and "broken 2" in text and "broken 3" not in text


@pytest.mark.parametrize(("tags", "unsafe"), [
    (None, False), ({"combined": "safe", "image": "unsafe", "text": "unsafe"}, False), ({"combined": "unsafe"}, True),
    ({"image": "unsafe"}, False),
])
def test_a_row_is_unsafe_by_image_and_text_together(tags, unsafe):
    assert row("safety", tags=tags).is_unsafe is unsafe
