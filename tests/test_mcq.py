"""Which option an answer names, what does not fool the reading, and which rows it refuses."""

import time

import pytest

from cosmo_rl.cpgd.rewards.mcq import choice, key_of
from cosmo_rl.data.errors import UserError

COLOURS = ("red", "blue", "a cat", "dark blue")


@pytest.mark.parametrize("answer", [
    "B", "b", "(B)", "(b)", "B.", "B)", "B:", " B \n", "**B**", "**(B)**", "option B", "Option (B).", "Choice B",
    "Answer B", "blue", "Blue.", " BLUE ", "B: blue", "B. Blue.", "(B) blue", "(B): blue", "B) blue", "**B.** blue",
    "Option B: blue", "The answer is B", "The answer is B.", "The answer is (B).", "the correct answer is: B",
    "Answer: B", "Answer: blue",
    "**Answer:** B", "The answer is blue.", "My final answer is option B.", "The best choice is B: blue.",
    "I see the sea. The answer is B.", "The sea is blue, A is a colour of fire.\nThe answer is B",
    "The answer is not A. The answer is B.", "The answer is B. I am sure: the answer is blue.",
    r"\boxed{B}", r"So it is \boxed{B}.", r"$\boxed{\text{B}}$", r"\boxed{(B)}", r"\boxed{\text{blue}}",
    r"\boxed{B. blue}",
    r"A is wrong. \boxed{B}", r"\boxed{B} and again \boxed{blue}",
])
def test_an_option_named(answer):
    assert choice(answer, COLOURS) == 1


@pytest.mark.parametrize("answer", [
    "", " ", "?", "A, B", "A B", "AB", "A and B", "A or B", "(A)(B)", "B/C", "A. B.", "not B", "B?!x", "E", "Z", "(E)",
    "1", "\u212a", "\u017f",  # they match k and s without case
    "red blue", "red or blue", "B: red", "B. dark blue", "B because the sea is blue", "B. Because the sea is blue",
    "A cat sits there", "A red one", "A blue one", "a blue", "A: cat", "I think B", "Bob",
    "The answer is A or B.", "The answer is E.", "The answer is not B", "The answer is A. The answer is B.",
    "The answer is B. Or is it? The answer is unclear.", "The answer is B. It may be A.", "The answer isB", "answers B",
    r"\boxed{A} \boxed{B}", r"\boxed{A, B}", r"\boxed{} B", r"\boxed{E}", r"B \boxed{A or B}", r"\boxed{B",
])
def test_no_option_or_several(answer):
    assert choice(answer, COLOURS) is None


def test_the_article_is_no_letter_but_a_text_may_begin_with_it():
    assert choice("A cat", COLOURS) == choice("a cat.", COLOURS) == choice("The answer is a cat.", COLOURS) == 2
    assert choice("A", COLOURS) == choice("a", COLOURS) == choice("The answer is A.", COLOURS) == 0
    assert choice("A cat", ("dog", "cat")) is None and choice("The answer is a dog", ("dog", "cat")) is None


def test_options_that_are_letters_numbers_or_signs():
    assert choice("C", ("A", "B", "C")) == 2 and choice("12.", ("7", "12")) == 1 and choice("+", ("-", "+")) == 1
    assert choice("B", ("blue", "Blue")) == 1 and choice("blue", ("blue", "Blue")) is None


@pytest.mark.parametrize(("answer", "options", "index"), [
    ("B", COLOURS, 1), ("b", COLOURS, 1), ("(D)", COLOURS, 3), ("A.", COLOURS, 0), ("blue", COLOURS, 1),
    ("A cat", COLOURS, 2), ("C: a cat", COLOURS, 2), ("B", ("A", "B"), 1), ("B", ("B+", "A+"), 1),
    ("A", ("bc", "Z"), 0),
    ("Z", tuple(map(str, range(26))), 25),
])
def test_what_a_rows_answer_means(answer, options, index):
    assert key_of(answer, options) == index


@pytest.mark.parametrize(("answer", "options", "message"), [
    (None, COLOURS, "which is missing; add"), ("", COLOURS, "which is missing"),
    ("E", COLOURS, "'E' does not name exactly one of the options .*give its letter or its text"),
    ("green", COLOURS, "'green' does not name"), ("A, B", COLOURS, "does not name"),
    ("B: red", COLOURS, "does not name"),
    ("blue", ("blue", "Blue"), "does not name exactly one"), ("A", ("blue", "Blue"), "does not name exactly one"),
    ("A", ("B", "A"), "option A has the text 'B', the letter of another; put them in order"),
    ("x", ("the", "a"), "option B has the text 'a'"), ("A", ("x",), "has 1 options; give 2 to 26"),
    ("A", tuple(map(str, range(27))), "has 27 options"),
])
def test_rows_without_one_right_option_are_refused(answer, options, message):
    with pytest.raises(ValueError, match=message):
        key_of(answer, options)


@pytest.mark.parametrize("answer", [
    "B - blue", "B, blue", "b. blue", "b: Blue", "option b - blue", "[B]", "$B$", r"\(B\)", "`B`", "'blue'", '"B"',
    "<answer>B</answer>", "<answer> (B) blue </answer>", "The answer is **B**.", 'The answer is "blue".', "B: 'blue'",
])
def test_what_sets_an_option_off_is_no_part_of_it(answer):
    assert choice(answer, COLOURS) == 1


@pytest.mark.parametrize("answer", ["[A] [B]", "$A$ or $B$", "<answer>A or B</answer>", "'A', 'B'", "b - red", "B, red",
                                    "a - blue", "[A, B]", "a, b"])
def test_what_sets_options_off_names_no_two(answer):
    assert choice(answer, COLOURS) is None


