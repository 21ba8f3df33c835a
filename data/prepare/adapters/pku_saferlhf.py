"""PKU-SafeRLHF (arXiv 2406.15513): two judged responses to a prompt, text only.

Layout: data/MODEL/train.jsonl with `prompt, response_0, response_1, is_response_0_safe, is_response_1_safe,
better_response_id, safer_response_id`, and per response `response_k_severity_level` and `response_k_harm_category`
(name -> truth value). Licence: CC BY-NC 4.0. Files and licence were read on the card, the fields in public code that
reads them.

Mapping: the set judges responses, not prompts. Where a model's response was judged unsafe, the prompt can lead to harm:
task safety, text and combined unsafe, `chosen` the safer response if it is judged safe, category the harms named. That
rule is ours, and a harmless prompt with one bad response falls under it. Where both responses are safe, nothing says
whether the prompt is harmless or both refused; such a record is rejected, since rewarding an answer to it could teach
compliance. `unlabelled` takes them in as safe or unsafe instead.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from .reading import Layout, Record, Reject, Source, adapt, fail

LAYOUT = Layout(
    name="pku_saferlhf", source="PKU-Alignment/PKU-SafeRLHF", licence="CC BY-NC 4.0", files=("train.jsonl",),
    tasks=("safety",),
    fields=(frozenset({"prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe",
                       "safer_response_id"}),))
_TRUTH = {True: True, False: False}


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail,
         unlabelled: Literal["unsafe", "safe", "reject"] = "reject") -> Iterator[dict[str, Any]]:
    """Rows of PKU-SafeRLHF; arguments and errors as `reading.adapt`.

    Args:
        unlabelled: tag of the prompts with two safe responses, or "reject".
    """

    def convert(record: Record) -> Iterator[dict[str, Any]]:
        safe = [record.choice(f"is_response_{k}_safe", _TRUTH) for k in (0, 1)]
        if all(safe) and unlabelled == "reject":
            raise record.bad("is_response_1_safe", "both responses are safe, and nothing says whether the prompt is",
                             "give --unlabelled safe or unsafe to take such records in")
        tag = unlabelled if all(safe) else "unsafe"
        safer = record.choice("safer_response_id", {0: 0, 1: 1})
        yield {"task": "safety", "prompt": record.text("prompt"), "category": _harms(record),
               "chosen": record.optional(f"response_{safer}") if safe[safer] else None,
               "tags": {"text": tag, "combined": tag}}

    return adapt(source, LAYOUT, convert, images=images, reject=reject)


def _harms(record: Record) -> str | None:
    found: set[str] = set()
    for k in (0, 1):
        harms = record.data.get(f"response_{k}_harm_category") or {}
        if not isinstance(harms, dict):
            raise record.bad(f"response_{k}_harm_category", f"is {type(harms).__name__}, not an object")
        if odd := [holds for holds in harms.values() if holds not in (True, False, None)]:
            raise record.bad(f"response_{k}_harm_category", f"holds {odd[0]!r}, not a truth value")
        found |= {name for name, holds in harms.items() if holds}
    return " / ".join(sorted(found)) or None
