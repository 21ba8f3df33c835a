r"""Task mcq: which one option does the answer name, by its letter or its text?

Accepted: B, (b), B., option B, B: its text, its text alone; each also in \boxed{}, or after "the answer is" at the end.
Not accepted: several letters; a letter before other words ("A cat sits" is not option A, unless that is its text).
So strict because a looser reading pays for answers that name no option, or two.
"""

import re
from collections.abc import Sequence

from cosmo_rl.data.errors import UserError

from .format import boxes, same_answer

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER = re.compile(r"(?:(?:option|choice|answer)\s+)?\(?([A-Z])\)?[.:)]?", re.IGNORECASE | re.ASCII)
_LABELLED = re.compile(r"(?:(?:option|choice|answer)\s+)?(?:\(([A-Z])\)[.:,]?|([A-Z])(?:[.:),]| [-\u2013\u2014] ))"
                       r"\s*(\S.*)", re.DOTALL | re.IGNORECASE | re.ASCII)
_LEAD = re.compile(r"\b(?:answer|choice|option)(?:\s+is\b\s*:?|\s*:)", re.IGNORECASE)
_SET_OFF = re.compile(r"(\*\*|[*_`'\"$]|<answer>|\\\(|\[)(.+?)(?:\*\*|[*_`'\"$]|</answer>|\\\)|\])\.?", re.DOTALL)
_STYLED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")


def choice(answer: str, options: Sequence[str]) -> int | None:
    """Index of the one option that an answer names; None when it names none, or several."""
    found = boxes(answer)
    if found:
        named = {_named(_STYLED.sub(r"\1", box), options) for box in found}
        return named.pop() if len(named) == 1 else None
    whole = _named(answer, options)
    parts = _LEAD.split(answer)[1:]
    if whole is not None or not parts:
        return whole
    last = _named(parts[-1], options)
    earlier = {_named(_sentence(part), options) for part in parts[:-1]} - {None}
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
        letter = option.strip().upper()
        if letter != LETTERS[i] and letter in list(LETTERS[:len(options)]):
            raise UserError(f"option {LETTERS[i]} has the text {option!r}, the letter of another; put them in order")
    index = _named(answer, options)
    if index is None or sum(same_answer(option, options[index]) for option in options) > 1:
        raise UserError(f"`answer` {answer[:80]!r} does not name exactly one of the options "
                         f"{str(list(options))[:200]}; give its letter or its text")
    return index


def _named(text: str, options: Sequence[str]) -> int | None:
    """The option that this text names, with nothing else in it."""
    plain, text = text.strip().strip("*").strip(), _bare(text)
    # As it stands first: an option may be "[0, 1]".
    same = ([i for i, option in enumerate(options) if same_answer(plain, option)]
            or [i for i, option in enumerate(options) if same_answer(text, option)])
    if same:
        return same[0] if len(same) == 1 else None
    index = len(options)
    if letter := _LETTER.fullmatch(text):
        index = LETTERS.index(letter[1].upper())
    elif labelled := _LABELLED.fullmatch(text):
        index = LETTERS.index((labelled[1] or labelled[2]).upper())
        if index < len(options) and not any(
                same_answer(said, options[index]) for said in (labelled[3].strip("* "), _bare(labelled[3]))):
            return None
    return index if index < len(options) else None


def _bare(text: str) -> str:
    """`text` without what only sets it off: quotation marks, Markdown, LaTeX's dollars, <answer>, a stop then."""
    bare = _SET_OFF.fullmatch(text.strip())
    return _bare(bare[2]) if bare else text.strip().strip("*").strip()


def _sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s|\n", text.strip(), maxsplit=1)[0]
