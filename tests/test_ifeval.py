"""IFEval's checkers as rewards: the share that is followed, always the same, and constraints that are refused."""

import builtins
import random
import time
from typing import Any

import pytest
from ifeval_rows import KWARGS, write_ifeval

from cosmo_rl.cpgd.rewards import ifeval, ifeval_checks
from cosmo_rl.cpgd.rewards.ifeval import check, followed


def constraint(name, **kwargs):
    return {"id": name, "kwargs": kwargs}


FRENCH = "Bonjour, je voudrais un peu de pain et du fromage, s'il vous plait."
# Of every id an answer that follows it, and one that does not.
IDS = {
    "keywords:existence": ("tea in a cup", "a cup"),
    "keywords:frequency": ("cup, cup", "cup"),
    "keywords:forbidden_words": ("team", "Tea"),
    "keywords:letter_frequency": ("tea", "quiet"),
    "language:response_language": (FRENCH, "I would like some bread, please."),
    "length_constraints:number_sentences": ("Dr. Who has tea, e.g. mint. It is good.", "Dr. Who has tea, e.g. mint."),
    "length_constraints:number_paragraphs": ("a\n***\nb", "a b"),
    "length_constraints:number_words": ("one two three", "one two"),
    "length_constraints:nth_paragraph_first_word": ("a\n\ncup b", "cup a\n\nb"),
    "detectable_content:number_placeholders": ("Dear [name]", "Dear name"),
    "detectable_content:postscript": ("bye\nP.S. tea", "bye"),
    "detectable_format:number_bullet_lists": ("* a\n* b", "* a\n* b\n* c"),
    "detectable_format:constrained_response": ("My answer is yes.", "Yes."),
    "detectable_format:number_highlighted_sections": ("a *b*", "a b"),
    "detectable_format:multiple_sections": ("SECTION 1\na\nSECTION 2\nb", "SECTION 1\na"),
    "detectable_format:json_format": ('{"tea": 1}', '{"tea": 1'),
    "detectable_format:title": ("<<Tea>>\na", "Tea\na"),
    "combination:two_responses": ("a\n******\nb", "a\n******\na"),
    "combination:repeat_prompt": ("Make tea. Done.", "Done. Make tea."),
    "startend:end_checker": ("Tea. That is all.", "That is all. Tea."),
    "change_case:capital_word_frequency": ("Tea for NASA and the UN.", "Tea for NASA and the Un."),
    "change_case:english_capital": ("THIS IS A CUP OF TEA FOR YOU", "This is a cup of tea for you"),
    "change_case:english_lowercase": ("this is a cup of tea for you", "This is a cup of tea for you"),
    "punctuation:no_comma": ("a b", "a, b"),
    "startend:quotation": ('"a"', '"a" b'),
}
ONES = {name: constraint(name, **kwargs) for name, kwargs in KWARGS.items()}


def published(one):
    return one | {"as_published": True}


def of(name, **kwargs):
    """The constraint of IDS with other kwargs."""
    name = next(known for known in KWARGS if known.endswith(f":{name}"))
    return constraint(name, **KWARGS[name] | kwargs)


@pytest.mark.parametrize("name", KWARGS)
def test_every_checker(name):
    follows, breaks = IDS[name]
    for one in (ONES[name], published(ONES[name])):
        check([one])
        assert followed(follows, [one]) == 1 and followed(breaks, [one]) == 0


def test_every_id_of_the_library_is_tested():
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    assert set(IDS) == set(KWARGS) == set(INSTRUCTION_DICT) and len(IDS) == 25


