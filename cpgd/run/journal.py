"""What a stage tells while it trains: its files, the progress view, warnings. All ranks call, rank 0 writes."""

import logging
from collections.abc import Sequence
from typing import Any

from cosmo_rl.model.parallel import on_main, rank

from ..rollout.values import Rollout
from .metrics import MetricsWriter, ProgressView, sample_lines

logger = logging.getLogger(__name__)


class Journal:
    """
    Args:
        metrics: the stage's files.
        steps: of the stage. title: what runs, as "stage 2".
    """

    def __init__(self, metrics: MetricsWriter, steps: int, title: str) -> None:
        self.metrics, self.steps, self.title = metrics, steps, title
        self._view: ProgressView | None = None

    def open(self, step: int) -> None:
        """Show the progress from `step` on."""
        if rank() == 0:
            self._view = ProgressView(self.steps, step, self.title)

    def warn(self, step: int, said: Sequence[str]) -> None:
        def write() -> None:
            self.metrics.append("warnings", *({"step": step, "warning": text} for text in said))
            for text in said:
                logger.warning("step %d: %s", step, text)

        on_main(write)

    def samples(self, rollout: Rollout, count: int, step: int) -> None:
        """`count` samples of a rollout; `step` is the first that trains on them."""
        on_main(lambda: self.metrics.append("samples", *sample_lines(rollout, count, step)))

    def step(self, line: dict[str, Any], sample_ids: Sequence[str]) -> None:
        """A line of metrics.jsonl, and for a step that was skipped the samples that it was to train on."""
        def write() -> None:
            if line["skipped"]:
                self.metrics.append("nonfinite", {"step": line["step"], "grad_norm": str(line["grad_norm"]),
                                                  "samples": list(sample_ids)})
            self.metrics.append("metrics", line)
            if self._view:
                self._view.update(line)

        on_main(write)

    def close(self) -> None:
        """End the view, or an error message is drawn over."""
        if self._view:
            self._view.close()
