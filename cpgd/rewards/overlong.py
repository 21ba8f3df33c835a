"""DAPO's overlong reward shaping (arXiv 2503.14476 sec. 3.4): what becomes of responses that the length limit cuts off.

Filter: they leave the loss and its normalisers, as samples without a reward do. Their rewards still count in the mean
and deviation of their group: the paper masks the loss and says nothing of the statistics, and TRL and NeMo RL read it
so.

Soft punishment: the paper adds, to a reward of -1 or 1,

    p = 0  up to M - C tokens,  (M - C - L) / C  from there to M,  -1  beyond;   M = 20,480 and C = 4,096

Here M is max_new_tokens, C the same fifth of it, and rewards are in [0, 1], where a plain sum would have to be cut off
at 0: the longest wrong answer would lose nothing. So

    reward = (R + (1 + p) / 2) / 1.5

with the reward R of all terms. It is in [0, 1], and the paper's sum, 2 R - 1 + p, but for a shift and a scale, which
advantages over the deviation of the group do not see; the others are two thirds of R's where lengths are alike.
"""

from dataclasses import replace

from ..rollout.values import Sample

CACHE = 0.2
"""Share of max_new_tokens over which the reward falls."""


def punished(sample: Sample, max_new_tokens: int) -> Sample:
    """The sample with its length in its reward, and 1 + p as a term; one without a reward as it is."""
    if sample.reward is None:
        return sample
    length = min((max_new_tokens - len(sample.response.ids)) / (CACHE * max_new_tokens), 1.0)
    return replace(sample, reward=(sample.reward + length / 2) / 1.5, terms={**sample.terms, "length": length})
