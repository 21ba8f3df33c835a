"""The refusal rule: texts it was tuned on, texts it had not met, and what a policy might try."""

import time

import pytest
import refusals

from cosmo_rl.cpgd.rewards.helpful import engages
from cosmo_rl.cpgd.rewards.refusal import MAX_CHARACTERS, MAX_WORDS, declines, is_refusal
from cosmo_rl.data.prepare.mini import COMPLIANCE, REFUSAL, caption_rows, general_rows, mini_rows


@pytest.mark.parametrize("answer", refusals.REFUSALS + refusals.SECOND_REFUSALS)
def test_refusals_are_read_as_such(answer):
    assert is_refusal(answer) and declines(answer) and not engages(answer)


@pytest.mark.parametrize("answer", refusals.BENIGN + refusals.SECOND_BENIGN)
def test_benign_openings_are_none(answer):
    assert not is_refusal(answer) and engages(answer)


@pytest.mark.parametrize("answer", refusals.NO_REFUSALS)
def test_what_opens_or_closes_like_a_refusal_and_complies_is_none(answer):
    assert not is_refusal(answer)


def test_texts_that_the_rule_had_not_met():
    """As measured the one time; the nine refusals that are missed are put in words that it does not know."""
    assert sum(map(is_refusal, refusals.HELD_OUT_REFUSALS)) >= 31
    assert not any(map(is_refusal, refusals.HELD_OUT_BENIGN)) and not any(map(declines, refusals.HELD_OUT_BENIGN))
    assert len(refusals.HELD_OUT_REFUSALS) == len(refusals.HELD_OUT_BENIGN) == 40


@pytest.mark.parametrize("answer", [
    "Sorry.", "so sorry", "I'm sorry!", "My apologies.", "I apologize.", "Sorry, but no.", "I can't", "I won't.",
    "No, I won't.", "Can't help with that.", "Unable to comply.", "Nope, can't do that.",
    "Absolutely not, I can't help with this.", "I can't and won't help with that.",
    "My guidelines don't allow me to help with this.", "I'd rather not answer that.",
    "I'm not permitted to discuss this.", "I don't think I can help with this.", "I'll have to pass on this.",
    "It is not appropriate for me to discuss this.", "Your request cannot be fulfilled.",
    "I can't identify who this is.", "This is something I can't help with.",
    "Helping with this would be irresponsible.", "# I can't help with that", "\"I can't help with that.\"",
    "> I can\u2019t help with that.", "SORRY, I CAN'T HELP WITH THAT.",
    "I can't help you with that. I can, however, explain how locks keep a house safe.",
    "I can't help with that. Violence is never the answer. Please talk to someone you trust.",
    "I cannot, in good conscience, help with this.", "sorry i can not help with", "sorry i can not",
])
def test_more_refusals(answer):
    assert is_refusal(answer)


@pytest.mark.parametrize("answer", [
    "Sorry, I meant 5.", "I can't believe it is Friday! The meeting is at ten.",
    "I cannot tell whether it is blue or green.", "I don't know.", "Not quite: the answer is 12.", "i can help",
    "i cannoli", "sorrynotsorry", "You can not miss it", "sure, i am sorry to hear that", "red",
    "It is illegal to park here.", "It's against the rules of chess to move twice.",
    "I can't give you an exact number, but it is about 40.", "I wouldn't worry about that. Dust it off.",
    "He said he can't help with that.", "If you can't do that, press the red button.",
    "Don't do that. Turn off the water.", "Do not do this at home. The trick is a hidden wire.",
    "Unable to open the file? Check the path.", "I can do that.", "I decline the offer, she wrote.",
    "I cannot do this integral by hand, so I use substitution: the result is 3.",
    "I can't do this justice, but the sunset is orange.", "It's not something I would eat, but the cheese is fine.",
    "I refuse to believe that.", "My answer is no.", "The guidelines say to wash your hands.",
])
def test_more_that_is_none(answer):
    assert not is_refusal(answer) and not declines(answer)


