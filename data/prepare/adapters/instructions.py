"""Published sets of instructions and conversations. Each docstring: the layout, where it was read, and what becomes of
it."""

from collections.abc import Iterator
from typing import Any

from .reading import PLACEHOLDER, Record, published


@published(source="google/IFEval", licence="Apache-2.0", tasks="ifeval",
           files=["ifeval_input_data.jsonl", "train*.parquet"], fields=["prompt instruction_id_list kwargs"])
def ifeval(record: Record) -> Iterator[dict[str, Any]]:
    """IFEval (arXiv 2311.07911) as google/IFEval publishes it: prompts with instructions that a program can check.

    Layout: ifeval_input_data.jsonl, `key, prompt, instruction_id_list, kwargs`: a list of ids and, for each, its
    arguments. As parquet every entry of kwargs has every argument of all 25 ids, null where it is none of its own.
    The layout was read in the hub's card and in public code that reads it. Licence: Apache-2.0, read on the card.
    It is an evaluation set: rows for training come from rlvr_ifeval.

    Mapping: task ifeval; a constraint {"id", "kwargs"} for each id, with the arguments that are not null (a whole
    number that a table with gaps holds as 3.0 is 3). category: the ids, without their arguments.
    """
    ids, kwargs = record.texts("instruction_id_list"), record.data["kwargs"]
    if not ids:
        raise record.bad("instruction_id_list", "is empty: there is nothing to check")
    if not isinstance(kwargs, list) or len(kwargs) != len(ids):
        raise record.bad("kwargs", f"is {str(kwargs)[:60]!r}, not a list of {len(ids)}, one for each instruction")
    constraints = []
    for i, (name, own) in enumerate(zip(ids, kwargs, strict=True)):
        if not isinstance(own, dict | None):
            raise record.bad(f"kwargs[{i}]", f"is {str(own)[:60]!r}, not an object of arguments")
        given = {key: int(value) if isinstance(value, float) and value.is_integer() else value
                 for key, value in (own or {}).items() if value is not None}
        constraints.append({"id": name, "kwargs": given})
    yield {"task": "ifeval", "prompt": record.text("prompt"), "constraints": constraints,
           "category": " / ".join(sorted(ids))}


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@published(source="LLaVA-style conversations", licence="not stated", tasks="helpful", fields=["conversations"])
def llava(record: Record) -> Iterator[dict[str, Any]]:
    """LLaVA-style conversations (arXiv 2304.08485), the layout of many instruction sets and of SafeWork's SFT data.

    Layout: a JSON list or JSON lines of `{id?, image?, conversations}`; `image` (or `images`) is a path or a list
    of paths; conversations are `{from, value}` with from human, gpt (or user, assistant) and perhaps system first;
    `<image>` in a human turn is the place of the next image. Files have no fixed names: name them. The layout is as
    public code reads it. Licence: such a file states none, nor a source: give --licence and --source.

    Mapping: each reply of a conversation gives a row: the turns before it are `messages`, the reply is `chosen`.
    Task helpful, as nothing says what a right answer is. Without a placeholder the images stand first. A record
    with a video (or a sound), in a field or as <video> in a turn, is rejected.
    """
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
            content = record.content(f"conversations[{i}]", text, len(images[used:used + count]))
            used += count
        messages.append({"role": role, "content": content})
    if used < len(images):
        raise record.bad("conversations", f"has {used} {PLACEHOLDER} placeholders for {len(images)} images")
    if messages[-1]["role"] != "assistant":
        raise record.bad("conversations", "ends without a reply")


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
        part = record.part({f"{field}.{name}": value for name, value in turn.items()})
        made.append((part.choice(f"{field}.from", _ROLES), part.text(f"{field}.value")))
    return made


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


@published(source="allenai/RLVR-IFeval", licence="ODC-BY", tasks="ifeval", files=["train-*.parquet"],
           fields=["messages ground_truth constraint_type"])
def rlvr_ifeval(record: Record) -> Iterator[dict[str, Any]]:
    """RLVR-IFeval, the instruction-following data of Tulu 3 (arXiv 2411.15124): prompts with one checkable instruction.

    Layout: parquet (data/train-*.parquet), `messages, ground_truth, dataset, constraint_type, constraint`; messages
    are `{role, content}`, ground_truth a text that holds JSON: `func_name` and the arguments of all functions (`N,
    quantifier, keyword_list, ...`), null where they are not its own. Fields and licence were read on the card
    (allenai/RLVR-IFeval), functions and arguments in the authors' open-instruct (if_functions.py). Licence: ODC-BY.

    Mapping: task ifeval with one constraint of IFEval's, by FUNCTIONS; "at most N" is "less than N + 1". Where
    IFEval's checker asks for something else than the prompt does, the record is rejected by the function's name: an
    exact count of a word or letter, "around" a number (IFEval has at least and less than), paragraphs divided by *
    * * (there ***), and choices other than IFEval's own three. category: constraint_type.
    """
    truth = record.json("ground_truth")
    if not isinstance(truth, dict):
        raise record.bad("ground_truth", f"holds {str(truth)[:60]}, not an object of func_name and arguments")
    named = record.part({f"ground_truth.{key}": value for key, value in truth.items()})
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
