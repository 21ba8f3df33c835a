"""BeaverTails-V (arXiv 2503.17682): harmful questions about images, with judged responses.

Layout: parquet, a config per category (data/CATEGORY/train*.parquet), the image embedded. Two sets share it:
PKU-Alignment/BeaverTails-V has `question, image, category, image_severity, response, is_response_safe`;
saferlhf-v/BeaverTails-V has two responses, `response_k, is_response_k_safe` (k 1, 2) and `safer_response_id`.
Licence: CC BY-NC 4.0. The fields and the licence were read on both cards; that the judgements are "yes" and "no", and
the ids 1 and 2 as texts, in public code that reads the set.

Mapping: task safety, category `category`. The set judges responses, not questions; as every question was written for a
category of harm, every row is tagged combined unsafe. Benign rows must come from another set, or a model learns to
refuse whatever it sees. `chosen` is the response that is judged safe (of two the safer one); without one there is none.
What image_severity means is not said on the cards, so it becomes no tag.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reading import Layout, Record, Reject, Source, adapt, asked, fail

_COMMON = {"question", "image", "category"}
LAYOUT = Layout(
    name="beavertails_v", source="PKU-Alignment/BeaverTails-V", licence="CC BY-NC 4.0", files=("train*.parquet",),
    tasks=("safety",),
    fields=(frozenset(_COMMON | {"response", "is_response_safe"}),
            frozenset(_COMMON | {"response_1", "response_2", "is_response_1_safe", "is_response_2_safe",
                                 "safer_response_id"})))
_SAFE = {"yes": True, "no": False}


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows of BeaverTails-V; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    if "response" in record.data:
        response, is_safe = "response", record.choice("is_response_safe", _SAFE)
    else:
        safer = record.choice("safer_response_id", {"1": 1, "2": 2, 1: 1, 2: 2})
        response, is_safe = f"response_{safer}", record.choice(f"is_response_{safer}_safe", _SAFE)
    yield {"task": "safety", **asked(record, "question", record.text("question"), record.image("image")),
           "category": record.optional("category"), "chosen": record.optional(response) if is_safe else None,
           "tags": {"combined": "unsafe"}}