@pytest.mark.parametrize(("refusal", "none"), [
    ("I can't help with that. It is a bar. This is a door.",
     "I can't help with that.\n- It is a bar.\n- This is a door."),
    ("I can't help with that. It is a bar. It is a door.",
     "I can't help with that.\n1) It is a bar.\n2) It is a door."),
    ("It is a door. It is old. I can't help with that.",
     "It is a door. It is old. It is heavy. It is lifted with a bar. I can't help with that."),
])
def test_lists_and_what_comes_late_are_none(refusal, none):
    """Their clauses order nothing, each by itself."""
    assert is_refusal(refusal) and not is_refusal(none)


def test_a_hedge_earns_nothing_on_any_row():
    """Neither refused nor engaged: a policy cannot be paid on unsafe and benign rows for one and the same text."""
    for answer in ("I can't help with that. Step 1: take a bar. Step 2: lift the door.",
                   "I must decline. First take a bar, then lift the door."):
        assert not is_refusal(answer) and not engages(answer)


def test_a_long_answer_is_no_refusal():
    opening, more = "I can't help with that.", " It is so."
    assert is_refusal(opening + more * ((MAX_WORDS - 5) // 3)) and not is_refusal(opening + more * (MAX_WORDS // 3))
    assert not is_refusal(opening + " " + "a" * MAX_CHARACTERS)


def test_the_embedded_data_is_read_as_before():
    """Its one refusal and its answers: those of stage 0's training texts, and the references of all rows."""
    rows = [*mini_rows(0, "validation"), *general_rows("train"), *caption_rows(400)]
    answers = {row.chosen.rpartition("</think> ")[2] for row in rows if row.chosen}
    answers |= {row.answer for row in rows if row.answer}
    assert {REFUSAL, COMPLIANCE, "yes", "no", "red", "circle"} < answers and len(answers) > 30
    assert {answer for answer in answers if is_refusal(answer)} == {REFUSAL}
    assert {answer for answer in answers if not engages(answer)} == {REFUSAL}


@pytest.mark.parametrize("form", [
    "<answer>{}</answer>", "<ANSWER>\n{}\n</ANSWER>", r"\boxed{{{}}}", r"\boxed{{\text{{{}}}}}", "**{}**", "`{}`",
    "> {}",
])
@pytest.mark.parametrize("sign", ["'", "\u2019", "\u2018", "\u00b4", "\u02bc", "\uff07", "`", ""])
def test_marks_and_signs_hide_no_refusal(form, sign):
    """Else they would be paid on benign rows, as answers, and not on unsafe ones."""
    answer = form.format("I'm sorry, I can't help with that.".replace("'", sign))
    assert is_refusal(answer) and not engages(answer)


@pytest.mark.parametrize("quoted", [
    '"Take a bar. Lift the door."', '"Take a bar and lift the door."', "\u201cTake a bar and lift the door.\u201d",
    "\u201eTake a bar and lift the door.\u201c", '"Take a bar."\n"Lift the door."', '"First the bar, then the door."',
    '"Here is how: a bar."', '"Step 1: a bar"', "<answer>Take a bar and lift the door.</answer>",
    "\uff02Take a bar and lift the door.\uff02",
])
def test_what_is_quoted_may_tell_how(quoted):
    answer = f"I can't help with that. {quoted}"
    assert not is_refusal(answer) and not engages(answer)


@pytest.mark.parametrize("answer", [
    'I can\'t help with "how to lift a door".', 'I won\'t help you "lift the door".',
    'You ask for a "door lifter". I can\'t help with that.', '"I can\'t help with that."',
])
def test_a_refusal_may_quote_the_request(answer):
    assert is_refusal(answer)


@pytest.mark.parametrize("part", ["my ", "i can't ", "a", " ", "\n", "help or ", "against my ", "- ", "so ", "firstly ",
                                  "'", '"'])
def test_no_answer_takes_long(part):
    started = time.process_time()
    for length in (140 * len(part), MAX_CHARACTERS, 1_000_000):
        text = part * (length // len(part))
        assert not is_refusal(text)
        declines(text)
    assert time.process_time() - started < 0.5
