"""VLGuard (arXiv 2402.02207): safe and harmful images, each with questions and the answer to give.

Layout: train.json, a list of `{id, image, safe, harmful_category?, harmful_subcategory?, "instr-resp"}`, and the images
of train.zip. A harmful image has one `{instruction, response}`; a safe one a `{safe_instruction, response}` and an
`{unsafe_instruction, response}`. Licence: gated, research use only. The layout was read in the authors' repository
(ys-zong/VLGuard, convert_to_llava_format.py), the licence on the card. test.json is an evaluation set: a folder gives
train.json only.

Mapping: one row per question, task safety, `chosen` the response, category `harmful_category / harmful_subcategory`.
Tags: image as `safe`; text safe or unsafe as the question's name says, none for a harmful image's `instruction`, which
is not labelled; combined unsafe for these and for an unsafe_instruction. So each safe image makes a benign row and an
unsafe one: the pair that tells careful from cautious.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reading import Layout, Record, Reject, Source, adapt, asked, fail

LAYOUT = Layout(
    name="vlguard", source="ys-zong/VLGuard", licence="research use only (gated)", files=("train.json",),
    tasks=("safety",),
    fields=(frozenset({"image", "safe", "instr-resp"}),), roots=("", "train", "test"))
_TEXT_TAGS = {"instruction": None, "safe_instruction": "safe", "unsafe_instruction": "unsafe"}


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows of VLGuard; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    image_tag = record.choice("safe", {True: "safe", False: "unsafe"})
    images = record.image("image")
    kinds = [name for key in ("harmful_category", "harmful_subcategory") if (name := record.optional(key))]
    pairs = record.data["instr-resp"]
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, dict) for pair in pairs):
        raise record.bad("instr-resp", f"is {str(pairs)[:60]!r}, not a list of objects")
    for i, pair in enumerate(pairs):
        field = f"instr-resp[{i}]"
        named = [name for name in _TEXT_TAGS if name in pair]
        if len(named) != 1 or (image_tag == "safe") != (named[0] != "instruction"):
            raise record.bad(field, f"has {', '.join(pair) or 'no fields'} where `safe` is {record.data['safe']}",
                             "a safe image has a safe_instruction or an unsafe_instruction, another an instruction")
        turn = Record(pair, record.where, record.roots)
        text_tag = _TEXT_TAGS[named[0]]
        tags = {"image": image_tag, "combined": "safe" if text_tag == "safe" else "unsafe"}
        yield {"task": "safety", **asked(record, field, turn.text(named[0]), images),
               "category": " / ".join(kinds) or None, "chosen": turn.optional("response"),
               "tags": tags | ({"text": text_tag} if text_tag else {})}
