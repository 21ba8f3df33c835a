"""SPA-VL (arXiv 2406.12030): preference pairs over images of harmful classes.

Layout: parquet with embedded image, `image, question, chosen, rejected` (train, data/train-*.parquet; validation has
`class1, class2, class3` too, test only those and no pair). Licence: CC BY 4.0. Both were read on the card
sqrti/SPA-VL.

Mapping: task safety; `chosen` is `chosen` (SFT imitates it; `rejected` has no field in a row); category the classes,
where there are any. The set says of no question whether it is harmful: `unlabelled` decides for all of them, and
"unsafe" is its default. Some are harmless, so under the rule rewards, which pay for refusing an unsafe row, mix benign
rows in, or use a judge.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from .reading import Layout, Record, Reject, Source, adapt, asked, fail

LAYOUT = Layout(
    name="spa_vl", source="sqrti/SPA-VL", licence="CC BY 4.0", files=("train-*.parquet",),
    tasks=("safety",),
    fields=(frozenset({"image", "question", "chosen", "rejected"}),
            frozenset({"image", "question", "class1", "class2", "class3"})))


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail,
         unlabelled: Literal["unsafe", "safe", "reject"] = "unsafe") -> Iterator[dict[str, Any]]:
    """Rows of SPA-VL; arguments and errors as `reading.adapt`.

    Args:
        unlabelled: tag of the questions, none of which has one.
    """

    def convert(record: Record) -> Iterator[dict[str, Any]]:
        if unlabelled == "reject":
            raise record.bad("question", "nothing says whether it is harmful", "give --unlabelled unsafe or safe")
        classes = [name for k in (1, 2, 3) if (name := record.optional(f"class{k}"))]
        yield {"task": "safety", **asked(record, "question", record.text("question"), record.image("image")),
               "category": " / ".join(classes) or None, "chosen": record.optional("chosen"),
               "tags": {"combined": unlabelled}}

    return adapt(source, LAYOUT, convert, images=images, reject=reject)
