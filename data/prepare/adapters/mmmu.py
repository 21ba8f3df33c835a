"""MMMU (arXiv 2311.16502) and sets in its layout: college questions with up to seven pictures in text and choices.

Layout: parquet with embedded images, `id, question, options, explanation, image_1 ... image_7, img_type, answer,
topic_difficulty, question_type, subfield`; options is a Python list written as a text ("['2', '<image 2>']"), answer a
letter or, where question_type is "open", a text; `<image 1>` stands for image_1, in question and options. Read on the
cards (MMMU/MMMU and copies). Licence: Apache-2.0, by the hub's listing. MMMU's dev, validation and test are for
evaluation, so a folder gives nothing: name the files.

Mapping: task mcq with the choices shown as A. B. C.; an open question is math where its answer has a digit or LaTeX,
else general, and rejected if it has several answers. A picture stands where the text names it, each time; without any
name they stand first, and where only some are named the record is rejected. category `subfield`.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reading import (
    LETTERS,
    PLACEHOLDER,
    Layout,
    Record,
    Reject,
    Source,
    adapt,
    asked,
    fail,
    graded,
    letter_of,
    lettered,
)

LAYOUT = Layout(name="mmmu", source="MMMU/MMMU", licence="Apache-2.0", tasks=("mcq", "math", "general"), files=(),
                fields=(frozenset({"question", "options", "answer", "image_1"}),))
_PLACE = re.compile(r"<image[ _]?(\d{1,3})>", re.IGNORECASE)


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows in the layout of MMMU; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    question, answer = record.text("question"), record.text("answer")
    if record.optional("question_type") == "open":
        if answer.startswith("["):
            raise record.bad("answer", f"is a list of answers: {answer[:60]!r}", "give one answer")
        graded_as, text = graded(record, "answer", question, answer), question
    else:
        choices = _choices(record)
        if answer not in list(LETTERS):
            raise record.bad("answer", f"is {answer[:60]!r}, not the capital letter of a choice")
        letter = letter_of(record, "answer", LETTERS.index(answer), choices)
        graded_as, text = {"task": "mcq", "answer": letter, "options": choices}, f"{question}\n{lettered(choices)}"
    yield {**_placed(record, text), **graded_as, "category": record.optional("subfield")}


def _choices(record: Record) -> list[str]:
    value = written = record.data["options"]
    try:
        if isinstance(written, str):
            value = ast.literal_eval(written.strip())  # literals alone: nothing is run
        if isinstance(value, list):
            value = [str(item) if isinstance(item, int | float) else item for item in value]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:  # TypeError: of {{}}
        raise record.bad("options", f"is no list written as Python does: {written[:60]!r}",
                         "write it as ['x', 'y']") from error
    return Record({"options": value}, record.where, record.roots).texts("options")


def _placed(record: Record, text: str) -> dict[str, Any]:
    """Question and images, each image as often as it is named."""
    there = {k: found[0] for k in range(1, 8) if (found := record.images(f"image_{k}"))}
    named = [int(number) for number in _PLACE.findall(text)]
    if lost := sorted(set(named) - there.keys()):
        raise record.bad(f"image_{lost[0]}", f"is missing, and the text names <image {lost[0]}>")
    if named and (unnamed := sorted(there.keys() - set(named))):
        raise record.bad("question", f"names <image {named[0]}>, but not image_{unnamed[0]}, which is there")
    images = [there[k] for k in named] if named else list(there.values())
    return asked(record, "question", _PLACE.sub(PLACEHOLDER, text), images)
