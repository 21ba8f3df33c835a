"""JSON that others wrote: what is ambiguous or too deep for recursive code is refused."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .errors import UserError

MAX_DEPTH = 64
"""Lists and objects within each other. Rows and chat completions have 8; at some 500 comparing, copying and writing
them would meet Python's limit of recursion."""

TOO_DEEP = f"lists and objects lie more than {MAX_DEPTH} deep within each other", "flatten it"


class Refused(UserError):
    """JSON that is none of ours to guess at."""

    def __init__(self, field: str, problem: str, mend: str) -> None:
        super().__init__(f"field {field!r} {problem}" if field else problem)
        self.field, self.problem, self.mend = field, problem, mend


def loads(text: str, **options: Any) -> Any:
    """`json.loads` of what `shallow` and `without_twins` take.

    Raises:
        ValueError: it is no JSON; Refused: it is, but ambiguous or too deep.
    """
    try:
        found = json.loads(text, object_pairs_hook=without_twins, **options)
    except RecursionError:
        raise Refused("", *TOO_DEEP) from None
    # brackets in texts are counted too, so it is exact only where it must be
    return shallow(found) if text.count("[") + text.count("{") > MAX_DEPTH else found


def without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its fields; raises Refused when a name is given twice: readers differ in which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise Refused(next(name for name in names if names[name] > 1)[:80], "is given twice", "keep one of them")
    return found


def shallow(found: Any) -> Any:
    """`found`, where no list or object lies more than MAX_DEPTH deep; else raises Refused, naming the field."""
    if _deeper(found, MAX_DEPTH):
        fields = found.items() if isinstance(found, dict) else ()
        raise Refused(next((name[:80] for name, value in fields if _deeper(value, MAX_DEPTH - 1)), ""), *TOO_DEEP)
    return found


def _deeper(found: Any, depth: int) -> bool:
    level = [found]
    for _ in range(depth):
        level = [inner for item in level if isinstance(item, dict | list)
                 for inner in (item.values() if isinstance(item, dict) else item)]
    return any(isinstance(item, dict | list) for item in level)
