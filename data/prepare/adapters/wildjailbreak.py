"""WildJailbreak (arXiv 2406.18510): plain and adversarial requests, harmful and benign, text only.

Layout: train/train.tsv with `vanilla, adversarial, completion, data_type`, where data_type is vanilla_harmful,
vanilla_benign, adversarial_harmful or adversarial_benign; eval/eval.tsv with `adversarial, label, data_type`.
Licence: ODC-BY, gated. The licence was read on the set's page, columns and types in public code that reads them.

Mapping: vanilla rows are task safety with the prompt `vanilla`, adversarial ones task jailbreak with the prompt
`adversarial`; text and combined are unsafe for harmful and safe for benign ones; `chosen` is `completion` (a refusal,
or an answer); category `data_type`. `attack` of an adversarial row holds the plain request, where it is given; its
seed is 0, as none is published. A folder gives train.tsv: eval.tsv is an evaluation set.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .jailbreakv_28k import attack_on
from .reading import Layout, Record, Reject, Source, adapt, fail

LAYOUT = Layout(
    name="wildjailbreak", source="allenai/wildjailbreak", licence="ODC-BY (gated)", files=("train.tsv",),
    tasks=("safety", "jailbreak"),
    fields=(frozenset({"vanilla", "adversarial", "completion", "data_type"}),
            frozenset({"adversarial", "label", "data_type"})))
_TYPES = {f"{kind}_{label}": (kind, tag) for kind in ("vanilla", "adversarial")
          for label, tag in (("harmful", "unsafe"), ("benign", "safe"))}


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows of WildJailbreak; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    kind, tag = record.choice("data_type", _TYPES)
    request = record.optional("vanilla")
    yield {"task": "safety" if kind == "vanilla" else "jailbreak", "prompt": record.text(kind),
           "category": record.text("data_type"), "chosen": record.optional("completion"),
           "tags": {"text": tag, "combined": tag},
           "attack": attack_on("wildteaming", request) if kind == "adversarial" and request else None}
