"""The canary: it stops a run whose engine does not sample from the policy that is trained.

Each rollout is read in full by the policy that should have sampled it, failed samples and dropped groups too. Besides
the versions of the responses, two things are looked at, of which each sees what is hidden from the other:

    gap      |trainer - engine| log-prob of the same tokens, as a mean over one response. Other weights, positions or
             images show, and log-probs of another distribution. Over one response, since a fault of a few rows, as of
             those with pictures, would drown in the mean of a rollout, and the 99th percentile of tokens is noise.
    sampler  z = sum(-log p - H) / standard error over all tokens, from the trainer's log-probs and entropies alone. A
             temperature or a top-p that the engine draws with, and leaves out of its log-probs, shows here only.

Under honest sampling -log p - H has mean 0 given what precedes its token, so that tokens, though of one response, are
not correlated, and a response may end where it likes. It has not once responses are chosen by their rewards: only the
prompts drawn first count, whole. Most tokens of a trained policy are nearly sure: -log p - H is then a small negative
number, and once in a thousand tokens a large one. While none has come the spread observed is far too small, so that
such a token counts with the spread that two outcomes of its entropy have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cosmo_rl.data.errors import UserError
from cosmo_rl.model.parallel import together

from ..config import RolloutConfig
from ..rollout.values import Rollout, Sample
from ..update import Reading

LIMITS = {"float32": (1e-4, 5e-4), "bfloat16": (0.02, 0.2)}
"""Least and largest gap of a response that passes, by compute dtype, nats. Measured on tiny, hf engine, the largest of
384 responses: float32 9e-7 (4e-6 in ten runs), bfloat16 5e-3 (0.034 with SmolLM2-135M, of 64 short ones);
vLLM in float32 stays below 1e-5 a token. M-RoPE's height and width swapped make 4e-3, which in bfloat16 is noise."""
NOISE_FACTOR = 5
"""Between these the limit is this often the largest gap of the run's first rollout, whose weights are equal."""
Z_LIMIT = 6.0
"""Honest runs on tiny stayed within 3.8 (ten of 60 steps), simulated policies that are nearly sure within 4.6."""
BIAS_LIMIT = 0.01
"""Share of the entropy that mean(-log p - H) has to reach as well: over millions of tokens rounding has a z too."""
KEEP = 0.9
"""What the sums of z keep of the rollouts before: some ten count."""
SURE = 0.1
"""Entropy in nats below which a token is nearly sure."""
RENORMALISED, ENOUGH = 0.99, 50
"""Share of the tokens that differ from which, and number of them for which, the engine's being likelier is no chance.
"""
IMPOSSIBLE = 1e6
"""Nats: the policy gives a suppressed token a log-prob of some -1e30."""


class CanaryError(UserError):
    """Engine and trainer disagree about the same tokens, or about how they are drawn."""


class Seen(NamedTuple):
    """What is kept of one response, on all ranks."""

    sample: Sample
    ahead: np.ndarray
    """(L,) float32, log-prob of the engine minus that of the trainer."""
    surprise: float
    """Sum of -log p - H."""
    variance: float
    """Of `surprise`."""
    entropy: float
    """Sum of H."""

    @property
    def gap(self) -> float:
        return float(np.abs(self.ahead).mean())


@dataclass(slots=True, kw_only=True)
class Sampler:
    """Sums over rollouts, each counting KEEP times as much as the one after it."""

    surprise: float = 0.0
    variance: float = 0.0
    entropy: float = 0.0

    def add(self, seen: Sequence[Seen]) -> None:
        self.surprise = KEEP * self.surprise + sum(one.surprise for one in seen)
        self.variance = KEEP**2 * self.variance + sum(one.variance for one in seen)
        self.entropy = KEEP * self.entropy + sum(one.entropy for one in seen)

    @property
    def z(self) -> float:
        return self.surprise / self.variance**0.5 if self.variance > 0 else 0.0

    @property
    def off(self) -> bool:
        return abs(self.z) > Z_LIMIT and abs(self.surprise) > BIAS_LIMIT * self.entropy


