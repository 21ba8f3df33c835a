"""IFEval's checkers as rewards: the share that is followed, always the same, and constraints that are refused."""

import builtins
import random
import time

import pytest

from cosmo_rl.cpgd.rewards import ifeval
from cosmo_rl.cpgd.rewards.ifeval import UNSUPPORTED, check, followed


def constraint(name, **kwargs):
    return {"id": name, "kwargs": kwargs}


FRENCH = "Bonjour, je voudrais un peu de pain et du fromage, s'il vous plait."
# Of every id an answer that follows it, and one that does not.
IDS = [
    (constraint("keywords:existence", keywords=["cup", "Tea"]), "tea in a cup", "a cup"),
    (constraint("keywords:frequency", keyword="cup", frequency=2, relation="at least"), "cup, cup", "cup"),
    (constraint("keywords:forbidden_words", forbidden_words=["tea"]), "team", "Tea"),
    (constraint("keywords:letter_frequency", letter="Q", let_frequency=1, let_relation="less than"), "tea", "quiet"),
    (constraint("language:response_language", language="fr"), FRENCH, "I would like some bread, please."),
    (constraint("length_constraints:number_paragraphs", num_paragraphs=2), "a\n***\nb", "a b"),
    (constraint("length_constraints:number_words", num_words=3, relation="at least"), "one two three", "one two"),
    (constraint("length_constraints:nth_paragraph_first_word", num_paragraphs=2, nth_paragraph=2, first_word="Cup"),
     "a\n\ncup b", "cup a\n\nb"),
    (constraint("detectable_content:number_placeholders", num_placeholders=1), "Dear [name]", "Dear name"),
    (constraint("detectable_content:postscript", postscript_marker="P.S."), "bye\nP.S. tea", "bye"),
    (constraint("detectable_format:number_bullet_lists", num_bullets=2), "* a\n* b", "* a\n* b\n* c"),
    (constraint("detectable_format:constrained_response"), "My answer is yes.", "Yes."),
    (constraint("detectable_format:number_highlighted_sections", num_highlights=1), "a *b*", "a b"),
    (constraint("detectable_format:multiple_sections", section_spliter="SECTION", num_sections=2),
     "SECTION 1\na\nSECTION 2\nb", "SECTION 1\na"),
    (constraint("detectable_format:json_format"), '{"tea": 1}', '{"tea": 1'),
    (constraint("detectable_format:title"), "<<Tea>>\na", "Tea\na"),
    (constraint("combination:two_responses"), "a\n******\nb", "a\n******\na"),
    (constraint("combination:repeat_prompt", prompt_to_repeat="Make tea."), "Make tea. Done.", "Done. Make tea."),
    (constraint("startend:end_checker", end_phrase="That is all."), "Tea. That is all.", "That is all. Tea."),
    (constraint("change_case:english_capital"), "THIS IS A CUP OF TEA FOR YOU", "This is a cup of tea for you"),
    (constraint("change_case:english_lowercase"), "this is a cup of tea for you", "This is a cup of tea for you"),
    (constraint("punctuation:no_comma"), "a b", "a, b"),
    (constraint("startend:quotation"), '"a"', '"a" b'),
]


@pytest.mark.parametrize(("one", "follows", "breaks"), IDS, ids=[one["id"] for one, _, _ in IDS])
def test_every_checker(one, follows, breaks):
    check([one])
    assert followed(follows, [one]) == 1 and followed(breaks, [one]) == 0


def test_every_id_of_the_library_is_tested_or_refused():
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    assert {one["id"] for one, _, _ in IDS} | UNSUPPORTED == set(INSTRUCTION_DICT)


def test_the_value_is_the_share_that_is_followed():
    three = [constraint(name) for name in ("punctuation:no_comma", "startend:quotation", "detectable_format:title")]
    assert followed('"<<a>>"', three) == 1 and followed("<<a>>", three) == pytest.approx(2 / 3)
    assert followed("a, b", three) == 0 and followed("  ", [constraint("punctuation:no_comma")]) == 0


def test_strict_the_answer_as_it_stands():
    assert followed("Sure:\n'a'", [constraint("startend:quotation")]) == 0
    assert followed('Sure:\n"a"', [constraint("startend:quotation")]) == 0, "loose would drop the first line"


def test_a_text_without_letters_follows_no_language():
    """The library counts it as followed: an easy way out for a policy."""
    for one in (constraint("language:response_language", language="fr"), constraint("change_case:english_capital")):
        assert followed("123 ...", [one]) == 0


def test_deep_nesting_is_a_value_and_no_crash():
    assert followed("[" * 100_000, [constraint("detectable_format:json_format")]) == 0


