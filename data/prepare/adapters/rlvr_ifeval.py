"""RLVR-IFeval, the instruction-following data of Tulu 3 (arXiv 2411.15124): prompts with one checkable instruction.

Layout: parquet (data/train-*.parquet), `messages, ground_truth, dataset, constraint_type, constraint`; messages are
`{role, content}`, ground_truth a text that holds JSON: `func_name` and the arguments of all functions (`N, quantifier,
keyword_list, ...`), null where they are not its own. Fields and licence were read on the card (allenai/RLVR-IFeval),
functions and arguments in the authors' open-instruct (if_functions.py). Licence: ODC-BY.

Mapping: task ifeval with one constraint of IFEval's, by FUNCTIONS; "at most N" is "less than N + 1". Where IFEval's
checker asks for something else than the prompt does, the record is rejected by the function's name: an exact count of a
word or letter, "around" a number (IFEval has at least and less than), paragraphs divided by * * * (there ***), and
choices other than IFEval's own three. category: constraint_type.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reading import Layout, Record, Reject, Source, adapt, fail

LAYOUT = Layout(name="rlvr_ifeval", source="allenai/RLVR-IFeval", licence="ODC-BY", tasks=("ifeval",),
                files=("train-*.parquet",), fields=(frozenset({"messages", "ground_truth", "constraint_type"}),))
FUNCTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "verify_keywords": ("keywords:existence", {"keyword_list": "keywords"}),
    "validate_forbidden_words": ("keywords:forbidden_words", {"forbidden_words": "forbidden_words"}),
    "validate_response_language": ("language:response_language", {"language": "language"}),
    "verify_paragraph_count": ("length_constraints:number_paragraphs", {"N": "num_paragraphs"}),
    "validate_word_constraint": ("length_constraints:number_words", {"N": "num_words", "quantifier": "relation"}),
    "verify_sentence_constraint": ("length_constraints:number_sentences",
                                   {"N": "num_sentences", "quantifier": "relation"}),
    "validate_paragraphs": ("length_constraints:nth_paragraph_first_word",
                            {"N": "num_paragraphs", "first_word": "first_word", "i": "nth_paragraph"}),
    "verify_postscript": ("detectable_content:postscript", {"postscript_marker": "postscript_marker"}),
    "validate_placeholders": ("detectable_content:number_placeholders", {"N": "num_placeholders"}),
    "verify_bullet_points": ("detectable_format:number_bullet_lists", {"N": "num_bullets"}),
    "validate_title": ("detectable_format:title", {}),
    "validate_choice": ("detectable_format:constrained_response", {"options": ""}),
    "validate_highlighted_sections": ("detectable_format:number_highlighted_sections", {"N": "num_highlights"}),
    "validate_sections": ("detectable_format:multiple_sections",
                          {"N": "num_sections", "section_splitter": "section_spliter"}),
    "validate_json_format": ("detectable_format:json_format", {}),
    "validate_repeat_prompt": ("combination:repeat_prompt", {"original_prompt": "prompt_to_repeat"}),
    "validate_two_responses": ("combination:two_responses", {}),
    "validate_uppercase": ("change_case:english_capital", {}),
    "validate_lowercase": ("change_case:english_lowercase", {}),
    "validate_frequency_capital_words": ("change_case:capital_word_frequency",
                                         {"N": "capital_frequency", "quantifier": "capital_relation"}),
    "validate_end": ("startend:end_checker", {"end_phrase": "end_phrase"}),
    "validate_quotation": ("startend:quotation", {}),
    "validate_no_commas": ("punctuation:no_comma", {}),
}
"""Their function -> IFEval's id, and their arguments -> IFEval's ("": it has none)."""
EXACT = ("verify_keyword_frequency", "verify_letter_frequency")
_CHOICES = {"My answer is yes.", "My answer is no.", "My answer is maybe."}
_KINDS = {"N": Record.whole, "i": Record.whole, "keyword_list": Record.texts, "forbidden_words": Record.texts,
          "options": Record.texts}


def rows(source: Source, *, images: str | Path | None = None, reject: Reject = fail) -> Iterator[dict[str, Any]]:
    """Rows of RLVR-IFeval; arguments and errors as `reading.adapt`."""
    return adapt(source, LAYOUT, _rows, images=images, reject=reject)


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    truth = record.json("ground_truth")
    if not isinstance(truth, dict):
        raise record.bad("ground_truth", f"holds {str(truth)[:60]}, not an object of func_name and arguments")
    named = Record({f"ground_truth.{key}": value for key, value in truth.items()}, record.where, ())
    yield {"task": "ifeval", "messages": record.data["messages"], "category": record.optional("constraint_type"),
           "constraints": [_constraint(named, str(record.data["messages"]))]}


def _constraint(truth: Record, prompt: str) -> dict[str, Any]:
    name = truth.text("ground_truth.func_name")
    refuse = lambda problem: truth.bad("ground_truth.func_name", f"{name}: {problem}", "leave the record out")
    if name in EXACT:
        raise refuse("it asks for an exact count, and IFEval's checker for at least or less than one")
    if name not in FUNCTIONS:
        raise refuse("no such function is known")
    known, arguments = FUNCTIONS[name]
    kwargs = {own: _KINDS.get(theirs, Record.text)(truth, f"ground_truth.{theirs}")
              for theirs, own in arguments.items()}
    if set(kwargs.pop("", _CHOICES)) != _CHOICES:
        raise refuse(f"its choices are not IFEval's own, {', '.join(sorted(_CHOICES))}")
    if name == "verify_paragraph_count" and "* * *" in prompt:
        raise refuse("its paragraphs are divided by * * *, and those of IFEval's checker by ***")
    number, relation = (arguments.get(theirs, "") for theirs in ("N", "quantifier"))
    if relation:
        if kwargs[relation] not in ("at least", "at most", "less than"):
            raise refuse(f"{kwargs[relation]!r} a number is nothing that IFEval's checker asks for")
        if kwargs[relation] == "at most":
            kwargs |= {relation: "less than", number: kwargs[number] + 1}
    return {"id": known, "kwargs": kwargs}