# Where we depart from the benchmark: (constraint, answer, ours, as published).
DEPARTURES = [
    (of("existence", keywords=["a.b"]), "axb", 0, 1), (of("existence", keywords=["*tea"]), "a *tea", 1, None),
    (of("existence", keywords=["C++"]), "C", 0, 1), (of("existence", keywords=["C++"]), "I like C++.", 1, 1),
    (of("frequency"), "cup, cups", 0, 1), (of("frequency"), "cup (cup)", 1, 1),
    (of("forbidden_words", forbidden_words=["C#"]), "C# is fine", 0, 1),
    (of("forbidden_words", forbidden_words=["C#"]), "C is fine", 1, 1),
    (of("letter_frequency", letter="#", let_frequency=2, let_relation="at least"), "#a #b", 1, None),
    (of("letter_frequency", letter="#", let_frequency=2, let_relation="at least"), "#a b", 0, None),
    (of("number_paragraphs"), "a ***b c", 0, 1), (of("number_paragraphs"), "***\na\n***\nb\n***", 1, 1),
    (of("number_paragraphs", num_paragraphs=1), "a ***very*** nice cup", 1, 0),
    (of("number_words"), "don't go", 0, 1), (of("number_words"), "a _ _", 0, 1), (of("number_words"), "a b_c d", 1, 1),
    (of("nth_paragraph_first_word", nth_paragraph=1, first_word="apple"),
     "\n\nApple pie is good.\n\nBanana bread too.", 1, 0),
    (of("nth_paragraph_first_word", nth_paragraph=1, first_word="apple"),
     "\n\nBanana bread.\n\nApple pie.", 0, 0),
    (of("nth_paragraph_first_word"), "a\n\n\n\ncup b", 1, 0), (of("nth_paragraph_first_word"), "a\n\n**Cup** b", 1, 0),
    (of("nth_paragraph_first_word"), "a\n\n\u201cCup,\u201d b", 1, 0),
    (of("nth_paragraph_first_word"), "a\n\nCup's b", 0, 1),
    (of("nth_paragraph_first_word", first_word="Don't"), "a\n\nDon\u2019t b", 1, 0),
    (of("number_placeholders"), "a []", 0, 1), (of("number_placeholders"), "a [ ]", 0, 1),
    (of("postscript"), "P.S. tea", 0, 1), (of("postscript"), "bye (p.s.)", 0, 1), (of("postscript"), "bye\nP.S.", 0, 1),
    (of("postscript"), "bye\nP.P.S. tea", 0, 1), (of("postscript"), "Bye. P.S. tea", 1, 1),
    (of("postscript"), "bye\n\n**P.S.** tea", 1, 1),
    (of("postscript", postscript_marker="P.P.S"), "bye\nP. P. S. tea", 1, 1),
    (of("postscript", postscript_marker="P.P.S"), "bye\nP.S. tea", 0, 0),
    (of("postscript", postscript_marker="(Note)"), "bye\n(note) tea", 1, 1),
    (of("number_bullet_lists"), "* a\n* b\n---\nc", 1, 0), (of("number_bullet_lists"), "* a\n-5 degrees", 0, 1),
    (of("number_bullet_lists"), "*a* is b\n* c", 0, 1), (of("number_bullet_lists"), "+ a\n  + b", 1, 0),
    (of("number_bullet_lists"), "- **a**\n* b\n* * *", 1, 0), (of("number_bullet_lists"), "* a\n*\n* b", 1, 1),
    (of("constrained_response"), "My answer is yes. My answer is no.", 0, 1),
    (of("constrained_response"), "Well. My answer is maybe.", 1, 1),
    (of("number_highlighted_sections"), "2 * 3 * 4", 0, 1), (of("number_highlighted_sections", num_highlights=2),
                                                            "***a***", 0, 1),
    (of("number_highlighted_sections", num_highlights=2), "*a* and **b c**", 1, 1),
    (of("number_highlighted_sections"), "* a\n* b", 0, 0), (of("number_highlighted_sections"), "* a *", 0, 1),
    (of("multiple_sections"), "SECTION 1 a\nSECTION 2 b\nSECTION 3 c", 0, 1),
    (of("multiple_sections"), "SECTION 1\nas in SECTION 2", 0, 1),
    (of("multiple_sections"), "SECTION 1\nSECTION 1", 0, 1),
    (of("multiple_sections"), "## SECTION 1\na\n**SECTION 2**\nb", 1, 1),
    (of("json_format"), "7", 0, 1), (of("json_format"), '"tea"', 0, 1), (of("json_format"), '{"a": NaN}', 0, 1),
    (of("json_format"), '```JSON\n[{"a": [1]}]\n```', 1, 1),
    (of("repeat_prompt"), "Make tea.", 0, 1), (of("repeat_prompt"), "Make tea.\n\n...", 0, 1),
    (of("capital_word_frequency"), "I DON'T", 1, 1), (of("capital_word_frequency"), "You DON'T", 0, 1),
    (of("capital_word_frequency"), "IT'S so", 0, 1), (of("capital_word_frequency"), "TOP-END as NASA", 1, 1),
    (of("english_capital"), "HELLO WORLD", 1, 0), (of("english_capital"), FRENCH.upper(), 0, 0),
    (of("no_comma"), "\u8336\uff0c\u676f", 0, 1), (of("no_comma"), "\u0634\u0627\u06cc\u060c", 0, 1),
    (of("no_comma"), "1.5; 'a'", 1, 1),
    (of("quotation"), "\u201ctea\u201d", 1, 0), (of("quotation"), '"."', 0, 1), (of("quotation"), "\u201ctea\"", 0, 0),
    (of("response_language"), "http://a.bc", 0, 1), (of("english_lowercase"), "a@b.cd", 0, 1),
    (of("english_lowercase"), "...", 0, 0), (of("no_comma"), "...", 0, 1),
]


