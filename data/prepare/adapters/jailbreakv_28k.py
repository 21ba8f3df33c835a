"""JailBreakV-28K (arXiv 2404.03027): jailbreak texts and pictures for vision-language models.

Layout: JailBreakV_28K/JailBreakV_28K.csv with `id, jailbreak_query, redteam_query, format, policy, image_path, from,
selected_mini, transfer_from_llm`, the images in folders beside it; RedTeam_2K.csv with `id, question, policy, from`.
Licence: MIT. Files and licence were read on the card, the fields in public code that reads them. It is published as a
benchmark: what is trained on cannot be measured on, and the public archive on the hub holds part of the images only.

Mapping: task jailbreak, prompt `jailbreak_query`, category `policy`, combined unsafe; text unsafe where
`transfer_from_llm` is true (the text carries the attack; the other formats carry it in the picture, which has no label
of its own). `attack` has `format` as its name, so that whole classes can be held out, the plain request among its
params, and a source_id that all attacks on one request share; its seed is 0, as none is published. RedTeam_2K rows are
plain requests: task safety, text and combined unsafe.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reading import Layout, Record, Reject, Source, adapt, asked, fail

LAYOUT = Layout(
    name="jailbreakv_28k", source="JailbreakV-28K/JailBreakV-28k", licence="MIT", files=("JailBreakV_28K.csv",),
    tasks=("jailbreak",),
    fields=(frozenset({"jailbreak_query", "redteam_query", "format", "policy", "image_path"}),
            frozenset({"question", "policy", "from"})))
_TRUTH = {True: True, False: False, "True": True, "False": False}


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows of JailBreakV-28K or RedTeam-2K; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def attack_on(name: str, request: str, **params: str) -> dict[str, Any]:
    """The field `attack` of a published attack on a plain request; its seed is not known."""
    digest = hashlib.blake2b(request.encode(), digest_size=8).hexdigest()
    return {"name": name, "params": {"request": request, **params}, "seed": 0, "source_id": f"request:{digest}"}


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    if "jailbreak_query" not in record.data:
        yield {"task": "safety", "prompt": record.text("question"), "category": record.optional("policy"),
               "tags": {"text": "unsafe", "combined": "unsafe"}}
        return
    in_text = bool(record.data.get("transfer_from_llm")) and record.choice("transfer_from_llm", _TRUTH)
    yield {"task": "jailbreak", **asked(record, "jailbreak_query", record.text("jailbreak_query"),
                                        record.image("image_path")),
           "category": record.optional("policy"),
           "tags": {"combined": "unsafe", **({"text": "unsafe"} if in_text else {})},
           "attack": attack_on(record.text("format"), record.text("redteam_query"))}
