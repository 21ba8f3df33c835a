"""What flows through one RL step: requests, responses, scored samples, updates.

Order of a step: prompts -> Request -> Response -> Sample (reward, advantage) -> updates -> micro-batches
(`cosmo_rl.data.collate.MicroBatch`). Everything here is host data; tensors appear only in the micro-batch.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np

from cosmo_rl.data.collate import EncodedPrompt
from cosmo_rl.data.schema import Row


@dataclass(frozen=True, slots=True)
class Request:
    """One response to be sampled."""

    prompt: EncodedPrompt
    k: int
    """Index in the prompt's group."""
    seed: int
    """63-bit seed of this request's own noise; see `request_seed`."""


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response."""

    ids: np.ndarray
    """(L,) int64, the closing <|im_end|> included when it was sampled; L >= 1."""
    logprobs: np.ndarray
    """(L,) float32, nats, at the sampling temperature, suppressed tokens excluded."""
    finish_reason: str
    """"stop" or "length"."""
    version: int
    """Version of the weights that sampled it."""


@dataclass(slots=True)
class Sample:
    """A response with all that the update needs."""

    row: Row
    prompt: EncodedPrompt
    group: int
    """Index of the prompt in the rollout."""
    k: int
    response: Response
    text: str
    """Decoded response without special tokens."""
    reward: float | None = None
    """Combined reward in [0, 1]; None: failed, outside the group."""
    terms: dict[str, float] = field(default_factory=dict)
    """Value of each reward term that applied."""
    failure: str = ""
    """Why the reward failed."""
    advantage: float = 0.0
    """w(x) * (reward - baseline)."""

    @property
    def id(self) -> str:
        """Name of the sample in logs: prompt id and index in its group."""
        return f"{self.row.id}#{self.k}"


def request_seed(seed: int, stage: int, step: int, prompt_id: str, k: int) -> int:
    """63-bit seed from blake2b(run seed, stage, step, prompt id, k): the same noise in any batch and after a resume."""
    text = f"{seed}/{stage}/{step}/{prompt_id}/{k}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
