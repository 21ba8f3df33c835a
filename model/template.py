"""The chat template of a model folder: which one is taken, and what it must do.

In Qwen2.5-VL's published folders tokenizer_config.json holds a template for text and tools, and chat_template.json the
one with pictures, which AutoTokenizer does not read.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cosmo_rl.data.errors import UserError

from .folder import read_object, reading

JINJA, JSON, OWN = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"

# What a template may lose: the words of a system turn, signs that an escape would change, one picture of several.
SYSTEM, BEFORE, BETWEEN, AFTER = "Keep to the rules.", "Is 1 < 2 & \"a\" > 'b'?", "Beside {{ this }} one:", "And {%?"
_IMAGE = {"type": "image"}
PROBES: tuple[tuple[str, list[dict[str, Any]]], ...] = (
    ("a row without a picture", [{"role": "user", "content": BEFORE}]),
    ("a row with a picture", [{"role": "user", "content": [_IMAGE, {"type": "text", "text": AFTER}]}]),
    ("a row with a system message and two pictures", [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": [{"type": "text", "text": BEFORE}, _IMAGE, {"type": "text", "text": BETWEEN},
                                     _IMAGE, {"type": "text", "text": AFTER}]}]),
)
LONGEST = 100_000
"""Characters of a probe's text, at most."""


def read_jinja(folder: Path) -> str | None:
    """Content of chat_template.jinja, None without one; to be asked before AutoTokenizer, which reads it too.

    Raises:
        UserError: it cannot be read.
    """
    if not (folder / JINJA).is_file():
        return None
    with reading(folder, f"{JINJA} cannot be read", "copy it again, or save it as UTF-8"):
        return (folder / JINJA).read_text(encoding="utf-8-sig")  # a byte order mark would begin every prompt


def choose_template(folder: Path, tokenizer: PreTrainedTokenizerBase, jinja: str | None) -> tuple[str, str]:
    """(name of its file, template): chat_template.jinja, else chat_template.json, else the tokenizer's own.

    Args:
        jinja: of `read_jinja`.
    Raises:
        UserError: there is none, or its file does not hold one.
    """
    if jinja is not None:
        return JINJA, jinja
    own = not (folder / JSON).is_file()
    name, found = (OWN, tokenizer.chat_template) if own else (JSON, read_object(folder, JSON).get("chat_template"))
    if isinstance(found, list):  # of named ones; the tokenizer's list is a dict by now
        found = next((one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"),
                     None)
    elif isinstance(found, dict):
        found = found.get("default")
    if found is None and own:
        raise UserError(f"model folder {folder}: the tokenizer has no chat template; add {JINJA}")
    if not isinstance(found, str):
        raise UserError(f"model folder {folder}: {name} has no text in `chat_template`; copy it again, or add {JINJA}")
    return name, found


def check_template(folder: Path, name: str, processor: Any) -> None:
    """Render PROBES.

    Args:
        name: file that the template is from. processor: a `cosmo_rl.model.load.Processor`.
    Raises:
        UserError: an error in the template, words that it drops or changes, a picture that it drops, moves, or does
            not write as <|vision_start|><|image_pad|><|vision_end|>.
    """
    mend = f"add the model's template with pictures as {JINJA}"
    config, tokenizer = processor.config, processor.tokenizer
    ids = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    start, pad, end = (str(token) for token in tokenizer.convert_ids_to_tokens(ids))
    for what, messages in PROBES:
        refuse = f"model folder {folder}: the chat template in {name} cannot be used for {what}"
        try:
            text = processor.chat_text(messages)
        except UserError as error:
            raise UserError(f"{refuse} ({error}); {mend}") from error
        if len(text) > LONGEST:  # to read it would take minutes and many GB
            raise UserError(f"{refuse} (it writes {len(text):,} characters for a few words); {mend}")
        place, images = 0, 0
        for message in messages:
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                wanted = part.get("text", f"{start}{pad}{end}")
                found = text.find(wanted, place)
                if found < 0:
                    raise UserError(f"{refuse} (it drops, moves or changes {wanted!r}); {mend}")
                images += part["type"] == "image"
                place = found + len(wanted)
        with reading(folder, "its tokenizer cannot be used", "copy tokenizer.json and tokenizer_config.json again"):
            count = tokenizer(text, add_special_tokens=False)["input_ids"].count(config.image_token_id)
        if count != images:
            raise UserError(f"{refuse} (it writes {count} placeholders, {pad}, for {images} pictures); {mend}")
