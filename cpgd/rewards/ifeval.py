"""Task ifeval: which share of the row's `constraints` does the answer follow? IFEval's 25, arXiv 2311.07911.

A constraint is one entry of the benchmark's instruction_id_list with its kwargs, where null means absent:

    {"id": "length_constraints:number_words", "kwargs": {"num_words": 50, "relation": "at least"}}

Its id may be named `instruction_id`. Each is read as its description says: `ifeval_checks` lists where the benchmark's
own checkers (package if-verifiable) depart from that. With `"as_published": true` it is read by them.
Strict in IFEval's sense: the answer is checked as it stands, not also without its first line, last line or asterisks.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from cosmo_rl.data.errors import MissingPackage, UserError
from cosmo_rl.data.foreign import nearest

from .ifeval_checks import OURS, language, says, tokens

_CLOSED_BY = {"detectable_content:number_placeholders": "]", "detectable_format:title": ">>"}
"""What the checker looks for ends so, on one line."""
_SPACED = {"detectable_content:postscript", "detectable_format:number_bullet_lists"}
"""Checkers that look for something after spaces and line breaks."""
_UNTOLD: Mapping[str, Callable[[str], bool]] = {
    "language:response_language": lambda answer: True, "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower}
"""What the benchmark's checkers find where nobody can tell the language; they would log the answer as an error."""
_RUN = re.compile(r"(\s{50})(\s+)(\s{50})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checker:
    """A constraint, ready to be checked."""

    id: str
    follows: Callable[[str], bool]


def followed(answer: str, constraints: Sequence[Mapping[str, Any]]) -> float:
    """Share of the constraints that an answer follows, in [0, 1]; an empty one follows none.

    Raises:
        UserError: as `check`.
    """
    checkers = check(constraints)
    if not answer.strip():
        return 0.0
    return sum(checker.follows(answer) for checker in checkers) / len(checkers)


def check(constraints: Sequence[Mapping[str, Any]]) -> list[Checker]:
    """The checkers of a row's constraints.

    Raises:
        UserError: there are none, an unknown id, or kwargs that are missing, unknown or of no use; names the
            constraint and the mend.
        MissingPackage: if-verifiable or nupunkt is not installed; names the pip line.
    """
    if not constraints:
        raise UserError('task ifeval has no `constraints`; give [{"id": ..., "kwargs": {...}}]')
    return [_checker(json.dumps(constraint, default=repr)) for constraint in constraints]


@lru_cache(maxsize=4096)
def _checker(written: str) -> Checker:
    known, (name, kwargs, as_published) = _registry(), _parts(written)
    if name not in known:
        near = nearest(name, known)
        raise UserError(f"there is no constraint {name[:100]!r}; "
                        + (f"did you mean {near}?" if near else f"use one of {', '.join(sorted(known))}"))
    theirs = known[name](name)
    wanted = theirs.get_instruction_args_keys()
    if set(kwargs) != set(wanted):
        raise UserError(f"constraint {name} has kwargs {str(sorted(kwargs))[:200]}; give exactly {sorted(wanted)}")
    ours = None if as_published else OURS.get(name)
    reads = (lambda answer: ours(answer, **kwargs)) if ours else _published(theirs)
    follows = reads if as_published else lambda answer: _speaks(name, answer) and reads(answer)
    # The library knows no letters but a to z.
    stands_in = {"letter": "a"} if ours and "letter" in kwargs else {}
    bad = [key for key, value in kwargs.items() if not _usable(value)]
    try:
        if not bad:  # in place of a value that it cannot use, a checker draws one at random
            theirs.build_description(**kwargs | stands_in)
            taken = (theirs.get_instruction_args() or {}) | {key: kwargs[key] for key in stands_in}
            bad = [key for key, value in kwargs.items() if _plain(taken[key]) != _plain(value)]
        if not bad:
            follows("a")
    except MissingPackage:  # no constraint's fault
        raise
    except (ValueError, TypeError, AttributeError, KeyError, re.error) as error:
        raise UserError(f"constraint {name} has kwargs {str(kwargs)[:200]}, which its checker refuses "
                        f"({repr(error)[:200]}); correct them") from error
    if bad:
        raise UserError(f"constraint {name} cannot use {bad[0]} {repr(kwargs[bad[0]])[:200]}; correct it")
    return Checker(id=name, follows=follows)


def _parts(written: str) -> tuple[str, dict[str, Any], bool]:
    """Id, kwargs and whether to read it as published; what is null is absent, as in the hub's parquet files."""
    read = json.loads(written)
    given = {key: value for key, value in read.items() if value is not None} if isinstance(read, dict) else {}
    names = {given.pop(key) for key in ("id", "instruction_id") if isinstance(given.get(key), str)}
    kwargs, as_published = given.pop("kwargs", {}), given.pop("as_published", False)
    if given or len(names) != 1 or not isinstance(kwargs, dict) or not isinstance(as_published, bool):
        raise UserError(f'constraint {written[:200]} is not of the form {{"id": ..., "kwargs": {{...}}}}')
    kwargs = {key: int(value) if isinstance(value, float) and value.is_integer() else value
              for key, value in kwargs.items() if value is not None}
    return names.pop(), kwargs, as_published


def _usable(value: Any) -> bool:
    """No blank text, and numbers that count something: parquet files by way of pandas hold 3.0."""
    if isinstance(value, bool | float | int):
        return not isinstance(value, bool) and value >= 0 and value % 1 == 0
    return not isinstance(value, str) or bool(value.strip())


def _speaks(name: str, answer: str) -> bool:
    """Whether there is anything to check: "." has no comma, and few words.

    The library takes a text whose language nobody can tell, as an address of the web, for one in the language wanted.
    """
    return says(answer) and (not name.startswith(("language:", "change_case:english")) or bool(language(answer)))


def _published(checker: Any) -> Callable[[str], bool]:
    """The benchmark's own reading."""
    if checker.id == "length_constraints:number_sentences":  # theirs loads data that must be downloaded
        return lambda answer: OURS[checker.id](answer, **checker.get_instruction_args())
    if checker.id == "change_case:capital_word_frequency":
        return lambda answer: _capital_tokens(answer, **checker.get_instruction_args())

    def follows(answer: str) -> bool:
        if checker.id in _UNTOLD and not language(answer):
            return _UNTOLD[checker.id](answer)
        try:
            return bool(checker.check_following(_searched(checker.id, answer)))
        except RecursionError:  # deeply nested JSON
            return False

    return follows


def _capital_tokens(answer: str, *, capital_frequency: int, capital_relation: str) -> bool:
    count = sum(map(str.isupper, tokens(answer)))
    return count < capital_frequency if capital_relation == "less than" else count >= capital_frequency


def _searched(name: str, answer: str) -> str:
    """The answer less what cannot change the outcome: else some patterns take time by the square of its length."""
    if name in _CLOSED_BY:
        end = _CLOSED_BY[name]
        return "\n".join("".join(line.rpartition(end)[:2]) for line in answer.split("\n"))
    if name in _SPACED:
        return _RUN.sub(lambda run: run[1] + "\n" * ("\n" in run[2]) + run[3], answer)
    return answer


def _plain(value: Any) -> Any:
    """A value as checkers keep it: text without case and margins, lists as sets in order."""
    if isinstance(value, str):
        return value.strip().lower()
    return sorted(set(value)) if isinstance(value, list) else value


@cache
def _registry() -> dict[str, Any]:
    try:
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
        from langdetect import DetectorFactory
    except ImportError as error:
        raise MissingPackage("task ifeval needs the checkers of if-verifiable: "
                             "pip install 'cosmo-rl[ifeval]'") from error
    DetectorFactory.seed = 0  # it guesses languages with random draws
    return dict(INSTRUCTION_DICT)
