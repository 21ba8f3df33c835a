"""From a judge's reply to one verdict, strictly: a reply that names no label, or several, is Unparsable."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..rewards.format import CLOSE, OPEN
from .client import ChatReply

MIN_LABEL_MASS = 0.5
"""Least probability of all labels together at the reply's first token; below it the judge said something else."""
_NEGATIONS = frozenset(("not", "no", "never", "neither", "nor", "cannot", "without", "non", "hardly"))


class Unparsable(ValueError):
    """A reply that holds no verdict, or several."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge said."""

    label: str
    """One of its labels; of a scalar head "score"."""
    probability: float | None = None
    """Of the good label, or the mapped score; None: the judge gave a label only."""
    refusal: bool | None = None
    """Whether the response refuses; None: the judge does not say."""


Reader = Callable[[ChatReply], Verdict]
"""Raises Unparsable."""


def choose(text: str, labels: Sequence[str]) -> str:
    """The label that a reply names: all of it but for case and punctuation, or the only one that stands in it.

    In a sentence a label of one word must be written as the label is, but for a capital: "on the other hand" is not
    "Other", nor "it is true that" "TRUE".

    Raises:
        Unparsable: none, several, or one beside a negation.
    """
    said = _said(text)
    bare = said.strip(" \t\r\n.,:;!?*_`'\"()[]<>")
    for label in labels:
        if bare.casefold() == label.casefold():
            return label
    # Longest first, and what is found is taken out, since one label may be part of another.
    left, found = bare, []
    for label in sorted(labels, key=len, reverse=True):
        forms = f"(?i:{re.escape(label)})" if " " in label else f"(?:{label}|{label.capitalize()})"
        left, count = re.subn(rf"(?<!\w){forms}(?!\w)", " ", left)
        found += [label] * bool(count)
    if len(found) != 1:
        raise Unparsable(f"the reply names {'several' if found else 'none'} of {', '.join(labels)}: {_cut(said)}")
    _refuse_negation(left, said)
    return found[0]


def share(reply: ChatReply, labels: Sequence[str]) -> float | None:
    """P(labels[0]) among `labels`, from the log-probs of the reply's first token; None when the server gave none.

    Raises:
        Unparsable: the labels together have less than MIN_LABEL_MASS there. To take the label instead would rank
            responses by how the judge put it.
    """
    if reply.top is None:
        return None
    mass = dict.fromkeys(labels, 0.0)
    for token, logprob in reply.top:
        start = token.strip().casefold()
        fitting = [label for label in labels if start and label.casefold().startswith(start)]
        if len(fitting) == 1:
            mass[fitting[0]] += math.exp(logprob)
    total = math.fsum(mass.values())
    if total < MIN_LABEL_MASS:
        raise Unparsable(f"the reply does not begin with one of {', '.join(labels)}: {_cut(reply.text)}")
    return mass[labels[0]] / total


def labelled(labels: Sequence[str]) -> Reader:
    """One of several labels."""
    return lambda reply: Verdict(choose(reply.text, labels))


def two_way(labels: tuple[str, str], graded: bool) -> Reader:
    """The good label or the bad one; with P(good) when `graded` and the server gives log-probs."""

    def read(reply: ChatReply) -> Verdict:
        return Verdict(choose(reply.text, labels), share(reply, labels) if graded else None)

    return read


def mark(reply: ChatReply) -> Verdict:
    """0, 0.5 or 1."""
    said = _said(reply.text)
    number = r"(?<![\w.,/])[-+]?\d+(?:\.\d+)?(?![\w/%]|[.,]\d)"
    found = {float(n) for n in re.findall(number, said)}
    cut = reply.cut and said[-1:].isdigit()  # "0" may have been on its way to "0.5"
    if cut or len(found) != 1 or not found <= {0.0, 0.5, 1.0}:
        raise Unparsable(f"the reply is not one mark of 0, 0.5 and 1: {_cut(said)}")
    _refuse_negation(re.sub(number, " ", said), said)
    return Verdict(f"{found.pop():g}")


def qwen3guard(reply: ChatReply) -> Verdict:
    """Its lines "Safety: ..." and "Refusal: ...", each once."""
    lines = {}
    for name, pattern in (("Safety", "Safe|Unsafe|Controversial"), ("Refusal", "Yes|No")):
        found = re.findall(rf"^[ \t]*{name}:[ \t]*({pattern})[ \t]*$", reply.text, re.MULTILINE)  # \s: quadratic
        if len(found) != 1 or reply.text.count(f"{name}:") != 1:
            raise Unparsable(f"Qwen3Guard's reply has not one line {name}: {_cut(reply.text)}")
        lines[name] = found[0]
    return Verdict(lines["Safety"], refusal=lines["Refusal"] == "Yes")


def llama_guard(graded: bool) -> Reader:
    """safe, or unsafe and perhaps the codes of its categories; with P(safe) as `two_way`."""

    def read(reply: ChatReply) -> Verdict:
        if not re.fullmatch(r"\s*(safe|unsafe(\s+S\d{1,2}(\s*,\s*S\d{1,2})*)?)\s*", reply.text):
            raise Unparsable(f"Llama Guard's reply is neither safe nor unsafe with codes: {_cut(reply.text)}")
        label = "unsafe" if "unsafe" in reply.text else "safe"
        return Verdict(label, share(reply, ("safe", "unsafe")) if graded else None)

    return read


def _said(text: str) -> str:
    """The reply after the judge's own thinking."""
    head, closed, said = text.rpartition(CLOSE)
    if OPEN in said or (not closed and OPEN in head):
        raise Unparsable("the judge was cut off while thinking; switch its thinking off with extra_body")
    return said.strip()


def _refuse_negation(left: str, said: str) -> None:
    words = set(re.findall(r"[\w']+", left.casefold().replace("\u2019", "'")))
    if words & _NEGATIONS or any(word.endswith("n't") for word in words):
        raise Unparsable(f"the reply may deny what it names: {_cut(said)}")


def _cut(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:100] + "...")
