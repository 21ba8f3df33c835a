"""Rows in google/IFEval's layout: key, prompt, instruction_id_list, kwargs, where every kwargs holds every argument."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

KWARGS: dict[str, dict[str, Any]] = {
    "keywords:existence": {"keywords": ["cup", "Tea"]},
    "keywords:frequency": {"keyword": "cup", "frequency": 2, "relation": "at least"},
    "keywords:forbidden_words": {"forbidden_words": ["tea"]},
    "keywords:letter_frequency": {"letter": "q", "let_frequency": 1, "let_relation": "less than"},
    "language:response_language": {"language": "fr"},
    "length_constraints:number_sentences": {"num_sentences": 2, "relation": "at least"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "length_constraints:number_words": {"num_words": 3, "relation": "at least"},
    "length_constraints:nth_paragraph_first_word": {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "cup"},
    "detectable_content:number_placeholders": {"num_placeholders": 1},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:number_bullet_lists": {"num_bullets": 2},
    "detectable_format:constrained_response": {},
    "detectable_format:number_highlighted_sections": {"num_highlights": 1},
    "detectable_format:multiple_sections": {"section_spliter": "SECTION", "num_sections": 2},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "combination:two_responses": {},
    "combination:repeat_prompt": {"prompt_to_repeat": "Make tea."},
    "startend:end_checker": {"end_phrase": "That is all."},
    "change_case:capital_word_frequency": {"capital_frequency": 2, "capital_relation": "at least"},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "punctuation:no_comma": {},
    "startend:quotation": {},
}
"""Of all 25 ids, the kwargs that they take."""
_FIELDS = {name: type(value) for kwargs in KWARGS.values() for name, value in kwargs.items()}
_TYPES = {int: pa.int64(), str: pa.string(), list: pa.list_(pa.string())}


def write_ifeval(path: str | Path) -> list[dict[str, Any]]:
    """A parquet file of one row per id, and a last one with three; returns its rows as they are read back."""
    of = lambda *ids: {"instruction_id_list": list(ids), "kwargs": [
        {name: KWARGS[one].get(name) for name in _FIELDS} for one in ids]}
    rows = [{"key": 1000 + i, "prompt": f"Write about tea ({one}).", **of(one)} for i, one in enumerate(KWARGS)]
    rows.append({"key": 2000, "prompt": "Write about tea.", **of(
        "punctuation:no_comma", "length_constraints:number_words", "detectable_format:number_highlighted_sections")})
    kwargs = pa.struct([(name, _TYPES[kind]) for name, kind in _FIELDS.items()])
    schema = pa.schema([("key", pa.int64()), ("prompt", pa.string()), ("instruction_id_list", pa.list_(pa.string())),
                        ("kwargs", pa.list_(kwargs))])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return pq.read_table(path).to_pylist()
