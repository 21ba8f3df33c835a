"""FLAMES (arXiv 2311.06899): adversarial Chinese prompts on human values.

Layout: Flames_1k_Chinese.jsonl, `dimension, subcomponent, prompt`: 1,000 prompts on Safety, Fairness, Morality, Data
protection and Legality, without answers. Read in the authors' repository (AIFlames/Flames) and in code that reads it.
Licence: Apache-2.0 there; PKU-Alignment's copy on the hub says CC BY-NC 4.0. It is an evaluation set and has no
training split: its rows are for --data.eval-path and --data.evaluation-sets.

Mapping: task value without `answer`, so that a judge (safework_value) scores it; category `dimension / subcomponent`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reading import Layout, Record, Reject, Source, adapt, fail

LAYOUT = Layout(name="flames", source="AIFlames/Flames", licence="Apache-2.0", files=("Flames_1k_Chinese.jsonl",),
                tasks=("value",), fields=(frozenset({"dimension", "prompt"}),), without=frozenset({"response"}))


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows of FLAMES; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    kinds = [kind for field in ("dimension", "subcomponent") if (kind := record.optional(field))]
    yield {"task": "value", "prompt": record.text("prompt"), "category": " / ".join(kinds) or None}
