r"""IFEval's instructions as their descriptions read, where the benchmark's own checkers depart from them.

A policy finds such a gap. Left to the library: response_language and english_lowercase (by the likeliest language of
the whole text, so a foreign sentence may pass), title (">>" need not be the title's own), two_responses (may differ by
a comma), end_checker (in any case, as all capitals may be asked for too). What ours do otherwise:

    existence, frequency, forbidden_words  a keyword is no pattern; frequency counts whole words, "C++" can be forbidden
    letter_frequency            any character, such as "#", which theirs replaces by a random letter
    number_sentences            split by nupunkt, as NLTK's data is no package: no item's number ends one, nor "e.g."
    number_paragraphs           "***" stands alone: bold italics do not divide
    number_words                "don't" is one word, "_" is none
    nth_paragraph_first_word    the n-th paragraph that is not empty; the word may be quoted, bold or have an apostrophe
    number_placeholders         "[]" is none
    postscript                  begins a line or follows a sentence, after a text, and says something
    number_bullet_lists         a bullet is "*", "-" or "+", a space and a text: no rule, no "-5", no line in italics
    constrained_response        one of the options, not several
    number_highlighted_sections ***a*** is one, "2 * 3 * 4" none
    multiple_sections           exactly as many, each mark at the start of a line and with a number of its own
    json_format                 an object or array, without NaN
    repeat_prompt               an answer follows
    capital_word_frequency      "DON'T" is one word
    english_capital             the language is guessed from small letters; capitals alone tell the guesser little
    no_comma                    the commas of other scripts are commas
    quotation                   curly marks are double quotation marks too; something is between them
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from cosmo_rl.data.errors import MissingPackage

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_STOPS = re.compile(r"([.!?]{20})[.!?]+([.!?]{20})")
_WORD = re.compile(r"[^\W_]+(?:['\u2019_][^\W_]+)*")
_FIRST = re.compile(r"[\W_]*([^\s.,?!:;\"\u201d]*)")
_DIVIDER = re.compile(r"(?<!\S)\*\*\*(?!\S)")
_BULLET = re.compile(r"^[ \t]*[*+-][ \t]+(?![ \t*-]*$)\S", re.MULTILINE)
_HIGHLIGHT = re.compile(r"(?<!\*)(\*{1,3})(?=[^\s*])[^*\n]*(?<=[^\s*])\1(?!\*)")
_COMMAS = re.compile("[,\uff0c\u3001\u060c\ufe50\ufe10\ufe11]")
_QUOTES = {'"': '"', "\u201c": "\u201d", "\u201e": "\u201c\u201d"}


def existence(answer: str, *, keywords: Sequence[str]) -> bool:
    return all(re.search(_literal(keyword), answer, re.IGNORECASE) for keyword in keywords)


def frequency(answer: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(len(re.findall(_whole(keyword), answer, re.IGNORECASE)), relation, frequency)


def forbidden_words(answer: str, *, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(_whole(word), answer, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(answer: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    if len(letter) != 1 or letter.isspace():
        raise ValueError(f"{letter!r} is not one letter")
    return _compare(answer.lower().count(letter.lower()), let_relation, let_frequency)


def number_sentences(answer: str, *, num_sentences: int, relation: str) -> bool:
    return _compare(len(sentences(answer)), relation, num_sentences)


def number_paragraphs(answer: str, *, num_paragraphs: int) -> bool:
    parts = _DIVIDER.split(answer)
    inner = parts[1:-1]  # the text may begin and end with a divider
    return all(map(str.strip, inner)) and sum(bool(part.strip()) for part in parts) == num_paragraphs


def number_words(answer: str, *, num_words: int, relation: str) -> bool:
    return _compare(len(_WORD.findall(answer)), relation, num_words)


def nth_paragraph_first_word(answer: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    if len(first_word.split()) != 1 or not says(first_word):
        raise ValueError(f"{first_word!r} is not one word")
    paragraphs = [part for part in answer.split("\n\n") if part.strip()]
    if len(paragraphs) != num_paragraphs:
        return False
    word = _FIRST.match(paragraphs[nth_paragraph - 1])
    return word is not None and _bare(word[1]) == _bare(first_word)


def number_placeholders(answer: str, *, num_placeholders: int) -> bool:
    return sum(map(says, re.findall(r"\[([^\[\]\n]*)\]", answer))) >= num_placeholders


def postscript(answer: str, *, postscript_marker: str) -> bool:
    marker = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}.get(postscript_marker, _literal(postscript_marker))
    for found in re.finditer(rf"(?:^|\n|(?<=[.!?\"')])\s)[*_>#]*{marker}", answer, re.IGNORECASE):
        if says(answer[:found.start()]):
            return says(answer[found.end():])
    return False


def number_bullet_lists(answer: str, *, num_bullets: int) -> bool:
    return len(_BULLET.findall(answer)) == num_bullets


def constrained_response(answer: str) -> bool:
    return sum(option in answer for option in OPTIONS) == 1


def number_highlighted_sections(answer: str, *, num_highlights: int) -> bool:
    return sum(says(found.group()) for found in _HIGHLIGHT.finditer(answer)) >= num_highlights


def multiple_sections(answer: str, *, section_spliter: str, num_sections: int) -> bool:
    marks = re.findall(rf"^[*_#> \t]*{_literal(section_spliter)}[ \t]?(\d+)", answer, re.MULTILINE)
    return len(marks) == len(set(marks)) == num_sections


def json_format(answer: str) -> bool:
    text = answer.strip()
    text = re.sub(r"^```(?:json)?", "", text, flags=re.IGNORECASE).removesuffix("```")
    try:
        return isinstance(json.loads(text, parse_constant=_no_json), dict | list)
    except (ValueError, RecursionError):  # nested too deep
        return False


def repeat_prompt(answer: str, *, prompt_to_repeat: str) -> bool:
    text, prompt = answer.strip().lower(), prompt_to_repeat.strip().lower()
    return text.startswith(prompt) and says(text.removeprefix(prompt))


def capital_word_frequency(answer: str, *, capital_frequency: int, capital_relation: str) -> bool:
    capital = [word for word in tokens(answer) if word.isupper() and word[0] not in "'\u2019" and word.lower() != "n't"]
    return _compare(len(capital), capital_relation, capital_frequency)


def english_capital(answer: str) -> bool:
    return answer.isupper() and language(answer.lower()) == "en"


def no_comma(answer: str) -> bool:
    return not _COMMAS.search(answer)


def quotation(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 2 and text[-1] in _QUOTES.get(text[0], ()) and says(text)


OURS: Mapping[str, Callable[..., bool]] = {
    "keywords:existence": existence, "keywords:frequency": frequency, "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency, "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs, "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders, "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections, "detectable_format:json_format": json_format,
    "combination:repeat_prompt": repeat_prompt, "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital, "punctuation:no_comma": no_comma, "startend:quotation": quotation,
}
"""Our reading by the constraint's id: called with the answer and the constraint's kwargs."""


def language(answer: str) -> str:
    """ISO code of the likeliest language, the same each time; "" when nobody can tell."""
    from langdetect import LangDetectException, detect

    try:
        return detect(answer)
    except LangDetectException:
        return ""


def sentences(text: str) -> list[str]:
    """The sentences of a text; long runs of stops are cut, as they take the splitter the square of their length."""
    return list(_splitter().tokenize(_STOPS.sub(r"\1\2", text)))


def tokens(text: str) -> list[str]:
    """NLTK's word tokens. Not sentence by sentence as there: a full stop may stay at its word, in capitals or not."""
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer().tokenize(text)


@cache
def _splitter() -> Any:
    try:
        import nupunkt
    except ImportError as error:
        raise MissingPackage("task ifeval needs the sentence splitter nupunkt: "
                             "pip install 'cosmo-rl[ifeval]'") from error
    return nupunkt.load("default")


def _compare(count: int, relation: str, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


def _literal(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty")
    return re.escape(text.strip())


def _whole(text: str) -> str:
    return rf"(?<!\w){_literal(text)}(?!\w)"


def _bare(word: str) -> str:
    return re.sub(r"^[\W_]+|[\W_]+$", "", word.lower().replace("\u2019", "'"))


def says(text: str) -> bool:
    """Whether a text holds a letter or a digit."""
    return any(map(str.isalnum, text))


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
