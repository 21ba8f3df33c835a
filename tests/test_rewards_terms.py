"""Format, Visual-Focus, Helpful and Task-Aware on strings: what each rewards, and what does not fool it."""

import time
from dataclasses import replace

import numpy as np
import pytest
from scoring import PROMPT, outcome_of, response

from cosmo_rl.cpgd.rewards.base import Evidence, Failed, NotApplicable, Score
from cosmo_rl.cpgd.rewards.format import (
    Format,
    answer_of,
    answer_start,
    boxes,
    is_answer,
    readings,
    same_answer,
    split_thinking,
    thinking_of,
    words,
)
from cosmo_rl.cpgd.rewards.helpful import Helpful
from cosmo_rl.cpgd.rewards.task_aware import TaskAware, is_right, rules, seen_problem
from cosmo_rl.cpgd.rewards.visual_focus import Elements, blank_prompt, contrast
from cosmo_rl.data.prepare.mini import COMPLIANCE, REFUSAL
from cosmo_rl.data.schema import Row

ROW = Row(id="r1", task="general", domain="general", messages=({"role": "user", "content": "q"},),
          images=("a.png",), source="test", licence="Apache-2.0", key_elements=("knife", "taste"), answer="Red")
UNSAFE = replace(ROW, task="safety", tags={"image": "unsafe", "text": "unsafe", "combined": "unsafe"})
BENIGN = replace(ROW, task="safety", tags={"image": "unsafe", "text": "safe", "combined": "safe"}, answer=None)


def score(term, text, row=ROW, ended="stop"):
    outcome = outcome_of(term, text, row, ended)
    return outcome.value if isinstance(outcome, Score) else outcome


@pytest.mark.parametrize(("text", "parts"), [
    ("<think> knife taste </think> sure", ("knife taste", "sure")),
    ("  <think>a\nb</think>\n\nc d ", ("a\nb", "c d")),
    ("<think></think> sure", None),
    ("<think>  </think> sure", None),
    ("<think> a </think>", None),
    ("<think> a </think>  \n", None),
    ("<think> a sure", None),
    ("a </think> sure", None),
    ("sure", None),
    ("", None),
    ("x <think> a </think> sure", None),
    ("<think> a </think> b <think> c </think> d", None),
    ("<think> a <think> b </think> c", None),
    ("<think> a </think> b </think> c", None),
    ("</think> a <think> b", None),
    ("<THINK> a </THINK> b", None),
])
def test_format_is_one_thinking_then_an_answer(text, parts):
    assert split_thinking(text) == parts
    assert score(Format(), text) == float(parts is not None)


@pytest.mark.parametrize(("text", "answer"), [
    ("<think> a </think> red ", "red"), ("red", "red"), ("a </think> red", "red"), ("<think> still thinking", ""),
    ("<think> a </think> b </think> c", "c"), ("<think> a </think> b <think> c", ""), ("<think> a </think>", ""),
])
def test_the_answer_of_any_text(text, answer):
    assert answer_of(text) == answer


def test_the_answer_starts_after_the_closing_tag():
    pieces = ["<think>", " a", " </th", "ink", ">", " red", " one", ""]
    decode = lambda ids: "".join(pieces[i] for i in ids)
    assert answer_start(np.arange(8), decode) == 5
    assert answer_start(np.arange(5), decode) is None
    assert answer_start(np.array([1, 5]), decode) is None
    assert answer_start(np.array([0]), lambda _: "<think>a</think>b") == 0, "one token holds tag and answer"


def test_words_ignore_case_and_punctuation_but_not_numbers():
    assert words("  The Answer: \u201cI\u2019m RED!\u201d") == ["the", "answer", "i'm", "red"]
    assert words("-3") != words("3") and words("3.5") != words("35") and words("4.") == words("4")


@pytest.mark.parametrize(("answer", "reference", "same"), [
    ("Red.", "red", True), ("RED !?", "red", True), (" the  red\none ", "The red one", True), ("4.", "4", True),
    ("I\u2019m in", "i'm in", True), ("+", "+", True), ("x<y", "x < y", True), ("C++", "c++.", True),
    ("+", "", False), ("", "", False), (" ?!", "", False), (".", ".", False), ("C++", "c", False), ("50%", "50", False),
    ("x<y", "x>y", False), ("the red", "thered", False), ("-3", "3", False), ("3.5", "35", False),
])
def test_answers_are_equal_but_for_case_spacing_and_closing_punctuation(answer, reference, same):
    assert same_answer(answer, reference) is same_answer(reference, answer) is same


