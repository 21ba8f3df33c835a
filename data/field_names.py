"""What other data sets call the fields of a row."""

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

NAMED_ALIKE = {
    "prompt": ("question", "instruction", "query", "problem", "input", "text"),
    "messages": ("conversation", "conversations", "chat", "dialogue"),
    "images": ("image", "picture", "pictures", "image_path", "image_paths", "img", "image_file"),
    "answer": ("solution", "response", "target", "label", "gold", "ground_truth", "reference"),
    "chosen": ("output", "completion"),
    "options": ("choices", "candidates"),
    "task": ("type", "kind", "task_type"),
    "domain": ("subset", "dataset"),
    "source": ("data_source", "origin"),
    "licence": ("license",),
    "id": ("key", "uid", "index", "row_id", "question_id"),
    "tags": ("labels",),
    "category": ("categories", "subject", "topic"),
    "constraints": ("instruction_id_list", "kwargs"),
}
"""Field -> what other sets call it. By the letters alone, "did you mean" would offer `options` for `solution`."""


def meant(name: str, fields: Sequence[str], given: Collection[str] = ()) -> str:
    """The one of `fields` that another set may call `name`, and that is not `given`; "" if there is no telling."""
    taken = {*given, *(("prompt", "messages") if {"prompt", "messages"} & {*given} else ())}
    plain = name[:80].strip().lower().replace("-", "_").replace(" ", "_")
    for field, names in NAMED_ALIKE.items():
        if plain == field or plain in names:
            return "" if field in taken else field
    return nearest(plain, [field for field in fields if field not in taken])


def nearest(name: str, known: Iterable[str]) -> str:
    """The one of `known` that `name` is most like; "" if there is none."""
    return (get_close_matches(name[:100], list(known), n=1) or [""])[0]
