"""What the trainer asks of a rollout engine: take the policy's weights, sample responses, close.

The hf engine (`hf.py`) is always there. An engine keeps nothing computed from older weights past a `sync`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch

from cosmo_rl.data.collate import EncodedPrompt
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import Row

from .values import Request, Response


class Engine(Protocol):
    """A sampler of responses. `stream` is called by each rank for itself and holds no collective."""

    def sync(self, weights: Callable[[], Iterable[tuple[str, torch.Tensor]]], version: int) -> None:
        """Take new weights by Hugging Face name; responses then carry `version`.

        What `weights()` returns (`model.weights.full_state_dict`) gathers shards as it is read: all ranks sync
        together, each reads it to the end and keeps no tensor of it. It may be called again until the next sync.
        """
        ...

    def check(self, samples: Iterable[tuple[Row, EncodedPrompt]]) -> None:
        """Prove on a few prompts, after a sync, that the engine sees what the trainer sees; all ranks together."""
        ...

    def stream(self, requests: Sequence[Request], *, greedy: bool = False,
               batch_size: int | None = None) -> Iterator[list[Response]]:
        """One response per request, some at a time as they are done, in any order.

        Args:
            requests: any number of them; each meets the noise of its own `seed`, whatever is beside it.
            greedy: take the likeliest token instead of sampling; log-probs stay those of the sampling temperature.
            batch_size: requests decoded together; None: the engine's own.

        A request is left unanswered where what was at it has died: `recover`, then ask again.
        """
        ...

    def recover(self) -> None:
        """Bring back what has died, with the weights of the last sync; all ranks together."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def generate(engine: Engine, requests: Sequence[Request], *, greedy: bool = False,
             batch_size: int | None = None) -> list[Response]:
    """`Engine.stream` to its end: the responses in the order of the requests."""
    found = {id(response.request): response
             for part in engine.stream(requests, greedy=greedy, batch_size=batch_size) for response in part}
    return [found[id(request)] for request in requests]


def form_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of requests in batches of equal or near prompt length: what is decoded together.

    Formed once over the requests of all ranks, then handed out as whole batches: an engine that forms batches again
    from whole batches, given in this order, finds the same ones, so a response has the same bits at any number of
    ranks.

    Args:
        lengths: prompt tokens of each request.
        batch_size: requests per batch, >= 1; only the last batch is smaller.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; give at least 1")
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
