"""Task ifeval: which share of the row's `constraints` does the answer follow? By the checkers of package if-verifiable.

They are those of IFEval (arXiv 2311.07911). A constraint is one entry of its instruction_id_list with its kwargs:

    {"id": "length_constraints:number_words", "kwargs": {"num_words": 50, "relation": "at least"}}

Strict in IFEval's sense: the answer is checked as it stands, not also without its first line, last line or asterisks.
"""

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache, lru_cache
from typing import Any

from cosmo_rl.data.errors import MissingPackage, UserError

UNSUPPORTED = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
"""They split sentences and words with data of NLTK that no package holds, and nothing is downloaded here."""
_CLOSED_BY = {"detectable_content:number_placeholders": "]", "detectable_format:title": ">>"}
"""What the checker looks for ends so, on one line."""
_SPACED = {"detectable_content:postscript", "detectable_format:number_bullet_lists"}
"""Checkers that look for something after spaces and line breaks."""
_RUN = re.compile(r"(\s{50})(\s+)(\s{50})")


def followed(answer: str, constraints: Sequence[Mapping[str, Any]]) -> float:
    """Share of the constraints that an answer follows, in [0, 1]; one without a letter or digit follows none.

    Raises:
        UserError: as `check`.
    """
    checkers = check(constraints)
    if not any(map(str.isalnum, answer)):  # "." has no comma, and few words
        return 0.0
    return sum(_follows(checker, answer) for checker in checkers) / len(checkers)


def check(constraints: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The library's checkers of a row's constraints.

    Raises:
        UserError: there are none, an unknown or unsupported id, or kwargs that are missing, unknown or of no use;
            names the constraint and the mend.
        MissingPackage: if-verifiable is not installed; names the pip line.
    """
    if not constraints:
        raise UserError('task ifeval has no `constraints`; give [{"id": ..., "kwargs": {...}}]')
    return [_checker(json.dumps(constraint)) for constraint in constraints]


def _follows(checker: Any, answer: str) -> bool:
    # The library takes a text whose language nobody can tell, as an address of the web, for one in the language wanted.
    if checker.id.startswith(("language:", "change_case:")) and not _has_language(answer):
        return False
    try:
        return bool(checker.check_following(_searched(checker.id, answer)))
    except RecursionError:  # deeply nested JSON
        return False


def _searched(name: str, answer: str) -> str:
    """The answer less what cannot change the outcome: else some patterns take time by the square of its length."""
    if name in _CLOSED_BY:
        end = _CLOSED_BY[name]
        return "\n".join("".join(line.rpartition(end)[:2]) for line in answer.split("\n"))
    if name in _SPACED:
        return _RUN.sub(lambda run: run[1] + "\n" * ("\n" in run[2]) + run[3], answer)
    return answer


def _has_language(answer: str) -> bool:
    from langdetect import LangDetectException, detect

    try:
        return bool(detect(answer))
    except LangDetectException:
        return False


@lru_cache(maxsize=4096)
def _checker(written: str) -> Any:
    constraint = json.loads(written)
    known, name, kwargs = _registry(), constraint.get("id"), constraint.get("kwargs", {})
    if set(constraint) - {"id", "kwargs"} or not isinstance(name, str) or not isinstance(kwargs, dict):
        raise UserError(f'constraint {written[:200]} is not of the form {{"id": ..., "kwargs": {{...}}}}')
    if name in UNSUPPORTED:
        raise UserError(f"constraint {name} cannot be checked, as it needs data of NLTK that must be downloaded; "
                         "remove it, or the row")
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise UserError(f"there is no constraint {name!r}; "
                         + (f"did you mean {near[0]}?" if near else f"use one of {', '.join(sorted(known))}"))
    checker = known[name](name)
    wanted = checker.get_instruction_args_keys()
    if set(kwargs) != set(wanted):
        raise UserError(f"constraint {name} has kwargs {sorted(kwargs)}; give exactly {sorted(wanted)}")
    try:
        checker.build_description(**kwargs)
        checker.check_following("a")
        taken = checker.get_instruction_args() or {}
        # In place of a value that it cannot use, a checker draws one at random.
        bad = [key for key, value in kwargs.items() if _plain(taken[key]) != _plain(value)]
    except (ValueError, TypeError, AttributeError, KeyError, re.error) as error:
        raise UserError(f"constraint {name} has kwargs {kwargs}, which its checker refuses ({error!r}); correct them"
                         ) from error
    if bad:
        raise UserError(f"constraint {name} cannot use {bad[0]} {kwargs[bad[0]]!r}; correct it")
    return checker


def _plain(value: Any) -> Any:
    """A value as checkers keep it: text without case and margins, lists in order."""
    return value.strip().lower() if isinstance(value, str) else sorted(value) if isinstance(value, list) else value


@cache
def _registry() -> dict[str, Any]:
    try:
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
        from langdetect import DetectorFactory
    except ImportError as error:
        raise MissingPackage("task ifeval needs the checkers of if-verifiable: "
                             "pip install 'cosmo-rl[ifeval]'") from error
    DetectorFactory.seed = 0  # it guesses languages with random draws
    return {name: checker for name, checker in INSTRUCTION_DICT.items() if name not in UNSUPPORTED}
