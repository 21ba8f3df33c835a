"""GSM8K (arXiv 2110.14168): grade-school word problems with worked solutions.

Layout: parquet (main/train-*.parquet; socratic/ holds the same problems) or the authors' train.jsonl, `question,
answer`: the solution, with calculator notes as <<48/2=24>>, and after `####` on its last line the number. Read in the
authors' README (openai/grade-school-math) and in public code that reads it. Licence: MIT, by the hub's listing and by
its copies' cards. test is an evaluation set.

Mapping: task math; `answer` is what follows the last `####`, without commas between thousands; `chosen` the solution
without the calculator's notes, `####` included.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reading import SHORT, Layout, Record, Reject, Source, adapt, fail

LAYOUT = Layout(name="gsm8k", source="openai/gsm8k", licence="MIT", files=("main/train-*.parquet", "train.jsonl"),
                tasks=("math",), fields=(frozenset({"question", "answer"}),),
                without=frozenset({"image", "images", "choices", "options", "image_1", "image_urls", "conversations"}))
_NOTE = re.compile(r"<<[^<>\n]*>>")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows of GSM8K; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    solution = record.text("answer")
    _, mark, answer = (part.strip() for part in solution.rpartition("####"))
    if not mark or len(answer) > SHORT or not re.search(r"\d", answer):
        raise record.bad("answer", f"states no number after ####: {solution[-SHORT:]!r}")
    yield {"task": "math", "prompt": record.text("question"), "answer": _THOUSANDS.sub("", answer),
           "chosen": _NOTE.sub("", solution)}
