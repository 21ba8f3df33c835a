"""MMK12 and MM-Eureka (arXiv 2503.07365, 2505.12504): K-12 questions with pictures and answers that can be checked.

Three layouts, all read in the authors' READMEs (ModalMinds/MM-EUREKA, FanqingM/MM-EUREKA) or in public code that reads
the hub's FanqingM/MMK12:
- JSON lines `{id, message, answer}`, where message is a text that holds JSON: chat messages whose content is a text or
  a list of `{type: image, image: "file:///..."}` and `{type: text, text}`;
- JSON lines `{id, conversations, answer, image_urls}`, conversations of `{role, content}`, image_urls of `file:///...`;
  a blank.png there stands for "no image";
- parquet `{id, question, image, answer, subject?}` with `<image>` in the question and the image embedded.
The absolute image paths are the authors' own: give the folder that yours lie in (--images), in which they must end.
Licence: Apache-2.0 by others' listings; the card was not read.

Mapping: `answer` is `answer`. Task mcq where it is the letter of a choice that the question lists line by line, else
math (graded by math_verify); a letter of none of the listed choices is rejected. Category `subject`.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .reading import PLACEHOLDER, Layout, Record, Reject, Source, adapt, asked, fail, graded, parts

LAYOUT = Layout(
    name="mmk12", source="FanqingM/MMK12", licence="Apache-2.0 (unconfirmed)", files=("train*.parquet", "*.jsonl"),
    tasks=("math", "mcq"),
    fields=(frozenset({"message", "answer"}), frozenset({"conversations", "image_urls", "answer"}),
            frozenset({"question", "image", "answer"})), without=frozenset({"choices", "options"}))


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows of MMK12 or MM-Eureka; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    if "message" in record.data:
        turns = record.json("message")
        prompt = _chat(record, "message", turns, [])
    elif "conversations" in record.data:
        urls = record.data["image_urls"]
        if isinstance(urls, list):  # their stand-in where InternVL wants a picture
            urls = [url for url in urls if not (isinstance(url, str) and PurePosixPath(url).name == "blank.png")]
        prompt = _chat(record, "conversations", record.data["conversations"],
                       Record({"image_urls": urls}, record.where, record.roots).images("image_urls"))
    else:
        prompt = asked(record, "question", record.text("question"), record.images("image"))
    graded_as = graded(record, "answer", _last_text(prompt), record.text("answer"), "math")
    yield {**prompt, **graded_as, "category": record.optional("subject")}


def _chat(record: Record, field: str, turns: Any, images: list[str | bytes]) -> dict[str, Any]:
    """`messages` and `images` of chat messages; `images` are those that placeholders stand for, or go first."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise record.bad(field, "is not a list of chat messages")
    messages, waiting, used = [], list(images), []
    for i, turn in enumerate(turns):
        at, content = f"{field}[{i}].content", turn.get("content")
        if isinstance(content, str):
            count = content.count(PLACEHOLDER)
            if count == 0 and waiting and turn.get("role") == "user":
                count, content = len(waiting), PLACEHOLDER * len(waiting) + content
            taken, waiting = waiting[:count], waiting[count:]
            used += taken
            if count:
                content = parts(record, at, content, len(taken))
        elif isinstance(content, list):
            content, found = _parts(record, at, content)
            used += found
        messages.append({"role": turn.get("role"), "content": content})
    if waiting:
        raise record.bad(field, f"has no place for {len(waiting)} of {len(images)} images")
    return {"messages": messages, "images": used}


def _parts(record: Record, field: str, content: list[Any]) -> tuple[list[Any], list[str | bytes]]:
    made: list[Any] = []
    images: list[str | bytes] = []
    for part in content:
        if isinstance(part, dict) and part.get("type") == "image":
            images += Record({field: part.get("image")}, record.where, record.roots).image(field)
            part = {"type": "image"}
        made.append(part)
    return made, images


def _last_text(prompt: dict[str, Any]) -> str:
    if "prompt" in prompt:
        return prompt["prompt"]
    content = prompt["messages"][-1]["content"] if prompt["messages"] else ""
    if isinstance(content, list):
        return "\n".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return str(content)