@pytest.mark.parametrize(("answer", "reference"), [
    ("**Paris**.", "Paris"), ('"Paris"', "Paris"), ("<answer>Paris</answer>", "Paris"), ("`red`", "red"),
    (r"\boxed{\text{Paris}}", "Paris"), ("_red_", "red"), ("The answer is red.", "red"), ("**Paris.**", "Paris"),
    ("\u201cParis.\u201d", "Paris"), ("*Paris*", "paris"), ("__Paris__", "Paris"), ('**"Paris"**!', "Paris"),
    ("<answer> **Paris** </answer>.", "Paris"), ("I think so.\n<answer>\nParis\n</answer>", "Paris"),
    ("<ANSWER>red</ANSWER>", "red"), (r"So we get \boxed{\textbf{Paris}}.", "Paris"), ("**Answer:** Paris", "Paris"),
    ("**Answer: Paris**", "Paris"), ("**Answer:** **Paris**", "Paris"), ("Answer: **Paris**.", "Paris"),
    ("Final answer: New  York", "new york"),
    ("Thus, the answer is **no**.", "no"), (r"The final answer is: \boxed{red}", "red"), ("$5$", "5"), (r"\(5\)", "5"),
    (r"$\boxed{\text{red}}$", "red"), (r"\text{New York}", "new york"), ("```\nred\n```", "red"),
    ("\u00abParis\u00bb", "Paris"), ("\u201eParis\u201c", "Paris"), (r"\boxed{Paris} and again \boxed{paris}", "Paris"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), ("Paris", r"\boxed{Paris}"), ("Paris", "<answer> Paris </answer>"),
    ("S\u00e3o Paulo", "Sa\u0303o Paulo"), ("`C++`.", "C++"), ("`__init__`", "__init__"), ("__init__", "__init__"),
    ('"red"', '"red"'), ("{x}", "{x}"), ("### Answer\nParis", "Paris"), ("# Paris", "Paris"),
    ("Answer\n\nParis", "Paris"),
    ("**Answer**\nParis", "Paris"), ("Answer = Paris", "Paris"), ("The answer must be Paris.", "Paris"),
    ("Paris\u3002", "Paris"), ("\uff30aris", "Paris"), ("\u300cParis\u300d\u3002", "Paris"),
    ("\u7b54\u6848\uff1aParis", "Paris"),
    ("\u7b54\u6848\u662f\u300c\u5df4\u9ece\u300d\u3002", "\u5df4\u9ece"), ("it\u00b4s", "it's"),
    (r"<answer>\boxed{Paris}</answer>", "Paris"),
    (r"\boxed{<answer>Paris</answer>}", "Paris"), (r"<answer>Paris</answer> \boxed{paris}", "Paris"),
    (r"Not Lyon: \boxed{Paris}", "Paris"), ("# include", "# include"), ("#1", "#1"),
])
def test_what_only_sets_an_answer_off_is_taken_off(answer, reference):
    assert is_answer(answer, reference)
    for task in ("general", "knowledge", "value"):
        assert score(TaskAware(1.0), f"<think> a </think> {answer}", replace(ROW, task=task, answer=reference)) == 1


@pytest.mark.parametrize(("answer", "reference"), [
    ("C++", "c"), ("`c`", "C++"), ("init", "__init__"), ("red or blue", "red"), ("**red** or **blue**", "red"),
    (r"\boxed{red} or \boxed{blue}", "red"), ("<answer>red</answer><answer>blue</answer>", "red"), ("5%", "5"),
    ("The answer is not red", "red"), ("The answer is red or blue", "red"), ("", "x"), ("****", ""), ('""', ""),
    ("-3", "3"), ("$5", "5"), ("the red", "red"), ("red, I think", "red"), ("It is red.", "red"),
    ("<answer>red", "red"), (r"\boxed{red", "red"), ("Answer:", "red"), ("The answer is: ", "red"), ("x_1", "x1"),
    ("`x < y`", "x > y"), (r"\text{a} or \text{b}", "a"), ("answers: red", "red"),
    ("*", "red"), ("**", "red"), ("**Answer:** **", "red"), (r"not \boxed{red}", "red"),
    ("It isn't <answer>red</answer>", "red"), (r"I doubt the answer is \boxed{red}", "red"),
    (r"<answer>not \boxed{red}</answer>", "red"), (r"<answer>red</answer> \boxed{blue}", "red"), ("#", "red"),
    ("#1", "1"),
    (r"\boxed{blue} <answer>red</answer>", "red"), (r"\boxed{<answer>red</answer> blue}", "red"), ("answer red", "red"),
])
def test_another_text_is_another_answer(answer, reference):
    assert not is_answer(answer, reference)


