"""MathV360K (arXiv 2406.17294): questions on charts, figures, tables and diagrams, with short answers.

Layout: train_samples_all_tuning.json, a list of `{id?, image, conversations}` with one human turn ("<image>\\nHint: ...
Question: ... Choices: (A) ...") and one gpt turn ("The answer is B"); images in data_images/SET/images/. The files were
read in the authors' README (HZQ950419/Math-LLaVA), the form of question and answer in public code that reads them.
Licence: each of its source sets has its own, some of them for research only; its page lists none.

Mapping: `answer` is what follows "The answer is" or "Answer:", or the whole reply if it is short; a longer one is
rejected. Task mcq where the answer is the letter of a listed choice, else math where it has a digit or LaTeX, else
general; a letter without such a choice is rejected. `chosen` is the reply; category the source set, the first folder of
the image path.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .llava import turns_of
from .reading import SHORT, Layout, Record, Reject, Source, adapt, asked, fail, graded

LAYOUT = Layout(
    name="mathv360k", source="Zhiqiang007/MathV360K", licence="mixed (that of each source set)",
    files=("train_samples_all_tuning.json",), tasks=("general", "math", "mcq"), roots=("data_images", ""),
    fields=(frozenset({"image", "conversations"}),))
_ANSWER = re.compile(r"(?:the )?(?:answer|solution)(?: is:?|:)\s*(.*)", re.IGNORECASE | re.DOTALL)


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows of MathV360K; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    turns = turns_of(record)
    if [role for role, _ in turns] != ["user", "assistant"]:
        raise record.bad("conversations", f"has turns by {', '.join(role for role, _ in turns)}, not one question and "
                         "one reply")
    (_, question), (_, reply) = turns
    stated = _ANSWER.fullmatch(reply)
    answer = (stated[1] if stated else reply).rstrip(". \t\r\n")
    if len(answer) > SHORT or not answer:
        raise record.bad("conversations[1]", f"states no short answer: {reply[:60]!r}")
    images, name = record.image("image"), record.data["image"]
    yield {**asked(record, "conversations[0]", question, images),
           **graded(record, "conversations[1]", question, answer), "chosen": reply,
           "category": PurePosixPath(name).parts[0] if isinstance(name, str) else None}
