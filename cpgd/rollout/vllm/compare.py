"""Whether an engine computes with the weights that it was sent: SHA-256 of each tensor, of the bytes that went out.

Looked at are one layer of every kind of tensor in turn, and all of them at the first sync with a server and every N-th.
So a tensor that never arrives is seen within as many syncs as there are layers, at any learning rate. Buffers are not
looked at: they do not change.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from cosmo_rl.data.errors import UserError

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


class WeightsDiffer(UserError):
    """A server computes with other weights than the trainer has: the run stops."""


class Comparison:
    """Of every sync with what the engine then has: `begin`, `add` each tensor that is sent, `check`."""

    def __init__(self, verify_every: int) -> None:
        """
        Args:
            verify_every: syncs between comparisons of all tensors.
        """
        self.verify_every = verify_every
        self.kept: dict[str, torch.Tensor] = {}
        """What is compared after this sync, on the CPU."""
        self._turn, self._names = 0, list[str]()
        self._sent: list[str] = []

    def begin(self, *, everything: bool = False) -> None:
        """A sync, or a new try of one. `everything`: a server is new, and all tensors are to be compared."""
        self.kept, self._sent = {}, []
        everything |= self._turn % self.verify_every == 0
        self._wanted = None if everything else chosen(self._names, self._turn)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """A full tensor as it is sent."""
        self._sent.append(name)
        if self._wanted is None or name in self._wanted:
            self.kept[name] = tensor.to("cpu", copy=True)

    def names(self) -> list[str]:
        """Of the tensors to ask for, once all were sent. A tied head comes once, and is to be held in both places."""
        if HEAD not in self._sent and EMBEDDING in self.kept:
            self.kept[HEAD] = self.kept[EMBEDDING]
        return list(self.kept)

    def check(self, where: str, workers: Sequence[dict[str, Any]]) -> None:
        """Compare what the workers of an engine say, `cosmo_digests` of `names`.

        Raises:
            WeightsDiffer: one computes with other weights.
        """
        for found in workers:
            at, of = found["tp_rank"], found["tp_size"]
            wrong = [name for name, tensor in self.kept.items() if not same(tensor, found["tensors"].get(name), at, of)]
            if wrong:
                raise WeightsDiffer(
                    f"{where} computes with other weights than the trainer in {len(wrong)} of {len(self.kept)} tensors "
                    f"compared after a sync, as {wrong[0]} (worker {at} of {of}): they did not arrive, were changed "
                    "since, or are quantized or cast there; give it the trainer's --dtype")

    def end(self) -> None:
        """All was as sent: the next sync looks at other layers."""
        self._turn, self._names, self.kept = self._turn + 1, self._sent, {}


def same(tensor: torch.Tensor, parts: Sequence[Sequence[Any]] | None, rank: int, size: int) -> bool:
    """Whether worker `rank` of `size` holds its part of a full tensor.

    Args:
        parts: [SHA-256, shape, first row or None] of each of equal pieces of the tensor; None: it has none.
    """
    if parts is None:
        return False
    for piece, (digest, shape, start) in zip(tensor.chunk(len(parts)), parts, strict=True):
        mine = shard(piece, shape, start, rank, size)
        if mine is None or sha256(mine) != digest:
            return False
    return True


def shard(tensor: torch.Tensor, shape: Sequence[int], start: int | None, rank: int, size: int) -> torch.Tensor | None:
    """The part of this shape that worker `rank` of `size` holds; None: there is none. Workers more than key heads share
    these, so there may be fewer parts than workers."""
    differ = [d for d, (full, part) in enumerate(zip(tensor.shape, shape, strict=False)) if full != part]
    if tensor.ndim != len(shape) or len(differ) > 1:
        return None
    if not differ:
        return tensor
    full, part = tensor.shape[differ[0]], shape[differ[0]]
    if start is None:
        if part == 0 or full % part or size % (full // part):
            return None
        start = rank // (size // (full // part)) * part
    return tensor.narrow(differ[0], start, part) if start + part <= full else None


def sha256(tensor: torch.Tensor) -> str:
    """Of the bytes, 0 for -0; as the worker's digest."""
    tensor = (tensor.detach() + 0.0).cpu().contiguous()
    return hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().data).hexdigest()


def chosen(names: Iterable[str], turn: int) -> set[str]:
    """One tensor of every kind, a kind being a name without its layer's number; of another layer each turn."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\.\d+\.", ".N.", name), []).append(name)
    return {layers[turn % len(layers)] for layers in kinds.values()}
