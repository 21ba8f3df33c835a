"""Visual-Focus: does the thinking look at the image? The formulas are ours: COSMO-RL (arXiv 2510.04196) gives none.

    elements = recall * precision of the key elements that the thinking names
    contrast = clip(mean log p(answer | image) - mean log p(answer | blank image), 0, 1)
or a judge says whether the thinking is grounded in the image: `judge_terms.Grounded`
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from cosmo_rl.data.collate import EncodedPrompt

from ..rollout.values import Response
from .base import Evidence, Failed, NotApplicable, Outcome, Score
from .format import split_thinking, words


class Elements:
    """recall * precision of the row's key elements in the thinking, as whole words; 0 without a thinking.

    Precision is against the key elements of all rows, so listing every element earns nothing. It cannot tell a true
    element that the row does not list from a false one: where key elements are incomplete, `contrast` fits better.
    """

    def __init__(self, vocabulary: Iterable[str]) -> None:
        """
        Args:
            vocabulary: the key elements of all rows; an element may have several words.
        """
        self.vocabulary = {_key(element) for element in vocabulary}
        self.longest = max(map(len, self.vocabulary), default=0)

    async def __call__(self, response: Response) -> Outcome:
        wanted = {_key(element) for element in response.row.key_elements}
        if not response.row.images or not wanted:
            return NotApplicable()
        parts = split_thinking(response.text)
        named = self._named(words(parts[0])) if parts else set()
        hits = len(named & wanted)
        return Score(hits / len(wanted) * hits / len(named) if hits else 0.0)

    def _named(self, text: list[str]) -> set[tuple[str, ...]]:
        """Elements of the vocabulary in `text`, the longest at each place: "traffic light" does not name "light"."""
        named, start = set(), 0
        while start < len(text):
            length = self.longest
            while length and tuple(text[start:start + length]) not in self.vocabulary:
                length -= 1
            if length:
                named.add(tuple(text[start:start + length]))
            start += max(length, 1)
        return named


def contrast(response: Response, evidence: Evidence | None) -> Outcome:
    """How much likelier the image makes the answer, nats per token cut to [0, 1]; 0 without a well-formed answer.

    No `Term`: it waits for the policy. Failed without finite evidence.
    """
    if not response.row.images:
        return NotApplicable()
    if split_thinking(response.text) is None:
        return Score(0.0)
    if evidence is None or not np.isfinite([evidence.seen, evidence.blank]).all():
        return Failed(f"contrast needs finite log-probs of the answer, and got {evidence}; compute them first")
    return Score(min(max(evidence.seen - evidence.blank, 0.0), 1.0))


def blank_prompt(prompt: EncodedPrompt) -> EncodedPrompt:
    """The prompt with its images replaced by the processor's mean colour, which normalises to 0; same tokens."""
    assert prompt.pixel_values is not None, "a prompt without image has no blank twin"
    return replace(prompt, pixel_values=np.zeros_like(prompt.pixel_values))


def _key(element: str) -> tuple[str, ...]:
    return tuple(words(element))
