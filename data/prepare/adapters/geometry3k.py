"""Geometry3K (arXiv 2105.04165) as hiyouga/geometry3k publishes it for reinforcement learning.

Layout: parquet, `images` (a list, embedded), `problem` (with `<image>` where the picture stands), `answer`; and `id,
choices, ground_truth`, which other mirrors lack. Splits train, validation, test. Licence: MIT. All read on the card.

Mapping: task math, `answer` is `answer` (a value or a LaTeX formula, not a letter). `choices` are not shown to the
model and do not become options. A folder gives data/train-*.parquet.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reading import Layout, Record, Reject, Source, adapt, asked, fail

LAYOUT = Layout(name="geometry3k", source="hiyouga/geometry3k", licence="MIT", files=("train-*.parquet",),
                tasks=("math",),
                fields=(frozenset({"images", "problem", "answer"}),))


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows of Geometry3K; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    yield {"task": "math", **asked(record, "problem", record.text("problem"), record.images("images", least=1)),
           "answer": record.text("answer")}