def test_an_option_may_hold_what_sets_off():
    options = ("0, 1", "[0, 1]", "$x$", "x y")
    assert [choice(answer, options) for answer in ("[0, 1]", "B. [0, 1]", "$x$", "$x y$")] == [1, 1, 2, 3]


NUMBERS, TWELVE = ("1.1", "4.2", "5.0", "10"), tuple(f"item {i}" for i in range(12))
FRACTIONS = (r"$\frac{1}{2}$", r"$\frac{1}{3}$", "2", "3")


@pytest.mark.parametrize(("options", "index", "answers"), [
    (NUMBERS, 1, [r"\boxed{\textbf{(B)}\ 4.2}", r"\boxed{\textbf{(B)}~4.2}", r"\boxed{\mathrm{(B)}\;4.2}",
     r"\boxed{(B)\,4.2}", r"\textbf{(B)}", r"\text{B}", r"$\text{B}$", r"$\mathrm{(B)}$.", r"\(\textbf{(B)}\ 4.2\)",
     r"\boxed{\text{(B)}\quad 4.2}"]),
    (COLOURS, 1, ["Answer: $B", "So B fits.\n<answer>B</answer>", r"$\mathbf{B}$", "\uff22", "\uff08\uff22\uff09",
     "\uff22\uff0e", "\uff22\uff1ablue", "B\u3002", "\u7b54\u6848\uff1aB", "\u7b54\u6848\u662fB", "Answer: B$",
     "**Answer**: B", "__Answer:__ B", "### Answer\nB", "The answer must be B.", "The correct answer should be (B).",
     "Ans: B", "Answer = B", "The answer is \u201cB\u201d.", "Answer: {B}", "Answer: B (blue)", "B (blue)",
     "<answer>The answer is B</answer>", "<answer>B</answer><answer>B</answer>", "A <answer>B</answer>", "<answer>B",
     "B</answer>", "I think A or B.\n<answer>blue</answer>", "<answer>(B)</answer> is it", "### B",
     "<ANSWER>B</ANSWER>", "A <Answer>(b)</Answer>", "<ANSWER>B", "\u201eB\u201c"]),
    (NUMBERS, None, [r"\boxed{\textbf{(B)}\ 5.0}", r"\boxed{\textbf{(B)}, \textbf{(C)}}",
     r"\boxed{\textbf{(B)}} \boxed{\textbf{(C)}}", r"\boxed{\text{B or C}}", r"\boxed{\text{not B}}", r"not \boxed{B}",
     r"The answer isn't \boxed{B}.", r"It is not $\boxed{B}$", r"\text{B}\quad 4.2"]),
    (COLOURS, None, ["Answer: $E", "So B fits.\n<answer>B or C</answer>", "B and C", "not B", "Answer: B (red)",
     "Answer: $A or $B", "Answer: $A$, $B$", "Answer: B/C", "Answer: BC", "Answer: B? C?", "Answer: A\nAnswer: B",
     "The answer is not B.", "The answer isn't B", "I don't think the answer is B.",
     "I do not think that the answer is B.", "The wrong answer is B.", "The incorrect option is: B",
     "It is false that the answer is B", "I doubt the answer is B.", "It is not the case that the answer is B.",
     "The answer is neither A nor B", "Answer: anything but B", "Answer: all except B", "Answer: B or maybe C",
     "<answer>A</answer><answer>B</answer>", r"\boxed{A} <answer>B</answer>",
     r"<answer>B</answer> \boxed{A}", r"<answer>not \boxed{B}</answer>",
     "not <ANSWER>B</ANSWER>", r"I don't think the answer is \boxed{B}", "<answer></answer>B",
     "<answer>B and C</answer>", "not <answer>B</answer>", "a dog", "\u0412", "\xdf", "\u24b7", "\U0001d401", "B.B",
     "BB", "B B", "B, B", "(B)(B)", "Option B or C", "Options B", "Both B", "B is wrong", "B?", "[B], [C]", "> B",
     "- B", "B: red", "\u200bB"]),
    (TWELVE, None, ["M", "I am", "I think"]),
    (FRACTIONS, 1, [r"\boxed{\textbf{(B)}\ \frac{1}{3}}", r"\boxed{\frac{1}{3}}"]),
    (FRACTIONS, None, [r"\boxed{\textbf{(B)}\ \frac{1}{2}}"]),
    (("*x*", "x"), 0, ["*x*"]),
    (("3", "4"), 0, ["\uff13"]),
    (("(0, 1)", "[0, 2]", "0", "1"), None, ["[0, 1]"]),
])
def test_a_kind_of_answers(options, index, answers):
    found = {answer: choice(answer, options) for answer in answers}
    assert found == dict.fromkeys(answers, index)


@pytest.mark.parametrize("part", [
    "[", "(", "$", "**", "_", "`", "answer is ", "not ", r"\boxed{", "<answer>", "</answer>", "B ", r"\text{", " ",
    r"\boxed{}", r"\boxed{x}", "<answer>x</answer>", "answer: x\n",
])
def test_a_long_answer_names_none_and_takes_little_time(part):
    """And no recursion: deep brackets would have ended the run."""
    started = time.process_time()
    for text in (part * (20_000 // len(part)), part * 100):
        assert choice(text + "A or B", COLOURS) is None
    assert choice(part * (100_000 // len(part)) + "A or B", ("red " * 500, "blue")) is None
    assert time.process_time() - started < 1


@pytest.mark.parametrize("text", ["(B)", "B.", r"\text{B}", "**b**", "Option B"])
def test_an_option_that_reads_as_the_letter_of_another_is_refused(text):
    with pytest.raises(UserError, match="the letter of another"):
        key_of("C", (text, "red", "blue"))
