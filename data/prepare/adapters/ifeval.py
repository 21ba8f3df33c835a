"""IFEval (arXiv 2311.07911) as google/IFEval publishes it: prompts with instructions that a program can check.

Layout: ifeval_input_data.jsonl, `key, prompt, instruction_id_list, kwargs`: a list of ids and, for each, its arguments.
As parquet every entry of kwargs has every argument of all 25 ids, null where it is none of its own. The layout was read
in the hub's card and in public code that reads it. Licence: Apache-2.0, read on the card. It is an evaluation set: rows
for training come from rlvr_ifeval.

Mapping: task ifeval; a constraint {"id", "kwargs"} for each id, with the arguments that are not null (a whole number
that a table with gaps holds as 3.0 is 3). category: the ids, without their arguments.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reading import Layout, Record, Reject, Source, adapt, fail

LAYOUT = Layout(name="ifeval", source="google/IFEval", licence="Apache-2.0", tasks=("ifeval",),
                files=("ifeval_input_data.jsonl", "train*.parquet"),
                fields=(frozenset({"prompt", "instruction_id_list", "kwargs"}),))


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows of IFEval; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    ids, kwargs = record.texts("instruction_id_list"), record.data["kwargs"]
    if not ids:
        raise record.bad("instruction_id_list", "is empty: there is nothing to check")
    if not isinstance(kwargs, list) or len(kwargs) != len(ids):
        raise record.bad("kwargs", f"is {str(kwargs)[:60]!r}, not a list of {len(ids)}, one for each instruction")
    constraints = []
    for i, (name, own) in enumerate(zip(ids, kwargs, strict=True)):
        if not isinstance(own, dict | None):
            raise record.bad(f"kwargs[{i}]", f"is {str(own)[:60]!r}, not an object of arguments")
        given = {key: int(value) if isinstance(value, float) and value.is_integer() else value
                 for key, value in (own or {}).items() if value is not None}
        constraints.append({"id": name, "kwargs": given})
    yield {"task": "ifeval", "prompt": record.text("prompt"), "constraints": constraints,
           "category": " / ".join(sorted(ids))}
