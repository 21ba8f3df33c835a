"""Format: one thinking part, then an answer. The response's structure and its words, which the other terms read too.

What counts as the same text, for every task whose answers are texts (`is_answer`): the whole answer is the reference,
but for case, spacing, closing punctuation and what only sets an answer off: <answer>, \\boxed{}, bold, italics, code,
quotes, dollars, a heading, "The answer is". A sentence around the answer is another text.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator

import numpy as np

from ..rollout.values import Response
from .base import Outcome, Score

OPEN, CLOSE = "<think>", "</think>"
_BOX = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_WORD = re.compile(r"-?\d+(?:\.\d+)?|\w+(?:'\w+)*")
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_GIVEN = re.compile(r"\\boxed|<answer>", re.IGNORECASE)
_DENIED = re.compile(r"(?:\b(?:not|never|wrong|incorrect|false|doubt|neither|nor)|n't)(?: +(?:think|believe|say|true|"
                     r"the|case|that|it|is|be|correct|right|final|best|answer|option|choice))*[ $*]*\Z", re.IGNORECASE)
IS = r"(?:\s+(?:is|(?:must|should|would) be)\b\s*:?|\s*[:=]|\s*\n)"
"""Pattern of what follows the word answer, before the answer."""
IS_CHINESE = "\u7b54\u6848(?:\u662f|\u4e3a|:)+"
_LEAD = re.compile(r"(\*\*|\*|__|_|)(?:(?:so|thus|hence|therefore)\b,?\s+)?(?:(?:the|my)\s+)?"
                   rf"(?:(?:(?:final|correct|right)\s+)?answer\1?{IS}|{IS_CHINESE})\1?\s*(?=\S)", re.IGNORECASE)
_HEADING = re.compile(r"#{1,6}\s+(?=\S)")
_STYLED = re.compile(r"\\(?:text|textbf|textit|texttt|textrm|emph|mathrm|mathbf|mathit|mathsf)\s*(?=\{)")
_EMPHASIS = ("**", "*", "__", "_")
_PAIRS = (*((mark, mark) for mark in (*_EMPHASIS, "```", "`", "$$", "$", '"', "'")), ("\\(", "\\)"), ("\\[", "\\]"),
          ("\u00ab", "\u00bb"), ("\u300c", "\u300d"))
"""What may stand around a whole answer and is no part of it."""
_STOPS = ".!?,"
SIGNS = {code + 0xfee0: chr(code) for code in range(0x21, 0x7f)} | {
    0x3000: " ", 0x3002: ".", 0x3001: ",", **dict.fromkeys((0x2018, 0x2019, 0xb4, 0x2bc), "'"),
    **dict.fromkeys((0x201c, 0x201d, 0x201e), '"')}
"""Full-width signs, quotation marks and apostrophes, for `str.translate`."""
_DEPTH = 12
"""Marks that are taken off one answer: more are no answer, and would take long."""


class Format:
    """1 for exactly one non-empty <think>...</think> at the start and a non-empty answer after it, else 0."""

    async def __call__(self, response: Response) -> Outcome:
        return Score(float(split_thinking(response.text) is not None))


def split_thinking(text: str) -> tuple[str, str] | None:
    """(thinking, answer), both stripped and non-empty; None when the text is not exactly one thinking and an answer."""
    text = text.strip()
    if not text.startswith(OPEN) or text.count(OPEN) != 1 or text.count(CLOSE) != 1:
        return None
    thinking, answer = (part.strip() for part in text.removeprefix(OPEN).split(CLOSE))
    return (thinking, answer) if thinking and answer else None


def answer_of(text: str) -> str:
    """The answer of a response of any form: what follows the last </think>, or all when nothing is thought.

    A thinking that never closes has no answer: "".
    """
    head, closed, answer = text.rpartition(CLOSE)
    if OPEN in answer or (not closed and OPEN in head):
        return ""
    return answer.strip()


def thinking_of(text: str) -> str:
    """What stands before the last </think>, without its tag; "" when nothing is thought."""
    return text.rpartition(CLOSE)[0].strip().removeprefix(OPEN).strip()


def boxes(text: str) -> list[str]:
    r"""Content of each \boxed{...} that closes, in order, without those inside another."""
    found: list[tuple[int, str]] = []
    opened: list[int] = []  # start of a box's content, or -1 for a plain brace
    for token in _BOX.finditer(text) if r"\boxed" in text else ():
        sign = token.group()
        if sign[-1] == "{" and sign != r"\{":
            opened.append(token.end() if len(sign) > 1 else -1)
        elif sign == "}" and opened and (start := opened.pop()) >= 0:
            while found and found[-1][0] > start:
                found.pop()
            found.append((start, text[start:token.start()].strip()))
    return [content for _, content in found]


def given(text: str) -> list[str]:
    r"""Content of each <answer>...</answer>, and of each \boxed{...} beside them; [""] where the text denies one.

    A box around a tag, or the other way round, is one: what the tag holds.
    """
    found = list(map(str.strip, _TAGGED.findall(text)))
    found += [content for content in boxes(_TAGGED.sub("", text) if found else text) if content or not found]
    return [""] if found and any(denied(text, start.start()) for start in _GIVEN.finditer(text)) else found


def denied(text: str, at: int) -> bool:
    """Whether the words before a place say that what stands there is not the answer."""
    return _DENIED.search(text, max(0, at - 100), at) is not None


def answer_start(ids: np.ndarray, decode: Callable[[np.ndarray], str]) -> int | None:
    """Index of the first answer token of a well-formed response, for the log-prob of its answer.

    Args:
        ids: (L,) int64, the response.
        decode: token ids to text without special tokens.
    Returns:
        The first token past </think> (the last token, when it holds both); None when `split_thinking` finds no answer.
    """
    if split_thinking(decode(ids)) is None:
        return None
    low, high = 0, len(ids)  # the shortest prefix with </think> has between low + 1 and high tokens
    while high - low > 1:
        middle = (low + high) // 2
        if CLOSE in decode(ids[:middle]):
            high = middle
        else:
            low = middle
    return min(high, len(ids) - 1)


def words(text: str) -> list[str]:
    """Words and numbers of a text in lower case, without punctuation."""
    return _WORD.findall(_plain(text))


def same_answer(answer: str, reference: str) -> bool:
    """Whether two texts are equal but for case, spacing between words and closing punctuation; an empty one never is.

    Signs count: "C++" is not "c", nor "x < y" "x > y".
    """
    left, right = ("".join(_plain(text).split()).rstrip(_STOPS) for text in (answer, reference))
    return bool(left) and left == right and words(answer) == words(reference)


def is_answer(answer: str, reference: str) -> bool:
    """Whether an answer is the reference text, as it stands or without what only sets it off; see `readings`."""
    wanted = list(readings(reference, emphasis=False))  # __init__ is a name, where a data set writes it
    return any(same_answer(read, reference) for read in readings(answer) for reference in wanted)


def readings(text: str, *, emphasis: bool = True) -> Iterator[str]:
    r"""The text, then again and again without the outermost mark that sets it off, down to the bare answer.

    Of a text with <answer>...</answer> or \boxed{...} it goes on with what they hold, if all hold the same and none is
    denied, and else ends. mcq and math read their answers by rules of their own.

    Args:
        emphasis: take off Markdown's * and _ too.
    """
    text = text.translate(SIGNS)
    for _ in range(_DEPTH):
        if text:
            yield text
            text = _barer(text, emphasis)


def _barer(text: str, emphasis: bool) -> str:
    """The text without its outermost mark; "" when it has none, or names several answers."""
    text = text.strip()
    if marked := given(text):
        return marked[0] if all(same_answer(marked[0], other) for other in marked) else ""
    bare = text.rstrip(_STOPS).rstrip()
    for opening, closing in _PAIRS:
        inside = bare[len(opening):-len(closing)]
        if inside and bare.startswith(opening) and bare.endswith(closing) and not (
                opening in _EMPHASIS and (not emphasis or opening in inside)):  # **Answer:** **x** is no pair
            return inside.strip()
    if lead := _HEADING.match(text) or _LEAD.match(text):
        return text[lead.end():]
    if (styled := _STYLED.match(bare)) and _closes(bare, styled.end()) == len(bare) - 1:
        return bare[styled.end() + 1:-1].strip()
    return ""


def _closes(text: str, start: int) -> int:
    """Place of the brace that closes the one at `start`; -1 when none does."""
    depth = 0
    for brace in _BOX.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group()[-1], 0) * (brace.group() not in (r"\{", r"\}"))
        if depth == 0:
            return brace.start()
    return -1


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).translate(SIGNS).lower()
