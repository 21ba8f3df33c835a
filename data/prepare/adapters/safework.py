"""Prompts in the layout of SafeWork-R1's training code (arXiv 2507.18576): the value rows of its recipe, and others.

Layout: parquet or JSON lines, `prompt, label, images?, reference?`; prompt is a text or chat messages `{role,
content}`, label the recipe that scores it (value, safety, knowledge, knowledge_rule, normal, general, general_rule,
geo3k, gsm8k, muldimif), reference the answer. Read in the authors' code (opendilab/LightRFT, prompts_dataset_vl.py and
examples/safework_t1_runnable). Licence: none with the files: give --licence and --source. They have no fixed names.

Mapping: task by label: value, knowledge and general as they are, the rules (knowledge_rule, general_rule, geo3k, gsm8k)
math, normal helpful; `answer` is the reference, which all but value, helpful and safety must have. Nothing says whether
a safety row is harmful: `unlabelled` decides for all of them, and "reject" is its default. muldimif is rejected: its
constraints have checkers of their own.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from .reading import Layout, Record, Reject, Source, adapt, asked, fail

LAYOUT = Layout(name="safework", source="SafeWork-R1's layout", licence="not stated", files=(),
                tasks=("value", "knowledge", "general", "math", "helpful", "safety"),
                fields=(frozenset({"prompt", "label"}),))
_TASKS = {"value": "value", "knowledge": "knowledge", "general": "general", "normal": "helpful", "safety": "safety",
          **dict.fromkeys(("knowledge_rule", "general_rule", "geo3k", "gsm8k"), "math")}


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail,
         unlabelled: Literal["unsafe", "safe", "reject"] = "reject") -> Iterator[dict[str, Any]]:
    """Rows in SafeWork-R1's layout; arguments and errors as `reading.adapt`.

    Args:
        unlabelled: tag of the safety rows, none of which has one.
    """

    def convert(record: Record) -> Iterator[dict[str, Any]]:
        task = record.choice("label", _TASKS)
        if task == "safety" and unlabelled == "reject":
            raise record.bad("label", "is safety, and nothing says whether the prompt is harmful",
                             "give --unlabelled unsafe or safe")
        answer = record.optional("reference")
        if not answer and task not in ("value", "helpful", "safety"):
            raise record.bad("reference", f"is missing, and label {record.data['label']} is scored against it")
        yield {"task": task, **_asked(record), "answer": answer,
               "tags": {"combined": unlabelled} if task == "safety" else None}

    return adapt(source, LAYOUT, convert, images=images, reject=reject)


def _asked(record: Record) -> dict[str, Any]:
    images, prompt = record.images("images"), record.data["prompt"]
    if not isinstance(prompt, list):
        return asked(record, "prompt", record.text("prompt"), images)
    turns = [turn for turn in prompt if isinstance(turn, dict)]
    if len(turns) != len(prompt) or not turns or turns[-1].get("role") != "user":
        raise record.bad("prompt", "is no list of messages {role, content} that ends with the user's")
    last = Record({"prompt": turns[-1].get("content")}, record.where, record.roots)
    question = asked(last, "prompt", last.text("prompt"), images)
    own = question.get("messages") or [{"role": "user", "content": [
        *({"type": "image"} for _ in images), {"type": "text", "text": question["prompt"]}]}]
    return {"messages": [*turns[:-1], *own], "images": images}
