"""What flows through a rollout: Request -> Response -> Sample. Each is frozen, and complete when it is made.

So an engine may fill them late, out of order or one step stale, and a judge sees the very object that is trained on.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from cosmo_rl.data.collate import EncodedPrompt
from cosmo_rl.data.schema import Row


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One response to be sampled; made by whoever draws the rows."""

    row: Row
    """Its messages and pictures as they are: what a server is sent."""
    prompt: EncodedPrompt
    """The same, encoded: what this process runs."""
    k: int
    """Index in the prompt's group."""
    seed: int
    """63-bit seed of this request's own noise; see `request_seed`."""

    @property
    def id(self) -> str:
        """Name in logs: row id and index in its group."""
        return f"{self.row.id}#{self.k}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Response:
    """One sampled response; made by the engine."""

    request: Request
    ids: np.ndarray
    """(L,) int64, the closing <|im_end|> included when it was sampled; L >= 1."""
    logprobs: np.ndarray
    """(L,) float32, nats, at the sampling temperature, suppressed tokens excluded."""
    text: str
    """`ids` decoded without special tokens."""
    finish_reason: str
    """"stop" or "length"."""
    version: int
    """Version of the weights that sampled it."""

    @property
    def row(self) -> Row:
        return self.request.row

    @property
    def id(self) -> str:
        return self.request.id


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """A response and its reward; made by the scorer, so there is none whose reward is still to come."""

    response: Response
    reward: float | None
    """Combined reward in [0, 1]; None: it failed, and the sample is outside its group."""
    terms: dict[str, float]
    """Value of each reward term that applied."""
    failure: str = ""
    """Why the reward failed."""

    @property
    def row(self) -> Row:
        return self.response.row

    @property
    def id(self) -> str:
        return self.response.id


Group = tuple[Sample, ...]
"""The samples of one prompt."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """What one iteration is trained on; made by `collect`, on every rank the same."""

    version: int
    """Version of the weights that sampled it: the ratio is 1 while the policy still has these."""
    groups: tuple[Group, ...]
    """In prompt order; with dynamic sampling some are of prompts that took another's place."""
    advantages: tuple[np.ndarray, ...]
    """(K,) float64 of each group; 0 for a failed sample."""
    first: tuple[Group, ...]
    """Of the prompts drawn first, kept or not: how the policy does on the mixture."""
    sampled_tokens: int
    """Of all responses, dropped ones too."""
    refill: dict[str, object]
    """For metrics.jsonl: rounds, groups dropped and groups left without a signal by domain; {} without rounds."""
    filtered: bool = False
    """Whether responses that the length limit cut off are left out of the loss."""

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.groups for sample in group]

    def teaches(self, sample: Sample) -> bool:
        """Whether the sample takes part in the loss."""
        return sample.reward is not None and not (self.filtered and sample.response.finish_reason == "length")


def request_seed(seed: int, stage: int, step: int, prompt_id: str, k: int) -> int:
    """63-bit seed from blake2b(run seed, stage, step, prompt id, k): the same noise in any batch and after a resume."""
    text = f"{seed}/{stage}/{step}/{prompt_id}/{k}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
