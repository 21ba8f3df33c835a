"""What other data sets call the fields of a row, and what they write in a text in the place of an image.

The model would read a placeholder of an image, a video or a sound as words, so a row may not hold it. The same words
meant as words, in a question on HTML or XML, are told by how they are written: in backticks, with attributes, or with
their closing tag somewhere in the text.
"""

import re
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


PLACEHOLDER = re.compile(r"""(?<!`)(?:
    <(?P<tag>image|video|audio)(?:[ _-]?\d+)?>     # LLaVA, InternVL, Geometry3K, LLaVA-Video; <image 1> as in MMMU
    | <\|(?:image|video|audio)(?:_\d+)?\|>          # mPLUG-Owl, Llama 3.2; <|image_1|> as in Phi-3-vision
    | <ImageHere>                                   # InternLM-XComposer
    | <img>[^<>\n]+</img>                           # Qwen-VL; in HTML <img> has no closing tag
    )(?!`)""", re.VERBOSE | re.IGNORECASE)
_WORD = " (meant as a word, it goes in backticks)"
_MENDS = {
    "prompt": "remove it: the images of a `prompt` come first by themselves; for another place write `messages` with a "
              '{"type": "image"} part there' + _WORD,
    "image": 'write a {"type": "image"} part in its place' + _WORD,
    "video": "remove the row: videos are not read" + _WORD,
    "audio": "remove the row: sounds are not read" + _WORD,
}


def placeholder(text: str) -> str:
    """The first placeholder in a text, "" if there is none."""
    lower = text.lower()
    return next((found[0] for found in PLACEHOLDER.finditer(text)
                 if not found["tag"] or f"</{found['tag'].lower()}>" not in lower), "")


def mend(held: str, field: str) -> str:
    """What to do about a placeholder in a field of a row."""
    kind = next((kind for kind in ("video", "audio") if kind in held.lower()), "image")
    return _MENDS["prompt" if kind == "image" and field == "prompt" else kind]
