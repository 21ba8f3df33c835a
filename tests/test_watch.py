"""What is said of a run that learns nothing, or something else: when, how often, and after a resume."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cosmo_rl.cpgd.rollout.values import Rollout
from cosmo_rl.cpgd.run.watch import CONSTANT_ROLLOUTS, NO_GRADIENT_STEPS, Watch


def sample(group: int, reward: float | None, advantage: float = 0.0, domain: str = "safety", reason: str = "stop",
           **terms: float) -> Any:
    return SimpleNamespace(group=group, reward=reward, advantage=advantage, terms=terms,
                           row=SimpleNamespace(domain=domain), response=SimpleNamespace(finish_reason=reason))


def grouped(samples: list[Any]) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(s for s in samples if s.group == number) for number in sorted({s.group for s in samples}))


def rollout(watch: Watch, samples: list[Any], first: list[Any] | None = None) -> list[str]:
    """What is said of these samples, in groups by their numbers; of others as the first, where they are given."""
    groups = grouped(samples)
    return watch.rollout(Rollout(
        version=0, groups=groups, first=grouped(samples if first is None else first), sampled_tokens=0, refill={},
        advantages=tuple(np.array([s.advantage for s in group]) for group in groups)), 24)


GOOD = [sample(0, 1.0, 0.5), sample(0, 0.0, -0.5), sample(1, 1.0, 0.5), sample(1, 0.5, -0.5)]
FLAT = [sample(0, 1.0), sample(0, 1.0), sample(1, 0.0), sample(1, 0.0)]
FAILED = [sample(0, 1.0, 0.5), sample(0, 0.0, -0.5), sample(1, 1.0), sample(1, None)]
CUT = [*GOOD[:1], *(sample(i // 2, 1.0, 0.5, reason="length") for i in (1, 2, 3))]


@pytest.mark.parametrize(("samples", "words"), [
    (FLAT, "all 2 groups of the rollout have equal rewards and advantage 0"),
    (FAILED, "1 of 2 groups of the rollout have fewer than two scored responses"),
    (CUT, "3 of 4 responses of the rollout were cut off at --rollout.max-new-tokens 24"),
])
def test_once_an_episode(samples, words):
    watch = Watch()
    assert rollout(watch, GOOD) == []
    (said,) = rollout(watch, samples)
    assert words in said
    assert rollout(watch, samples) == rollout(watch, samples) == [], "it still holds"
    assert rollout(watch, GOOD) == [] and rollout(watch, samples) == [said], "a second episode"


def test_half_is_not_most():
    half = [sample(0, 1.0, 0.5, reason="length"), sample(0, 0.0, -0.5)]
    assert rollout(Watch(), half) == []
    assert rollout(Watch(), [*FAILED, *(sample(2, x, x) for x in (0.1, 0.2))]) == [], "one group of three"


def test_what_is_trained_on_decides_and_what_was_drawn_first_is_described():
    """Dynamic sampling: all groups drawn first are degenerate, their replacements are not."""
    cut = [sample(0, 1.0, reason="length") for _ in range(4)]
    (said,) = rollout(Watch(), GOOD, cut)
    assert said.startswith("4 of 4 responses")


def term(value: float, *, domain: str = "safety", count: int = 8, name: str = "task_aware") -> list[Any]:
    return [sample(i // 2, 0.5, 0.1 * i, domain, "stop", **{name: value}) for i in range(count)]


def mixed(domain: str = "safety") -> list[Any]:
    return [sample(i // 2, 0.5, 0.1 * i, domain, task_aware=float(i % 2)) for i in range(8)]


@pytest.mark.parametrize(("value", "words"), [
    (0.0, "has been 0 for every response of domain safety in 5 rollouts or more: it tells no response from another; "
          "see samples.jsonl whether its function works"),
    (1.0, "has been 1 for every response of domain safety in 5 rollouts or more: it tells no response from another; "
          "all have earned it"),
    (0.25, "has been 0.25 for every response of domain safety"),
])
def test_a_term_that_never_changes(value, words):
    watch = Watch()
    for _ in range(CONSTANT_ROLLOUTS - 1):
        assert rollout(watch, term(value)) == []
    (said,) = rollout(watch, term(value))
    assert words in said and said.startswith("reward term task_aware ")
    for _ in range(30):
        assert rollout(watch, term(value)) == [], "once, however long it lasts"
    assert rollout(watch, mixed()) == []
    for _ in range(CONSTANT_ROLLOUTS - 1):
        assert rollout(watch, term(value)) == []
    again = rollout(watch, term(value))
    assert again == ([] if value == 1 else [said]), "again, after it has changed; of what all earn once a run"


def test_what_all_earned_and_nobody_does_any_more_is_said():
    watch = Watch()
    course = [1.0] * 5 + [0.0] * 5 + [1.0] * 9 + [0.0] * 5
    said = [rollout(watch, term(value)) for value in course]
    assert [i for i, texts in enumerate(said) if texts] == [4, 9, 23]


def test_a_term_that_differs_between_rollouts_is_not_constant():
    watch = Watch()
    assert not any(rollout(watch, term(float(i % 2))) for i in range(40))
    assert not any(rollout(watch, term(0.5 + 1e-5 * i)) for i in range(40))
    watch = Watch()
    assert [bool(rollout(watch, term(0.5 + 1e-8 * (i % 2)))) for i in range(6)] == [False] * 4 + [True, False]


def test_few_responses_say_nothing():
    watch = Watch()
    said = [rollout(watch, [*term(0.0, count=2), *GOOD]) for _ in range(20)]
    assert [i for i, texts in enumerate(said) if texts] == [15], "32 responses"


def test_failed_responses_are_no_values():
    watch = Watch()
    for _ in range(40):
        assert rollout(watch, [sample(0, None, domain="a", task_aware=0.0) for _ in range(8)] + mixed() + GOOD) == []


def test_domains_are_told_apart_and_named_safely():
    watch, said = Watch(), []
    for _ in range(CONSTANT_ROLLOUTS):
        said = rollout(watch, [*term(0.0, domain="[/x]\x1b[2J"), *mixed("math"), *term(0.0, domain="own")])
    assert len(said) == 1 and r"of domain [/x]\x1b[2J, own in" in said[0]
    watch = Watch()
    for _ in range(CONSTANT_ROLLOUTS):
        said = rollout(watch, [*term(0.0, domain="a"), *term(0.0, domain="b"), *term(1.0, domain="a", name="format")])
    assert ["of all domains" in text for text in said] == [False, True], said
    watch = Watch()
    for _ in range(CONSTANT_ROLLOUTS):
        said = rollout(watch, [*term(0.0, domain="a"), *term(1.0, domain="b")])
    assert len(said) == 2, "two values, two lines"


def test_a_domain_may_miss_rollouts():
    watch = Watch()
    for _ in range(CONSTANT_ROLLOUTS - 1):
        rollout(watch, term(0.0))
        assert rollout(watch, GOOD) == []
    assert len(rollout(watch, term(0.0))) == 1


def step(grad_norm: float = 1.0, entropy: float = 1.0, tokens: int = 100) -> Any:
    return SimpleNamespace(grad_norm=grad_norm, entropy=entropy, response_tokens=tokens)


def test_a_gradient_of_zero():
    watch = Watch()
    assert watch.updated([step(0.0)] * (NO_GRADIENT_STEPS - 1)) == []
    assert watch.updated([step(1e-30)]) == [] and watch.updated([step(0.0)] * (NO_GRADIENT_STEPS - 1)) == []
    (said,) = watch.updated([step(0.0)])
    assert said == f"the gradient was 0 in the last {NO_GRADIENT_STEPS} steps: nothing is learnt"
    assert watch.updated([step(0.0)]) == [] and watch.updated([step()]) == []
    assert watch.updated([step(float("nan"))] * 9) == [], "skipped, and told elsewhere"
    assert len(watch.updated([step(0.0)] * 4, entropy=False)) == 1, "in stage 0 too"


def test_the_entropy_falls_by_half():
    watch = Watch()
    assert watch.updated([step(entropy=1.0), step(entropy=0.8)]) == []
    (said,) = watch.updated([step(entropy=0.45), step(entropy=0.45)])
    assert "from 0.9 to 0.45 nats a token in one iteration" in said
    assert watch.updated([step(entropy=0.2)]) == [], "the same fall goes on"
    assert watch.updated([step(entropy=0.15)]) == [] and len(watch.updated([step(entropy=0.05)])) == 1
    assert watch.updated([step(entropy=0.01)]) == watch.updated([step(entropy=0.09)]) == []
    assert watch.updated([step(entropy=0.09)]) == watch.updated([step(entropy=0.001)]) == [], "little is left to fall"


def test_the_entropy_of_an_iteration_is_that_of_its_tokens():
    watch = Watch()
    watch.updated([step(entropy=1.0)])
    assert watch.updated([step(entropy=0.1, tokens=10), step(entropy=0.9, tokens=990)]) == []
    assert len(watch.updated([step(entropy=0.1, tokens=990), step(entropy=0.9, tokens=10)])) == 1


def test_an_entropy_that_is_no_number_is_not_compared_or_kept():
    watch = Watch()
    assert [watch.updated([step(float("nan"), entropy=value)]) for value in (1.0, float("nan"), 0.1)] == [[], [], []]
    watch.updated([step(entropy=float("inf"))])
    assert watch.state_dict()["entropy"] is None, "a checkpoint is JSON"


def test_stage_0_says_nothing_of_entropy():
    watch = Watch()
    assert not any(watch.updated([step(entropy=value)], entropy=False) for value in (6.0, 1.0, 0.1))


def test_a_resumed_run_says_what_an_uninterrupted_one_does():
    flat = [sample(i // 2, 0.0, task_aware=0.0) for i in range(8)]
    course = [term(0.0), flat, flat, term(0.0), flat, [*CUT, *term(0.0)], flat]
    steps = [[step(0.0, 2.0 ** -i)] for i in range(7)]

    def run(cut_at: int) -> list[list[str]]:
        watch, said = Watch(), []
        for i, (samples, results) in enumerate(zip(course, steps, strict=True)):
            if i == cut_at:
                state = json.loads(json.dumps(watch.state_dict()))
                watch = Watch()
                watch.load_state_dict(state)
            said.append([*rollout(watch, samples), *watch.updated(results)])
        return said

    whole = run(-1)
    assert sum(map(len, whole)) == 6, whole
    assert all(run(cut) == whole for cut in range(7))
    watch = Watch()
    watch.load_state_dict(None)  # of an older checkpoint
    assert watch.updated([step()]) == []
