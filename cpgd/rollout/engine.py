"""What the trainer asks of a rollout engine: take the policy's weights, sample responses, close.

The hf engine (`hf.py`) is always there. An engine keeps nothing computed from older weights past a `sync`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from cosmo_rl.data.collate import EncodedPrompt
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import Row
from cosmo_rl.model.cache import cache_bytes
from cosmo_rl.model.parallel import rank, world

from ..config import RolloutConfig
from .values import Request, Response

B = TypeVar("B")
Fits = Callable[[int, int], bool]
"""Whether this many requests, whose longest prompt has this many tokens, may be one call; if not, no more or longer."""


class Lost(Exception):
    """What was at some of the requests has died; the others are answered. `Engine.recover`, then ask for these."""


class Replica(NamedTuple):
    """The ranks that sample as one are given the same requests."""

    index: int
    """Of this rank's replica."""
    count: int
    """Of replicas."""
    leads: bool
    """Whether this rank answers for its replica."""


def alone() -> Replica:
    """Each rank samples for itself."""
    return Replica(rank(), world(), True)


class Engine(Protocol):
    """A sampler of responses. `stream` is called by each rank for itself and holds no collective of the trainer's."""

    @property
    def replica(self) -> Replica:
        """Of this rank."""
        ...

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

        Raises:
            Lost: at the end, if some have no response.
        """
        ...

    def rest(self) -> bool:
        """Free what can be freed until the next sync; whether the weights are gone too."""
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


def cache_fits(rollout: RolloutConfig, model_config: Any, dtype: torch.dtype) -> Fits:
    """Whether a call's KV cache, all its prompts and responses at their longest, stays within `cache_gib`."""
    tokens = int(rollout.cache_gib * 2**30) // cache_bytes(model_config, dtype)
    return lambda requests, longest: requests * (longest + rollout.max_new_tokens) <= tokens


def form_batches(lengths: Sequence[int], batch_size: int, fits: Fits = lambda requests, longest: True,
                 ) -> list[list[int]]:
    """Indices of requests in batches of equal or near prompt length: what is decoded together.

    Formed once over the requests of all ranks, then handed out as whole batches: an engine that forms batches again
    from whole batches, given in this order, finds the same ones (one that has ended early has no room for a longer
    prompt either), so a response has the same bits wherever it is sampled.

    Args:
        lengths: prompt tokens of each request.
        batch_size: requests per batch at most, >= 1.
        fits: ends a batch early. A request that does not even fit alone is a batch.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; give at least 1")
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if not batches or len(batches[-1]) == batch_size or not fits(len(batches[-1]) + 1, lengths[i]):
            batches.append([])
        batches[-1].append(i)
    return batches


def for_all_ranks(form: Callable[[int], list[B]], batch_size: int, requests: int, ranks: int) -> list[B]:
    """The batches that `form` makes with `batch_size`, or smaller ones where some ranks would get none.

    So they are the same at any number of ranks up to that of the batches; with more ranks, and more only, responses
    are of other batches, and differ in the last bits of logits as those of another `batch_size` do.
    """
    batches = form(batch_size)
    return batches if len(batches) >= min(ranks, requests) else form(-(-requests // ranks))