@pytest.mark.parametrize("part", ["[", "<<", "<<>", " ", "\n", " \n", "\u00a0", "*", "- ", '"', "{", "p.", "a "])
def test_no_answer_takes_long(part):
    """1 MB; the patterns of placeholders, titles, bullets and postscripts took its square, hours."""
    quick = [one for one, _, _ in IDS if not one["id"].startswith(("language", "change_case"))]
    check(quick)
    started = time.process_time()
    followed("a " + part * (1_000_000 // len(part)), quick)
    assert time.process_time() - started < 10


def test_what_is_left_out_to_be_quick_changes_no_outcome():
    """On short texts of what the patterns look for, against the library's own checkers."""
    rng = random.Random(0)
    names = {"detectable_content:number_placeholders", "detectable_format:title", "detectable_content:postscript",
             "detectable_format:number_bullet_lists"}
    checkers = check([*(one for one, _, _ in IDS if one["id"] in names),
                      constraint("detectable_content:postscript", postscript_marker="P.P.S")])
    parts = ["[", "]", "\n", "<<", ">>", "<", ">", "*", "-", " ", "a", "P.", "S.", "P.P.S", " " * 120, "\n" * 120,
             " " * 60 + "\n" + " " * 60, "\n" + " " * 120, " " * 120 + "\n"]
    outcomes = set()
    for _ in range(3000):
        text = "a" + "".join(rng.choices(parts, k=rng.randint(1, 12)))
        for checker in checkers:
            outcome = bool(checker.check_following(text))
            assert ifeval._follows(checker, text) == outcome, (checker.id, text)
            outcomes.add((checker.id, outcome))
    assert len(outcomes) == 2 * len(names), "each was followed and not"


def test_a_language_is_guessed_the_same_each_time():
    """The library's guess at a short text changes from call to call: one in four for this one."""
    import langdetect

    check([constraint("language:response_language", language="en")])
    assert len({langdetect.detect("I am a man") for _ in range(40)}) == 1


def test_no_checker_draws_at_random():
    random.seed(0)
    before = random.getstate()
    ifeval._checker.cache_clear()
    check([one for one, _, _ in IDS])
    assert random.getstate() == before


@pytest.mark.parametrize(("constraints", "message"), [
    ([], "task ifeval has no `constraints`; give"),
    ([{"id": "punctuation:no_comma", "x": 1}], "is not of the form"), ([{"kwargs": {}}], "is not of the form"),
    ([{"id": "punctuation:no_comma", "kwargs": []}], "is not of the form"),
    ([constraint("punctuation:no_commas")], "no constraint 'punctuation:no_commas'; did you mean punctuation:no_comma"),
    ([constraint("x")], "no constraint 'x'; use one of change_case:english_capital, "),
    ([constraint("length_constraints:number_sentences", num_sentences=2, relation="at least")],
     "length_constraints:number_sentences cannot be checked, as it needs data of NLTK .* remove it, or the row"),
    ([constraint("change_case:capital_word_frequency")], "cannot be checked"),
    ([constraint("length_constraints:number_words", num_words=3)], r"has kwargs \['num_words'\]; give exactly "
     r"\['num_words', 'relation'\]"),
    ([constraint("punctuation:no_comma", num=3)], r"has kwargs \['num'\]; give exactly \[\]"),
    ([constraint("length_constraints:number_words", num_words=3, relation="about")], "refuses .*correct them"),
    ([constraint("length_constraints:number_words", num_words="3", relation="at least")], "refuses"),
    ([constraint("keywords:frequency", keyword="*tea", frequency=1, relation="at least")], "refuses .*to repeat"),
    ([constraint("language:response_language", language="xx")], "refuses .*KeyError"),
    ([constraint("startend:end_checker", end_phrase=3)], "refuses"),
    ([constraint("length_constraints:number_words", num_words=-3, relation="at least")], "cannot use num_words -3"),
    ([constraint("keywords:letter_frequency", letter="ab", let_frequency=1, let_relation="at least")],
     "cannot use letter 'ab'"),
    ([constraint("keywords:existence", keywords="tea")], "cannot use keywords 'tea'"),
    ([constraint("keywords:existence", keywords=[])], "cannot use keywords"),
    ([constraint("punctuation:no_comma"), constraint("x")], "no constraint 'x'"),
])
def test_constraints_that_cannot_be_checked_are_refused(constraints, message):
    with pytest.raises(ValueError, match=message):
        check(constraints)
    with pytest.raises(ValueError, match=message):
        followed("tea", constraints)


def test_without_the_package_the_pip_line_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("if_verifiable"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    ifeval._registry.cache_clear()
    ifeval._checker.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'cosmo-rl\[ifeval\]'"):
        check([constraint("punctuation:no_comma")])


@pytest.mark.parametrize("answer", ["http://a.bc", "a@b.cd", "\u00aa"])
def test_a_text_whose_language_nobody_can_tell_follows_none(answer):
    for one in (constraint("language:response_language", language="fr"), constraint("change_case:english_lowercase")):
        assert followed(answer, [one]) == 0


@pytest.mark.parametrize("answer", [".", "***", "\u200b", "?!"])
def test_an_answer_without_a_letter_or_digit_is_none(answer):
    assert followed(answer, [constraint("punctuation:no_comma")]) == 0