@pytest.mark.parametrize(("one", "answer", "ours", "theirs"), DEPARTURES)
def test_departures_from_the_benchmark(one, answer, ours, theirs):
    """None: their checker refuses the kwargs (a keyword is a pattern, a letter outside a to z drawn at random)."""
    assert followed(answer, [one]) == ours
    if theirs is None:
        with pytest.raises(ValueError, match=r"cannot use letter '#'|nothing to repeat"):
            followed(answer, [published(one)])
    else:
        assert followed(answer, [published(one)]) == theirs


@pytest.mark.parametrize(("answer", "count"), [
    ("Hello world.", 1), ("Dr. Smith met Mr. Jones at 5 p.m. in the park. They had tea.", 2),
    ("Wait... what? No!", 2), ("Wait. What? No!", 3),
    ("The price is 3.50 dollars. It is fair.", 2), ("I live in the U.S. and like it.", 1), ("a without a stop", 1),
    ('"I am here." "So am I."', 2), ("1. Wash the rice.\n2. Boil it.\n3. Serve.", 3), ("What?! No way!! Yes.", 3),
    ("Cats, e.g. mine, sleep. See Fig. 3 for one.", 2), ("J. K. Rowling wrote it.", 1), ("", 0), ("!?" * 50_000, 1),
    ("Tea. " + "." * 50_000 + " Cup.", 2),
])
def test_sentences_are_split(answer, count):
    assert len(ifeval_checks.sentences(answer)) == count


def test_what_is_cut_from_long_runs_of_a_stop_changes_no_count():
    rng, split, cut = random.Random(0), ifeval_checks._splitter(), 0
    for _ in range(1000):
        runs = [rng.choice(".?!") * rng.choice((1, 3, 30, 60)) for _ in range(4)]
        text = "".join(rng.choice((" Tea", " a", '"', ")")) + run + rng.choice((" ", "\n", '" ', ") ")) for run in runs)
        cut += max(map(len, runs)) > 40
        assert len(ifeval_checks.sentences(text)) == len(list(split.tokenize(text))), text
    assert cut > 500


def test_rows_in_the_hubs_layout_are_read_as_they_come(tmp_path):
    """Every kwargs holds every argument, null where it does not apply; `instruction_id` and null keys as well."""
    rows = write_ifeval(tmp_path / "ifeval.parquet")
    assert {name for row in rows for name in row["instruction_id_list"]} == set(IDS)
    assert all(len(kwargs) == 24 for row in rows for kwargs in row["kwargs"])
    for row in rows:
        pairs = list(zip(row["instruction_id_list"], row["kwargs"], strict=True))
        for key, other in (("id", "instruction_id"), ("instruction_id", "id")):
            ones = [{key: name, other: None, "kwargs": kwargs, "as_published": None} for name, kwargs in pairs]
            assert [checker.id for checker in check(ones)] == row["instruction_id_list"]
        if len(ones) == 1:
            assert [followed(answer, ones) for answer in IDS[ones[0]["instruction_id"]]] == [1, 0]
    assert followed("one *two* three", ones) == 1 and followed("one *two*", ones) == pytest.approx(2 / 3)


def test_the_value_is_the_share_that_is_followed():
    three = [constraint(name) for name in ("punctuation:no_comma", "startend:quotation", "detectable_format:title")]
    assert followed('"<<a>>"', three) == 1 and followed("<<a>>", three) == pytest.approx(2 / 3)
    assert followed("a, b", three) == 0 and followed("  ", [constraint("punctuation:no_comma")]) == 0


def test_strict_the_answer_as_it_stands():
    assert followed("Sure:\n'a'", [constraint("startend:quotation")]) == 0
    assert followed('Sure:\n"a"', [constraint("startend:quotation")]) == 0, "loose would drop the first line"


def test_counts_may_be_floats_without_a_fraction():
    one = of("nth_paragraph_first_word", num_paragraphs=2.0, nth_paragraph=2.0, first_word="b")
    assert followed("a\n\nb", [one]) == 1 and followed("b\n\na", [published(one)]) == 0


def test_a_text_without_letters_follows_no_language():
    """The library counts it as followed: an easy way out for a policy."""
    for one in (constraint("language:response_language", language="fr"), constraint("change_case:english_capital")):
        assert followed("123 ...", [one]) == 0