@dataclass(slots=True)
class Canary:
    """Watches a stage; every method is called by all ranks together, and all see the same."""

    config: RolloutConfig
    dtype: str
    noise: float | None = None
    """Largest gap of a response in the first rollout."""
    sampler: Sampler = field(default_factory=Sampler)

    @property
    def limit(self) -> float:
        """Largest gap of a response that passes, nats."""
        if self.config.canary_limit:
            return self.config.canary_limit
        least, largest = LIMITS[self.dtype]
        return min(max(NOISE_FACTOR * (self.noise or 0.0), least), largest)

    def check(self, rollout: Rollout, readings: Sequence[Reading], step: int) -> dict[str, Any]:
        """What metrics.jsonl says of the engine.

        Args:
            readings: of every sample of the rollout. step: that is under way.
        Raises:
            CanaryError: on every rank; names the step, samples and the likely cause.
        """
        seen = _gathered(readings)
        gaps = np.array([one.gap for one in seen])
        if self.noise is None:
            self.noise = float(gaps[np.isfinite(gaps)].max(initial=0.0))
        first = {id(sample) for group in rollout.first for sample in group}
        drawn = [one for one in seen if id(one.sample) in first]
        bad = [one for one, gap in zip(seen, gaps, strict=True)  # NaN is bad, and would stay in the sums
               if not gap <= self.limit or not np.isfinite([one.surprise, one.variance]).all()]
        self.sampler.add(drawn)
        if bad:
            raise CanaryError(self._told(bad, seen, drawn, step))
        if self.sampler.off:
            raise CanaryError(self._told_of_sampler(drawn, step))
        ahead = np.concatenate([one.ahead for one in seen])
        tokens = np.abs(ahead)
        told: dict[str, Any] = {
            "engine_gap": {"mean": float(tokens.mean(dtype=np.float64)), "p99": float(np.quantile(tokens, 0.99)),
                           "max": float(tokens.max()), "response": float(gaps.max())},
            "sampler_z": self.sampler.z}
        if cap := self.config.correction:
            ratios = np.exp(-ahead.astype(np.float64))
            told["correction"] = {"mean": float(np.minimum(ratios, cap).mean()),
                                  "truncated": float((ratios > cap).mean())}
        return told

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"noise": self.noise, "sampler": asdict(self.sampler)}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue where `state` was taken; None: of a checkpoint that has none."""
        if state is not None:
            self.noise, self.sampler = state["noise"], Sampler(**state["sampler"])

    def _told(self, bad: Sequence[Seen], seen: Sequence[Seen], drawn: Sequence[Seen], step: int) -> str:
        source = "--rollout.canary-limit" if self.config.canary_limit else (
            f"for {self.dtype}, where the first rollout had {self.noise:.2g}; --rollout.canary-limit overrides it")
        worst = sorted(bad, key=lambda one: -np.nan_to_num(one.gap, nan=np.inf))
        return (f"engine and trainer disagree on {len(bad)} of {len(seen)} responses at step {step}, mean |difference "
                f"of log-probs| up to {worst[0].gap:.3g} nats, beyond {self.limit:.3g} ({source}): "
                f"{', '.join(one.sample.id for one in worst[:5])}; {self._cause(bad, seen, drawn)}")

    def _cause(self, bad: Sequence[Seen], seen: Sequence[Seen], drawn: Sequence[Seen]) -> str:
        ahead = np.concatenate([one.ahead for one in seen])
        if not (np.isfinite(ahead).all() and np.isfinite([one.surprise for one in bad]).all()):
            return "log-probs or entropies are not finite: the weights diverged, or the engine's reply is damaged"
        if ahead.max() > IMPOSSIBLE:
            return ("the engine sampled a token that the policy never does, as the placeholder of a picture: its "
                    "suppressed tokens are not those of the trainer")
        differing = ahead[np.abs(ahead) > self.limit]
        likelier = float((differing > 0).mean()) if len(differing) else 0.0
        surprise = sum(one.surprise for one in drawn)
        renormalised = len(differing) >= ENOUGH and (likelier >= RENORMALISED or (likelier > 0.8 and surprise < 0))
        if renormalised or (self.sampler.off and surprise < 0):
            return ("what the engine draws is likelier by its own account or to the policy, as where fewer tokens are "
                    "left to draw from: look at its sampling settings, temperature, top-p, top-k, min_p, min_tokens, "
                    "penalties")
        pictures = [bool(one.sample.row.images) for one in bad]
        text = [one for one in seen if not one.sample.row.images]
        if all(pictures) and text:
            return ("rows without a picture agree, so that positions, images or features kept of them differ, not the "
                    "language model's weights")
        return "the engine holds other weights" + (", positions or images" if any(pictures) else " or positions")

    def _told_of_sampler(self, drawn: Sequence[Seen], step: int) -> str:
        sampler = self.sampler
        side = "likelier" if sampler.surprise < 0 else "less likely"
        worst = sorted(drawn, key=lambda one: one.surprise, reverse=sampler.surprise > 0)[:5]
        return (f"the engine draws {side} tokens than the policy: at step {step} mean -log p is "
                f"{abs(sampler.surprise / sampler.entropy):.1%} {'below' if sampler.surprise < 0 else 'above'} the "
                f"entropy over the last rollouts, z = {sampler.z:.1f} (beyond {Z_LIMIT:g} the run stops), as in "
                f"{', '.join(one.sample.id for one in worst)}; its log-probs agree, so look at its sampling settings: "
                "temperature, top-p, top-k, min_p, min_tokens, penalties, greedy")


def _gathered(readings: Sequence[Reading]) -> list[Seen]:
    """All responses of all ranks, in the order of the readings and of their samples."""
    def mine() -> dict[tuple[int, int], tuple]:
        found = {}
        for number, (samples, updates, stats) in enumerate(readings):
            for update, values in zip(updates, stats, strict=True):
                ends = np.cumsum([len(samples[i].response.ids) for i in update.members])[:-1]
                parts = [np.split(value.double().cpu().numpy(), ends) for value in values]
                for member, logprobs, entropy in zip(update.members, *parts, strict=False):
                    found[number, member] = _measured(samples[member].response.logprobs, logprobs, entropy)
        return found

    everywhere = {place: part for rank in together(mine) for place, part in rank.items()}
    return [Seen(readings[number].samples[member], *part) for (number, member), part in sorted(everywhere.items())]


def _measured(engine: np.ndarray, logprobs: np.ndarray, entropy: np.ndarray) -> tuple[np.ndarray, float, float, float]:
    """Of one response the fields of Seen."""
    entropy = np.maximum(entropy, 0.0)
    surprise = -logprobs - entropy
    two_outcomes = entropy * np.log1p(1 / np.maximum(entropy, 1e-30))  # within 20 % of their variance, while sure
    variance = np.where(entropy < SURE, np.maximum(surprise**2, two_outcomes), surprise**2)
    ahead = (engine - logprobs).astype(np.float32)
    return ahead, float(surprise.sum()), float(variance.sum()), float(entropy.sum())


def check_versions(rollout: Rollout) -> None:
    """The responses are of the weights that the rollout is of, which the engine was given before.

    Raises:
        CanaryError: some are of others.
    """
    stale = {s.id: s.response.version for group in (*rollout.first, *rollout.groups) for s in group
             if s.response.version != rollout.version}
    if stale:
        name, version = next(iter(stale.items()))
        raise CanaryError(
            f"{len(stale)} responses were sampled with weights of another version than {rollout.version}, as {name} "
            f"with {version}: the engine did not take the last weights; restart it, then repeat the command to "
            "continue from the last checkpoint")


def check_advantages(rollout: Rollout) -> None:
    """Scored samples were compared with scored ones alone: their advantages sum to 0, and those of failed ones are 0.

    Raises:
        CanaryError: a failed sample had a vote.
    """
    for group, advantages in zip(rollout.groups, rollout.advantages, strict=True):
        for sample, advantage in zip(group, advantages, strict=True):
            if sample.reward is None and advantage != 0:
                raise CanaryError(f"{sample.id} has no reward ({sample.failure}), and an advantage of {advantage:.3g}")
    flat = np.concatenate(rollout.advantages)
    if abs(flat.sum()) > 1e-6 * max(np.abs(flat).sum(), 1.0):
        raise CanaryError(f"advantages sum to {flat.sum():.3g} over the scored samples of the rollout, not to 0: a "
                          "failed sample had a vote in its group's mean")
