r"""MATH (arXiv 2103.03874): competition problems with worked solutions.

Layout: parquet or JSON lines, `problem, level, type, solution`: the solution ends in \boxed{ANSWER}; level is "Level 1"
to "Level 5" (two are "Level ?"), type one of seven subjects. Read on the cards of its copies on the hub
(hendrycks/competition_math, whose own file is withdrawn, and others). Licence: MIT, by the card. test is an evaluation
set.

Mapping: task math; `answer` is the content of the solution's last \boxed or \fbox; `chosen` the solution; category
`type / level`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reading import Layout, Record, Reject, Source, adapt, fail

LAYOUT = Layout(name="hendrycks_math", source="hendrycks/competition_math", licence="MIT", tasks=("math",),
                files=("train*.parquet", "train*.jsonl"),
                fields=(frozenset({"problem", "level", "type", "solution"}),))
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
r"""A brace, or what is none: \{ is printed, and \\ breaks the line."""


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows of MATH; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def last_boxed(text: str) -> str:
    r"""Content of the last \boxed{...} or \fbox{...}, braces balanced, or the word after \boxed; "" without one."""
    start = max((found.end() for found in _BOX.finditer(text)), default=None)
    if start is None:
        return ""
    if not text.startswith("{", start):  # "\boxed 2" boxes one token; their solutions mean the number
        return re.split(r"[\s$]", text[start:], maxsplit=1)[0]
    depth = 0
    for found in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if not depth and found[0] == "}":
            return text[start + 1:found.start()].strip()
    return ""


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    solution = record.text("solution")
    answer = last_boxed(solution)
    if not answer:
        raise record.bad("solution", f"boxes no answer: {solution[-60:]!r}")
    yield {"task": "math", "prompt": record.text("problem"), "answer": answer, "chosen": solution,
           "category": f"{record.text('type')} / {record.text('level')}"}
