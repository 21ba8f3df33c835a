"""The rollouts of a run, one behind the other, or with `--rollout.staleness 1` one ahead of the updates.

A rollout that is made while the policy is trained on the one before is of the weights before these updates, and says so
(`Rollout.version`). It is made in a thread whose collectives go by a group of their own, so that they do not meet those
of training.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future

import torch.distributed as dist

from cosmo_rl.model.parallel import beside, world

from .collect import Clock, Collector, timed
from .values import Rollout


class Rollouts:
    """Gives each iteration its rollout; all ranks call it together."""

    def __init__(self, collector: Collector, sync: Callable[[], None], staleness: int) -> None:
        """
        Args:
            sync: gives the engine the policy's weights, if it does not have them.
            staleness: 0, or 1 to sample ahead.
        """
        self._collector, self._sync, self._staleness = collector, sync, staleness
        self._group = dist.new_group(backend="gloo") if staleness and world() > 1 else None
        self._coming: Future[Rollout] | None = None

    def next(self, step: int, clock: Clock, ahead_of: int | None) -> Rollout:
        """The rollout that the policy of `step` is trained on.

        Args:
            ahead_of: step at which the one after it is trained on, if that may be begun now.
        """
        with timed(clock, "rollout"):
            if self._coming:
                coming, self._coming = self._coming, None
                rollout = coming.result()
            else:
                self._sync()
                rollout = self._collector.collect(step, clock)
            if self._staleness and ahead_of is not None:
                self._sync()
                self._coming = Future()
                threading.Thread(target=self._make, args=(self._coming, step, ahead_of), daemon=True).start()
        return rollout

    def _make(self, coming: "Future[Rollout]", version: int, step: int) -> None:
        try:
            with beside(self._group):
                coming.set_result(self._collector.collect(version, Clock(), step))
        except BaseException as error:  # raised by `next`, in the main thread
            coming.set_exception(error)
