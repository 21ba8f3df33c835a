"""What public data sets write in a text in the place of an image, a video or a sound.

The model would read it as words, so a row may not hold it. The same words meant as words, in a question on HTML or XML,
are told by how they are written: in backticks, with attributes, or with their closing tag somewhere in the text.
"""

import re

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
