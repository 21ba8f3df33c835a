"""multimodal-open-r1-8k-verified: questions of MathV360K and Geo170K with checked solutions, used by TRL and others.

Layout: parquet with embedded image (data/train-*.parquet), `image, problem, solution, original_question,
original_answer`; solution is "<think>...</think>" and "<answer>...</answer>". Read in public code that reads it (TRL's
grpo_vlm.py, oumi) and on its page (lmms-lab/multimodal-open-r1-8k-verified). Licence: none is stated there; its source
sets have their own.

Mapping: `answer` is the content of <answer>, where it is short, less "The answer is"; a longer one is rejected. Task
mcq where it is the letter of a choice that the problem lists, else math where it has a digit or LaTeX, else general; a
letter of no listed choice is rejected. `chosen` is the solution.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reading import SHORT, Layout, Record, Reject, Source, adapt, asked, fail, graded

LAYOUT = Layout(name="multimodal_open_r1", source="lmms-lab/multimodal-open-r1-8k-verified", licence="not stated",
                files=("train-*.parquet",), tasks=("general", "math", "mcq"),
                fields=(frozenset({"image", "problem", "solution"}),))
_LEAD = re.compile(r"(?:the )?(?:final )?answer(?: is:?|:)\s*", re.IGNORECASE)


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows of multimodal-open-r1-8k-verified; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    problem, solution = record.text("problem"), record.text("solution")
    stated, closed, _ = solution.partition("<answer>")[2].partition("</answer>")
    if solution.count("<answer>") != 1 or not closed:
        raise record.bad("solution", f"holds {solution.count('<answer>')} <answer>...</answer>, not one")
    answer = _LEAD.sub("", stated.strip(), count=1).strip().rstrip(".")
    if not answer or len(answer) > SHORT:
        raise record.bad("solution", f"states no short answer: {stated.strip()[:SHORT]!r}")
    yield {**asked(record, "problem", problem, record.image("image")), **graded(record, "solution", problem, answer),
           "chosen": solution}