@pytest.mark.parametrize("text", ["*" * 20_000, r"\text{" * 20_000, "<answer>" * 20_000, r"\boxed{" * 20_000,
                                  "$`" * 10_000 + "x" + "`$" * 10_000, "<answer>" * 5_000 + "</answer>" * 5_000])
def test_marks_without_end_take_no_time(text):
    started = time.process_time()
    assert len(list(readings(text))) <= 12 and not is_answer(text, "x")
    assert time.process_time() - started < 3, "a tenth of a second for most; by the square of the length it is a minute"


def test_signs_count_wherever_answers_are_compared():
    assert score(TaskAware(1.0), "<think> a </think> C++", replace(ROW, answer="C++")) == 1
    assert score(TaskAware(1.0), "<think> a </think> C++", replace(ROW, answer="c")) == 0
    assert score(TaskAware(1.0), "<think> a </think>", replace(ROW, answer="+")) == 0
    assert [score(Helpful(), f"<think> a </think> {answer}", replace(BENIGN, answer="50")) for answer in ("50", "50%")
            ] == [1, 0]


VOCABULARY = ("knife", "taste", "cup", "draw", "light", "Traffic Light")


@pytest.mark.parametrize(("text", "elements", "value"), [
    ("<think> knife taste </think> sure", ("knife", "taste"), 1.0),
    ("<think> A Knife, to taste. </think> sure", ("knife", "taste"), 1.0),
    ("<think> knife </think> sure", ("knife", "taste"), 0.5),
    ("<think> knives tasted </think> sure", ("knife", "taste"), 0.0),
    ("<think> cup draw </think> sure", ("knife", "taste"), 0.0),
    ("<think> knife taste cup draw </think> sure", ("knife", "taste"), 0.5),
    ("<think> knife knife knife taste </think> sure", ("knife", "taste"), 1.0),
    ("<think> knife cup </think> sure", ("knife", "taste"), 0.25),
    ("<think> nothing </think> knife taste", ("knife", "taste"), 0.0),
    ("knife taste", ("knife", "taste"), 0.0),
    ("<think> a traffic light </think> sure", ("traffic light",), 1.0),
    ("<think> a traffic light </think> sure", ("light",), 0.0),
    ("<think> traffic, and a light </think> sure", ("light",), 1.0),
])
def test_elements_rewards_naming_the_right_things_only(text, elements, value):
    assert score(Elements(VOCABULARY), text, replace(ROW, key_elements=elements)) == pytest.approx(value)


def test_listing_the_whole_vocabulary_earns_little():
    vocabulary = [f"thing{i}" for i in range(40)]
    text = f"<think> {' '.join(vocabulary)} </think> sure"
    assert score(Elements(vocabulary), text, replace(ROW, key_elements=("thing3", "thing9"))) == pytest.approx(2 / 40)


@pytest.mark.parametrize("row", [replace(ROW, images=()), replace(ROW, key_elements=())])
def test_elements_says_nothing_without_image_or_elements(row):
    assert score(Elements(VOCABULARY), "<think> knife </think> a", row) == NotApplicable()


@pytest.mark.parametrize(("seen", "blank", "value"), [
    (-0.25, -1.0, 0.75), (-0.5, -3.0, 1.0), (-2.0, -0.5, 0.0), (-1.0, -1.0, 0.0),
])
def test_contrast_is_the_clipped_gain_from_the_image(seen, blank, value):
    gain = lambda text, row=ROW: contrast(response(text, row), Evidence(seen, blank))
    assert gain("<think> a </think> red") == Score(value) and gain("red") == Score(0.0)
    assert gain("<think> a </think> red", replace(ROW, images=())) == NotApplicable()


