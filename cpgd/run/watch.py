"""What a run says by itself when it seems to learn nothing, or something else than it should.

    no signal     every group of a rollout has equal rewards, or fewer than two that did not fail: all advantages are 0
    constant      a reward term has had one value for all responses of a domain in CONSTANT_ROLLOUTS rollouts, as one
                  does whose function fails and returns 0
    no gradient   its norm was 0 in NO_GRADIENT_STEPS steps in a row
    entropy       it has fallen by half from one iteration to the next
    cut off       most responses of a rollout have reached the longest length

Each is said once, and again only after it was not so; of a term that all responses of a domain earn, once a run.
The state is part of a checkpoint, so that a resumed run says what an uninterrupted one does.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from cosmo_rl.data.terminal import printable

from ..rollout.values import Rollout, Sample
from ..update import StepResult

CONSTANT_ROLLOUTS = 5
CONSTANT_RESPONSES = 32
"""Of these rollouts together, at least."""
NO_GRADIENT_STEPS = 4
LEAST_ENTROPY = 0.1
"""In nats a token: below it a policy is sure already, and half of it is noise."""
SPAN = 1e-6
"""Largest difference of values that count as one, as of the rewards of a group."""


class Watch:
    """Watches a stage; the same on all ranks, since all see the same samples and sums."""

    def __init__(self) -> None:
        self.on: set[str] = set()
        """What was said and still holds."""
        self.no_gradient = 0
        """Steps in a row."""
        self.entropy: float | None = None
        """Of the last iteration, nats a token."""
        self.constant: dict[str, dict[str, list[float]]] = {}
        """{term: {domain: [value, rollouts, responses]}} of terms with one value in their last rollouts."""

    def rollout(self, rollout: Rollout, max_new_tokens: int) -> list[str]:
        """What is to be said of a rollout: of what is trained on, and of the prompts drawn first."""
        first = [sample for group in rollout.first for sample in group]
        groups = [sum(sample.reward is not None for sample in group) for group in rollout.groups]
        bare = sum(count < 2 for count in groups)
        cut = sum(s.response.finish_reason == "length" for s in first)
        said = [
            *self._once("no signal", not any(advantages.any() for advantages in rollout.advantages),
                        f"all {len(groups)} groups of the rollout have equal rewards and advantage 0, so it teaches "
                        "nothing; samples.jsonl shows responses and terms"),
            *self._once("lost", bare > 0 and 2 * bare >= len(groups),
                        f"{bare} of {len(groups)} groups of the rollout have fewer than two scored responses, so they "
                        "have no advantage; samples.jsonl shows some of the failures"),
            *self._once("cut off", 2 * cut > len(first),
                        f"{cut} of {len(first)} responses of the rollout were cut off at --rollout.max-new-tokens "
                        f"{max_new_tokens}"),
        ]
        return said + self._constants([s for s in first if s.reward is not None])

    def updated(self, results: Sequence[StepResult], entropy: bool = True) -> list[str]:
        """What is to be said of an iteration's steps.

        Args:
            entropy: look at it; in stage 0 it is meant to fall.
        """
        for result in results:
            self.no_gradient = self.no_gradient + 1 if result.grad_norm == 0 else 0
        said = self._once("no gradient", self.no_gradient >= NO_GRADIENT_STEPS,
                          f"the gradient was 0 in the last {self.no_gradient} steps: nothing is learnt")
        if not entropy:
            return said
        tokens = sum(result.response_tokens for result in results)
        before, now = self.entropy, sum(r.entropy * r.response_tokens for r in results) / max(tokens, 1)
        self.entropy = now if math.isfinite(now) else None  # of a step that was skipped
        fell = before is not None and before >= LEAST_ENTROPY and now <= before / 2
        return said + self._once("entropy", fell, f"the entropy has fallen from {before or 0:.3g} to {now:.3g} nats a "
                                 "token in one iteration: the policy may be collapsing")

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"on": sorted(self.on), "no_gradient": self.no_gradient, "entropy": self.entropy,
                "constant": self.constant}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue where `state` was taken; None: of a checkpoint that has none."""
        if state is not None:
            self.on, self.no_gradient, self.entropy = set(state["on"]), state["no_gradient"], state["entropy"]
            self.constant = state["constant"]

    def _once(self, kind: str, holds: bool, text: str) -> list[str]:
        new = holds and kind not in self.on
        (self.on.add if holds else self.on.discard)(kind)
        return [text] if new else []

    def _constants(self, samples: Sequence[Sample]) -> list[str]:
        values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for sample in samples:
            for term, value in sample.terms.items():
                values[term][sample.row.domain].append(value)
        said = []
        for term, by_domain in sorted(values.items()):
            new: dict[float, list[str]] = defaultdict(list)
            for domain, found in sorted(by_domain.items()):
                known = self.constant.setdefault(term, {})
                value, rollouts, responses = known.get(domain, [found[0], 0, 0])
                if max(*found, value) - min(*found, value) > SPAN:
                    value, rollouts, responses = found[0], 0, 0
                if max(found) - min(found) <= SPAN:
                    rollouts, responses = rollouts + 1, responses + len(found)
                known[domain] = [value, rollouts, responses]
                lasting = rollouts >= CONSTANT_ROLLOUTS and responses >= CONSTANT_RESPONSES
                earned = lasting and value == 1  # nearly so from then on: once a run
                if self._once(f"constant {term} {domain}", lasting and not earned, term) or (
                        earned and self._once(f"earned {term} {domain}", True, term)):
                    new[value].append(domain)
            said += [f"reward term {term} has been {value:g} for every response of {self._where(term, domains)} in "
                     f"{CONSTANT_ROLLOUTS} rollouts or more: it tells no response from another{_meaning(value)}"
                     for value, domains in new.items()]
        return said

    def _where(self, term: str, domains: Sequence[str]) -> str:
        every = len(domains) == len(self.constant[term]) > 1
        return "all domains" if every else f"domain {', '.join(map(printable, domains))}"


def _meaning(value: float) -> str:
    if value == 0:
        return "; see samples.jsonl whether its function works, or asks for what the policy never does"
    return "; all have earned it" if value == 1 else ""
