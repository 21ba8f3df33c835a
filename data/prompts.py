"""The system prompt of a run: read from the command line, tried on the chat template, shown.

`collate.with_system` puts it before the messages of every row that brings no system message of its own. Chat templates
that open with a default line (Qwen's "You are a helpful assistant.") write it only where the messages have no system
message: there the prompt stands in its place, and an empty one leaves the line as it is.
"""

import os
import re
from typing import Any
from unicodedata import category

from .collate import chat_text
from .errors import UserError
from .schema import RESERVED, Row
from .terminal import printable, shortened

OPTION = "--data.system-prompt"
MAX_BYTES = 1 << 20
"""Of a file; a longer one is no prompt."""
SHOWN = 1500
"""Characters of a text that are shown."""
_PATH = re.compile(r"(?a:(?:[\w.~@+-]*/)+[\w.~@+-]*)|\S+\.(?i:txt|md|text|prompt|jinja2?|json|ya?ml)")
"""A text that must be meant as a file's name; slashes between letters of scripts without spaces are no sign of it."""


def read_prompt(value: str) -> str:
    """The system prompt that --data.system-prompt gives: the content of the file of this name, else the value itself.

    Without white space at its ends; "" means none.

    Raises:
        UserError: the file cannot be read or holds no text, there is none of a name that can only be a file's, or the
            text holds a reserved token or a control character.
    """
    if not value:
        return ""
    path = os.path.expanduser(value)
    if os.path.isfile(path):
        text, what = _content(path), f"the file {value}"
    elif os.path.exists(path):
        raise UserError(f"{OPTION}: {value} is a folder or no regular file; give a file in it, or a text")
    elif _PATH.fullmatch(value):
        raise UserError(f"{OPTION}: there is no file {value}, or it cannot be reached; correct the path, or give the "
                        "text itself")
    else:
        text, what = value, "the text"
    text = text.strip()
    if not text:
        raise UserError(f"{OPTION}: {what} is empty; fill it in, or give '' for no system prompt")
    for token in RESERVED:
        if token in text:  # the tokenizer would read it as the end of a turn, or as an image's place
            raise UserError(f"{OPTION}: {what} holds the reserved token {token}; remove it, the chat template writes "
                            "such tokens itself")
    bad = next(((i, c) for i, c in enumerate(text) if c not in "\n\t" and category(c) in ("Cc", "Cs")), None)
    if bad:
        raise UserError(f"{OPTION}: {what} holds {bad[1]!a} at character {bad[0] + 1}, a control character or "
                        "half a character; remove it, or save the file as UTF-8")
    return text


def _content(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors write a byte order mark
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{OPTION}: {path} cannot be read ({error.strerror}); give this user the right to read it, or "
                        "another file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{OPTION}: {path} is no UTF-8 text ({error.reason}); save it as "
                        "UTF-8") from error
    if len(text) > MAX_BYTES:
        raise UserError(f"{OPTION}: {path} is longer than {MAX_BYTES:,} characters; give the prompt's own file")
    return text


def check_system_prompt(prompt: str, processor: Any, *, max_prompt_tokens: int) -> None:
    """Refuse a system prompt that the model would not see as it is written.

    Args:
        prompt: as `read_prompt` gives it; "" is always right.
        processor: a `cosmo_rl.model.load.Processor`.
        max_prompt_tokens: budget of a whole prompt.
    Raises:
        UserError: the chat template leaves it out or changes it, it holds one of the tokenizer's special tokens, or it
            alone is over the budget.
    """
    if not prompt:
        return
    ids = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    special = set(ids) & {*processor.suppressed_ids.tolist(), *processor.eos_ids}
    if special:
        raise UserError(f"{OPTION} holds the special token "
                        f"{processor.tokenizer.convert_ids_to_tokens(min(special))}; remove it")
    if len(ids) >= max_prompt_tokens:
        raise UserError(f"{OPTION} alone is {len(ids)} tokens, and --data.max-prompt-tokens is {max_prompt_tokens}; "
                        "shorten it, or raise the budget")
    probe = Row(id="probe", task="helpful", domain="probe", messages=({"role": "user", "content": "?"},), source="",
                licence="")
    if prompt not in chat_text(probe, processor, prompt):
        raise UserError(f"{OPTION}: the model's chat template leaves the system message out, or changes it; give '' "
                        "and write the words into the rows, or mend the template")


def introduce(prompt: str, row: Row, processor: Any, encoding: str = "utf-8") -> str:
    """What is shown once of a run's prompts: the system prompt, and `row` as the model sees it, in lines of text.

    Image placeholders are not expanded. Control characters, and those that `encoding` lacks, are escaped; long texts
    are shortened in their middle.
    """
    own = ", with a system message of its own" if row.messages[0]["role"] == "system" else ""
    tokens = len(processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    lines = [f"system prompt ({OPTION}): {f'{tokens} tokens' if prompt else 'none'}"]
    lines += [_indented(prompt)] if prompt else []
    lines += [f"first prompt (row {printable(row.id)}{own}), as the model sees it:",
              _indented(chat_text(row, processor, prompt).rstrip("\n"))]
    return "\n".join(lines).encode(encoding, "backslashreplace").decode(encoding)


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in printable(shortened(text, SHOWN), keep="\n").split("\n"))
