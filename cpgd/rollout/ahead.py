"""The next rollout, made while the policy is trained on this one: `--rollout.staleness 1`.

Its responses are of the weights before these updates, and it says so (`Rollout.version`). It is made in a thread whose
collectives go by a group of their own, so that they do not meet those of training.
"""

import threading
from concurrent.futures import Future

import torch.distributed as dist

from cosmo_rl.model.parallel import beside, world

from .collect import Clock, Collector
from .values import Rollout


class Ahead:
    """At most one rollout under way; all ranks start and take it together."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._group = dist.new_group(backend="gloo") if world() > 1 else None
        self._coming: Future[Rollout] | None = None

    @property
    def under_way(self) -> bool:
        """Whether `take` has something to return."""
        return self._coming is not None

    def start(self, version: int, step: int) -> None:
        """Begin the rollout of the engine's weights, `version`, that is trained on from `step` on."""
        assert self._coming is None
        self._coming = Future()
        threading.Thread(target=self._make, args=(self._coming, version, step), name="ahead", daemon=True).start()

    def take(self) -> Rollout:
        """Wait for it; raises what it raised."""
        assert self._coming is not None
        coming, self._coming = self._coming, None
        return coming.result()

    def _make(self, coming: "Future[Rollout]", version: int, step: int) -> None:
        try:
            with beside(self._group):
                coming.set_result(self._collector.collect(version, Clock(), step))
        except BaseException as error:  # raised by `take`, in the main thread
            coming.set_exception(error)
