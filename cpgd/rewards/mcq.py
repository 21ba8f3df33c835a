r"""Task mcq: which one option does the answer name, by its letter or its text?

Accepted: B, (b), B., option B, B: its text, its text alone; each also in \boxed{} or <answer>, or after "the answer is"
at the end; in Markdown, quotes, LaTeX's styles and full-width signs too. Not accepted: several letters; a letter before
other words ("A cat sits" is not option A, unless that is its text); what is denied ("I don't think the answer is B").
So strict because a looser reading pays for answers that name no option, or two.
"""

import re
from collections.abc import Sequence

from cosmo_rl.data.errors import UserError

from .format import IS, IS_CHINESE, SIGNS, denied, given, same_answer
from .math_text import unmarked

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NAME = r"(?:(?:option|choice|answer)\s+)?"
_LETTER = re.compile(_NAME + r"[(\[{]?([A-Z])[)\]}]?[.:)]?", re.IGNORECASE | re.ASCII)
_LABELLED = re.compile(_NAME + r"(?:\(([A-Z])\)[.:,]?|([A-Z])(?:[.:),]| [-\u2013\u2014] | (?=\()))\s*(\S.*)",
                       re.DOTALL | re.IGNORECASE | re.ASCII)
_LEAD = re.compile(rf"\b(?:ans(?:wer)?|choice|option){IS}|{IS_CHINESE}", re.IGNORECASE)
_SET_OFF = re.compile(r"(\*\*|[*_`'\"$]|\\\()(.+?)(?:\*\*|[*_`'\"$]|\\\))\.?", re.DOTALL)
_STYLED = re.compile(r"\\(?:text(?:bf|it|rm|sf)?|math(?:bf|it|rm|sf)|mbox|boxed)\s*\{([^{}]*)\}|(?i:</?answer>)")
_GAP = re.compile(r"\\[ ,;:!]|~|\\q?quad\b")
_LONGEST = 1_000
"""Characters of a text that names an option, beside the option's own."""


def choice(answer: str, options: Sequence[str]) -> int | None:
    """Index of the one option that an answer names; None when it names none, or several."""
    if said := given(answer):
        first = _said(said[0], options)
        return None if first is None or any(_said(text, options) != first for text in set(said)) else first
    return _said(answer, options)


def _said(answer: str, options: Sequence[str]) -> int | None:
    """The option that a text names as a whole, or with what follows the last "answer is"."""
    whole = _named(answer, options)
    text = unmarked(answer.translate(SIGNS))
    leads = list(_LEAD.finditer(text))
    if whole is not None or not leads:
        return whole
    ends = [lead.start() for lead in leads[1:]] + [len(text)]
    parts = [None if denied(text, lead.start()) else text[lead.end():end]
             for lead, end in zip(leads, ends, strict=True)]
    last = _named(parts[-1] or "", options)
    earlier = {_named(part, options) for part in {_sentence(part) for part in parts[:-1] if part}} - {None}
    return last if earlier <= {last} else None


def key_of(answer: str | None, options: Sequence[str]) -> int:
    """Index of the option that a row's `answer`, in any form that a response may have, means.

    Raises:
        UserError: it means none or several, or the options are such that a response's letter would; with the mend.
    """
    if not answer:
        raise UserError("task mcq is rewarded against `answer`, which is missing; add the option's letter or text")
    if not 2 <= len(options) <= len(LETTERS):
        raise UserError(f"`options` has {len(options)} options; give 2 to {len(LETTERS)}")
    for i, option in enumerate(options):
        letter = _LETTER.fullmatch(_bare(option))
        if letter and letter[1].upper() in LETTERS[:len(options)].replace(LETTERS[i], ""):
            raise UserError(f"option {LETTERS[i]} has the text {option!r}, the letter of another; put them in order")
    index = _named(answer, options)
    if index is None or sum(same_answer(option, options[index]) for option in options) > 1:
        raise UserError(f"`answer` {answer[:80]!r} does not name exactly one of the options "
                        f"{str(list(options))[:200]}; give its letter or its text")
    return index


def _named(text: str, options: Sequence[str]) -> int | None:
    """The option that this text names, with nothing else in it."""
    if len(text) > _LONGEST + max(map(len, options)):
        return None
    same = _same(text, options)
    if same:
        return same[0] if len(same) == 1 else None
    text, index = _bare(text), len(options)
    if letter := _LETTER.fullmatch(text):
        index = LETTERS.index(letter[1].upper())
    elif labelled := _LABELLED.fullmatch(text):
        index = LETTERS.index((labelled[1] or labelled[2]).upper())
        own = options[index:index + 1]
        if not _same(labelled[3], own) and not _same(labelled[3].strip("()"), own):
            return None
    return index if index < len(options) else None


def _same(text: str, options: Sequence[str]) -> list[int]:
    """Options with this text: as it stands, since an option may be "[0, 1]", or else bare."""
    bare = _bare(text)
    return ([i for i, option in enumerate(options) if same_answer(text, option)]
            or [i for i, option in enumerate(options) if same_answer(bare, option)]
            or [i for i, option in enumerate(options) if same_answer(bare, _bare(option))])


def _bare(text: str) -> str:
    """`text` without what only sets it off: quotation marks, Markdown, LaTeX's dollars and styles, <answer>."""
    text = _GAP.sub(" ", unmarked(text.translate(SIGNS)))
    for _ in range(9):
        before, text = text, _STYLED.sub(r"\1", text).strip()
        bare = _SET_OFF.fullmatch(text)
        text = bare[2] if bare else text.strip("*_`$").strip()
        if text == before:
            break
    return text


def _sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s|\n", text.strip(), maxsplit=1)[0]
