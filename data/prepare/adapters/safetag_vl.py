"""SafeTag-VL-3K, the data of SafeGRPO (arXiv 2511.12982): prompts with a safety tag for image, text and both together.

Layout: a Hugging Face dataset (parquet) with splits train and test, `prompt, images, image_tag, text_tag, combine_tag`,
each tag "safe" or "unsafe". The fields were read in the authors' code (XuankunRong/SafeGRPO, utils/data_preprocess.py),
the values of the tags in its output format. Licence: not stated there, and the card could not be read.

Mapping: task safety; the three tags are the row's tags image, text and combined. The prompt is taken as it is, without
the authors' instruction to think in five steps.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reading import Layout, Record, Reject, Source, adapt, asked, fail

LAYOUT = Layout(name="safetag_vl", source="XuankunRong/SafeTag-VL-3K", licence="not stated", files=("train*.parquet",),
                tasks=("safety",),
                fields=(frozenset({"prompt", "images", "image_tag", "text_tag", "combine_tag"}),))
_TAGS = {"safe": "safe", "unsafe": "unsafe"}


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows of SafeTag-VL; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    tags = {name: record.choice(f"{field}_tag", _TAGS)
            for name, field in (("image", "image"), ("text", "text"), ("combined", "combine"))}
    images = record.images("images", least=1)
    yield {"task": "safety", **asked(record, "prompt", record.text("prompt"), images), "tags": tags}