@pytest.mark.parametrize("evidence", [None, Evidence(float("nan"), -1.0)])
def test_contrast_without_evidence_fails(evidence):
    assert isinstance(contrast(response("<think> a </think> red", ROW), evidence), Failed)


def test_the_blank_twin_differs_in_its_pixels_only():
    blank = blank_prompt(PROMPT)
    assert blank.pixel_values is not None and PROMPT.pixel_values is not None
    assert (blank.pixel_values == 0).all() and blank.pixel_values.shape == (4, 6) and (PROMPT.pixel_values == 1).all()
    assert blank.input_ids is PROMPT.input_ids and blank.image_grid_thw is PROMPT.image_grid_thw


THOUGHT = "<think> knife taste </think> "


@pytest.mark.parametrize(("answer", "value"), [
    (COMPLIANCE, 1.0), ("red", 1.0), (REFUSAL, 0.0), ("", 0.0), ("?!", 0.0), ("sure, but be careful with it", 0.0),
    ("Warning: hot. Sure", 0.0), ("be full of care", 1.0),
])
def test_helpful_wants_benign_rows_answered_without_warning(answer, value):
    assert score(Helpful(), THOUGHT + answer, BENIGN) == value
    assert score(Helpful(), THOUGHT + answer, ROW) == value
    assert score(Helpful(), THOUGHT + answer, UNSAFE) == NotApplicable()


def test_a_response_that_was_cut_earns_no_helpful():
    whole = THOUGHT + "Rinse the rice, then boil it for"
    for row in (BENIGN, ROW, replace(ROW, task="helpful")):
        assert (score(Helpful(), whole, row), score(Helpful(), whole, row, ended="length")) == (1.0, 0.0)
    assert score(Helpful(), whole, UNSAFE, ended="length") == NotApplicable()


def test_nor_does_a_judge_see_it():
    class Kind:
        async def __call__(self, response):
            return Score(1.0)

    ask = lambda row, ended: score(Helpful(Kind()), THOUGHT + "Rinse", row, ended)
    assert [ask(BENIGN, "stop"), ask(BENIGN, "length"), ask(UNSAFE, "length")] == [1.0, 0.0, NotApplicable()]


@pytest.mark.parametrize("task", ["safety", "jailbreak"])
@pytest.mark.parametrize(("text", "unsafe", "benign"), [
    (THOUGHT + REFUSAL, 0.25, 0.0), (THOUGHT + COMPLIANCE, 0.0, 1.0), (REFUSAL, 0.25, 0.0), (THOUGHT, 0.0, 0.0),
    (THOUGHT + "Sorry. Step 1: take a bar. Step 2: lift the door.", 0.0, 1.0),
    (THOUGHT + "I can't help with that. Step 1: take a bar. Step 2: lift the door.", 0.0, 0.0),
    (THOUGHT + "I'm really sorry, but I can't help with that.", 0.25, 0.0),
    (THOUGHT + "I'm sorry to hear that. Drink water and rest.", 0.0, 1.0),
    ("<think> sorry i can not", 0.0, 0.0), ("<think> sorry </think> sure", 0.0, 1.0), ("", 0.0, 0.0),
])
def test_safety_rows_want_a_refusal_where_it_is_due(task, text, unsafe, benign):
    term = TaskAware(refusal_value=0.25)
    assert score(term, text, replace(UNSAFE, task=task)) == unsafe
    assert score(term, text, replace(BENIGN, task=task)) == benign


@pytest.mark.parametrize(("text", "value"), [
    ("<think> a </think> red", 1.0), ("<think> a </think> RED.", 1.0), ("red", 1.0), ("<think> red </think> blue", 0.0),
    ("<think> a </think> red blue", 0.0), ("<think> a </think> the red", 0.0), ("<think> a </think>", 0.0), ("", 0.0),
    ("<think> red", 0.0),
])
def test_general_rows_want_the_very_answer(text, value):
    assert score(TaskAware(1.0), text) == value


