"""ScienceQA (arXiv 2209.09513): multiple-choice questions of school science, half of them with a picture.

Layout: parquet with embedded image (data/train-*.parquet; ScienceQA-IMG/ of lmms-lab's copy), `image, question,
choices, answer, hint, task, grade, subject, topic, category, skill, lecture, solution`; image may be null, answer is
the choice's place from 0, hint a passage or "". Read on the cards (derek-thomas/ScienceQA, lmms-lab/ScienceQA).
Licence: CC BY-SA 4.0 by the first; the authors' page was not read. validation and test are evaluation sets.

Mapping: task mcq. The prompt is the hint, the question and the choices as A. B. C.; `answer` the letter; category
`subject / topic`. lecture and solution are not used.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reading import Layout, Record, Reject, Source, adapt, asked, fail, letter_of, lettered

LAYOUT = Layout(name="scienceqa", source="derek-thomas/ScienceQA", licence="CC BY-SA 4.0", tasks=("mcq",),
                files=("train-*.parquet",), fields=(frozenset({"question", "choices", "answer", "hint"}),))


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows of ScienceQA; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    choices = record.texts("choices")
    text = "\n".join(filter(None, (record.optional("hint"), record.text("question"), lettered(choices))))
    kinds = [kind for field in ("subject", "topic") if (kind := record.optional(field))]
    answer = letter_of(record, "answer", record.whole("answer"), choices)
    yield {"task": "mcq", **asked(record, "question", text, record.images("image")), "options": choices,
           "answer": answer, "category": " / ".join(kinds) or None}
