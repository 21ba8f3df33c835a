"""LLaVA-style conversations (arXiv 2304.08485), the layout of many instruction sets and of SafeWork's SFT data.

Layout: a JSON list or JSON lines of `{id?, image?, conversations}`; `image` (or `images`) is a path or a list of paths;
conversations are `{from, value}` with from human, gpt (or user, assistant) and perhaps system first; `<image>` in a
human turn is the place of the next image. Files have no fixed names: name them. The layout is as public code reads it.
Licence: such a file states none, nor a source: give --licence and --source.

Mapping: each reply of a conversation gives a row: the turns before it are `messages`, the reply is `chosen`. Task
helpful, as nothing says what a right answer is. Without a placeholder the images stand first. A record with a video (or
a sound), in a field or as <video> in a turn, is rejected.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reading import PLACEHOLDER, Layout, Record, Reject, Source, adapt, fail, parts

LAYOUT = Layout(name="llava", source="LLaVA-style conversations", licence="not stated", files=(),
                tasks=("helpful",), fields=(frozenset({"conversations"}),))
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows of a file of conversations; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def turns_of(record: Record) -> list[tuple[str, str]]:
    """(role, text) of each turn of `conversations`, in the roles of schema.py."""
    turns = record.data["conversations"]
    if not isinstance(turns, list) or not turns:
        raise record.bad("conversations", "is not a list of turns")
    made = []
    for i, turn in enumerate(turns):
        field = f"conversations[{i}]"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise record.bad(field, "is not an object of from, value")
        part = Record({f"{field}.{name}": value for name, value in turn.items()}, record.where, record.roots)
        made.append((part.choice(f"{field}.from", _ROLES), part.text(f"{field}.value")))
    return made


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    turns = turns_of(record)
    images = record.images("image") + record.images("images")
    if images and not any(PLACEHOLDER in text for role, text in turns if role != "assistant"):
        first = next((i for i, (role, _) in enumerate(turns) if role == "user"), 0)
        turns[first] = (turns[first][0], PLACEHOLDER * len(images) + turns[first][1])
    messages: list[dict[str, Any]] = []
    used = 0
    for i, (role, text) in enumerate(turns):
        if role == "assistant":
            if not messages or messages[-1]["role"] != "user":
                raise record.bad(f"conversations[{i}]", "is a reply that no human turn comes before")
            yield {"task": "helpful", "messages": list(messages), "images": images[:used], "chosen": text}
        content: Any = text
        if role != "assistant" and PLACEHOLDER in text:
            count = text.count(PLACEHOLDER)
            content = parts(record, f"conversations[{i}]", text, len(images[used:used + count]))
            used += count
        messages.append({"role": role, "content": content})
    if used < len(images):
        raise record.bad("conversations", f"has {used} {PLACEHOLDER} placeholders for {len(images)} images")
    if messages[-1]["role"] != "assistant":
        raise record.bad("conversations", "ends without a reply")