@pytest.mark.parametrize("mark", [{}, {"as_published": True}])
def test_deep_nesting_is_a_value_and_no_crash(mark):
    assert followed("[" * 100_000, [constraint("detectable_format:json_format") | mark]) == 0


QUICK = [one for name, one in ONES.items() if not name.startswith(("language:", "change_case:english"))]


@pytest.mark.parametrize("part", ["[", "<<", "<<>", " ", "\n", " \n", "\u00a0", "*", "- ", '"', "{", "p.", "a ", "*a",
                                  "!?", "\nP.S.", "\nSECTION 1", "***", " ***", "* ", "'", "_", "1. "])
def test_no_answer_takes_long(part):
    """100 kB; the library's patterns of placeholders, titles, bullets and postscripts take its square, hours."""
    ones = [*QUICK, *(published(one) for one in QUICK if one["id"][-9:] not in ("sentences", "frequency"))]
    check(ones)
    started = time.process_time()
    followed("a " + part * (100_000 // len(part)), ones)
    assert time.process_time() - started < 8


def test_what_is_left_out_to_be_quick_changes_no_outcome():
    """On short texts of what the patterns look for, against the library's own checkers."""
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    rng = random.Random(0)
    ones = [of(name) for name in ("number_placeholders", "title", "postscript", "number_bullet_lists")]
    ones.append(of("postscript", postscript_marker="P.P.S"))
    parts = ["[", "]", "\n", "<<", ">>", "<", ">", "*", "-", " ", "a", "P.", "S.", "P.P.S", " " * 120, "\n" * 120,
             " " * 60 + "\n" + " " * 60, "\n" + " " * 120, " " * 120 + "\n"]
    theirs = [INSTRUCTION_DICT[one["id"]](one["id"]) for one in ones]
    for checker, one in zip(theirs, ones, strict=True):
        checker.build_description(**one["kwargs"])
    outcomes = set()
    for _ in range(3000):
        text = "a" + "".join(rng.choices(parts, k=rng.randint(1, 12)))
        for checker, ours in zip(theirs, check(list(map(published, ones))), strict=True):
            outcome = bool(checker.check_following(text))
            assert ours.follows(text) == outcome, (checker.id, text)
            outcomes.add((checker.id, outcome))
    assert len(outcomes) == 2 * 4, "each was followed and not"


def test_a_language_is_guessed_the_same_each_time():
    """The library's guess at a short text changes from call to call: one in four for this one."""
    import langdetect

    check([constraint("language:response_language", language="en")])
    assert len({langdetect.detect("I am a man") for _ in range(40)}) == 1


def test_no_checker_draws_at_random():
    random.seed(0)
    before = random.getstate()
    ifeval._checker.cache_clear()
    check([*ONES.values(), *map(published, ONES.values()), of("letter_frequency", letter="#")])
    assert random.getstate() == before


@pytest.mark.parametrize(("constraints", "message"), [
    ([], "task ifeval has no `constraints`; give"),
    ([{"id": "punctuation:no_comma", "x": 1}], "is not of the form"), ([{"kwargs": {}}], "is not of the form"),
    ([{"id": "punctuation:no_comma", "kwargs": []}], "is not of the form"),
    ([constraint("punctuation:no_commas")], "no constraint 'punctuation:no_commas'; did you mean punctuation:no_comma"),
    ([constraint("x")], "no constraint 'x'; use one of change_case:capital_word_frequency, "),
    (["tea"], "is not of the form"), ([{}], "is not of the form"), ([{"id": 3}], "is not of the form"),
    ([{"id": None, "kwargs": {}}], "is not of the form"), ([{"id": b"tea"}], "there is no constraint"),
    ([{"id": "punctuation:no_comma", "instruction_id": "startend:quotation"}], "is not of the form"),
    ([{"id": "punctuation:no_comma", "as_published": "yes"}], "is not of the form"),
    ([of("number_sentences", num_sentences=None)], r"has kwargs \['relation'\]; give exactly"),
    ([of("number_sentences", relation="at most")], "refuses"),
    ([of("number_sentences", num_sentences="two")], "refuses"),
    ([of("capital_word_frequency", capital_relation="at most")], "refuses"),
    ([of("capital_word_frequency", capital_frequency=-1)], "cannot use capital_frequency -1"),
    ([of("existence", keywords=[""])], "refuses .*empty"), ([of("existence", keywords=["tea", 3])], "refuses"),
    ([of("forbidden_words", forbidden_words="tea")], "cannot use forbidden_words 'tea'"),
    ([of("forbidden_words", forbidden_words=[["tea"]])], "refuses"),
    ([of("letter_frequency", letter="")], "cannot use letter ''"),
    ([of("letter_frequency", letter=" ")], "cannot use letter ' '"),
    ([of("nth_paragraph_first_word", first_word="my cup")], "refuses .*not one word"),
    ([of("nth_paragraph_first_word", nth_paragraph=3)], "cannot use nth_paragraph 3"),
    ([of("multiple_sections", section_spliter=" ")], "cannot use section_spliter ' '"),
    ([of("multiple_sections", section_spliter=3)], "refuses"),
    ([of("number_bullet_lists", num_bullets=[2])], "refuses"), ([of("postscript", postscript_marker={})], "refuses"),
    ([of("nth_paragraph_first_word", first_word="#")], "refuses .*not one word"),
    ([of("nth_paragraph_first_word", nth_paragraph=1.5)], "cannot use nth_paragraph 1.5"),
    ([of("number_words", num_words=True)], "cannot use num_words True"),
    ([of("number_words", num_words=float("nan"))], "cannot use num_words nan"),
    ([of("number_words", num_words=float("inf"))], "cannot use num_words inf"),
    ([of("end_checker", end_phrase="\n")], r"cannot use end_phrase '\\n'"),
    ([of("repeat_prompt", prompt_to_repeat="")], "cannot use prompt_to_repeat ''"),
    ([of("repeat_prompt", prompt_to_repeat=3)], "refuses"),
    ([constraint("length_constraints:number_words", num_words=3)], r"has kwargs \['num_words'\]; give exactly "
     r"\['num_words', 'relation'\]"),
    ([constraint("punctuation:no_comma", num=3)], r"has kwargs \['num'\]; give exactly \[\]"),
    ([constraint("length_constraints:number_words", num_words=3, relation="about")], "refuses .*correct them"),
    ([constraint("length_constraints:number_words", num_words="3", relation="at least")], "refuses"),
    ([published(of("frequency", keyword="*tea"))], "refuses .*to repeat"),
    ([constraint("language:response_language", language="xx")], "refuses .*KeyError"),
    ([constraint("startend:end_checker", end_phrase=3)], "refuses"),
    ([constraint("length_constraints:number_words", num_words=-3, relation="at least")], "cannot use num_words -3"),
    ([constraint("keywords:letter_frequency", letter="ab", let_frequency=1, let_relation="at least")],
     "refuses .*'ab' is not one letter"),
    ([constraint("keywords:existence", keywords="tea")], "cannot use keywords 'tea'"),
    ([constraint("keywords:existence", keywords=[])], "cannot use keywords"),
    ([constraint("punctuation:no_comma"), constraint("x")], "no constraint 'x'"),
])
def test_constraints_that_cannot_be_checked_are_refused(constraints, message):
    with pytest.raises(ValueError, match=message):
        check(constraints)
    with pytest.raises(ValueError, match=message):
        followed("tea", constraints)


@pytest.mark.parametrize(("package", "name"), [("if_verifiable", "no_comma"), ("nupunkt", "number_sentences")])
def test_without_the_package_the_pip_line_is_named(package, name, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith(package):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    for cached in (ifeval._registry, ifeval._checker, ifeval_checks._splitter):
        cached.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'cosmo-rl\[ifeval\]'"):
        check([of(name)])


@pytest.mark.parametrize("answer", ["http://a.bc", "a@b.cd", "\u00aa"])
def test_a_text_whose_language_nobody_can_tell_follows_none(answer):
    for one in (constraint("language:response_language", language="fr"), constraint("change_case:english_lowercase")):
        assert followed(answer, [one]) == 0


@pytest.mark.parametrize("name", ["response_language", "english_capital", "english_lowercase"])
def test_the_benchmarks_checkers_log_no_answers(name, caplog):
    """As they come they log each whose language nobody can tell, as an error, and count it by its case."""
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    one: Any = published(of(name))
    theirs = INSTRUCTION_DICT[one["id"]](one["id"])
    theirs.build_description(**one["kwargs"])
    texts = ("http://a.bc", "HTTP://A.BC", "1 2", "A@B.CD", "a@b.cd")
    found = [followed(text, [one]) for text in texts]
    assert not caplog.records and found == list(map(theirs.check_following, texts)), name
    assert caplog.records


@pytest.mark.parametrize("answer", [".", "***", "\u200b", "?!"])
def test_an_answer_without_a_letter_or_digit_is_none(answer):
    assert followed(answer, [constraint("punctuation:no_comma")]) == 0