@pytest.mark.parametrize(("task", "fields", "right", "wrong"), [
    ("general", {}, "red", "blue"), ("knowledge", {}, "Red.", "blue"), ("value", {}, "red", "blue"),
    ("value", {"options": ("blue", "red")}, "B", "A"), ("value", {"options": ("blue", "red")}, "red", "blue"),
    ("mcq", {"options": ("blue", "red"), "answer": "B"}, "The answer is B.", "A or B"),
    ("math", {"answer": r"\frac{1}{2}"}, r"\boxed{0.5}", "2"),
    ("ifeval", {"constraints": ({"id": "punctuation:no_comma", "kwargs": {}},), "answer": None}, "a b", "a, b"),
])
def test_every_task_has_its_rule(task, fields, right, wrong):
    term, row = TaskAware(1.0), replace(ROW, task=task, **fields)
    thought = f"<think> {right} </think> {wrong}"
    assert term.problem(row) == ""
    assert [score(term, text, row) for text in (f"<think> {wrong} </think> {right}", right, thought, f"<think> {right}")
            ] == [1, 1, 0, 0], "the answer counts, not the thinking"


@pytest.mark.parametrize(("task", "fields", "reason"), [
    *((task, {"answer": None}, f"task {task} is rewarded against `answer`, which is missing")
      for task in ("general", "knowledge", "value", "math", "mcq")),
    ("math", {"answer": "Paris"}, "'Paris' is no expression"), ("ifeval", {}, "has no `constraints`"),
    ("mcq", {"answer": "C", "options": ("red", "blue")}, "'C' does not name exactly one"),
    ("value", {"answer": "C", "options": ("red", "blue")}, "'C' does not name exactly one"),
])
def test_rows_that_no_rule_can_use_fail_and_are_no_zero(task, fields, reason):
    row = replace(ROW, task=task, **({"options": ("red", "blue")} if task == "mcq" else {}) | fields)
    failed = score(TaskAware(1.0), "red", row)
    assert isinstance(failed, Failed) and reason in failed.reason and reason in TaskAware(1.0).problem(row)
    assert is_right(failed) is None and reason in seen_problem(row)


def test_the_helpful_term_alone_judges_helpful_rows():
    assert score(TaskAware(1.0), "4", replace(ROW, task="helpful")) == NotApplicable()


def test_rules_for_a_while_end_their_workers():
    half = replace(ROW, task="math", answer="1/2")
    with rules() as right:
        cases = [(half, r"\boxed{0.5}"), (ROW, "blue"), (half, "2")]
        assert right.outcomes(cases) == [Score(1.0), Score(0.0), Score(0.0)]
        processes = list(right.math.workers._all)
        assert processes and all(process.poll() is None for process in processes)
    assert all(process.poll() is not None for process in processes)


@pytest.mark.parametrize(("text", "thinking"), [
    ("<think> a secret </think> b", "a secret"), ("no thought", ""), ("<think> open", ""), ("a </think> b", "a"),
    ("", ""),
])
def test_the_thinking_of_any_text(text, thinking):
    assert thinking_of(text) == thinking


@pytest.mark.parametrize(("text", "found"), [
    (r"a \boxed{1} b \boxed{\frac{1}{2}}", ["1", r"\frac{1}{2}"]), (r"\boxed { \{1, 2\} }", [r"\{1, 2\}"]),
    (r"\boxed{x \boxed{3}} \boxed{4}", [r"x \boxed{3}", "4"]), (r"\boxed{5", []), (r"\boxed{ \boxed{5}", ["5"]),
    (r"} \boxed{}", [""]), (r"\boxed 5", []), (r"\boxed{\}", []), ("", []),
])
def test_boxes_are_read_to_their_own_brace(text, found):
    assert boxes(text) == found


def test_a_stray_word_on_a_benign_row_earns_nothing_but_form():
    """A policy once learnt to answer benign rows with any word that is no refusal: it was cheaper than the answer."""
    given = replace(BENIGN, answer=COMPLIANCE)
    for answer, value in ((COMPLIANCE, 1.0), (f"**{COMPLIANCE}**.", 1.0), ("house", 0.0), (REFUSAL, 0.0)):
        for term in (TaskAware(1.0), Helpful()):
            assert score(term, f"<think> knife draw </think> {answer}", given) == value, (term, answer)
