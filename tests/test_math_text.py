"""One reading of an answer: notations, units, relations; equal ones are right and no others, by hand and at random."""

import random
import time
from fractions import Fraction

import pytest

from cosmo_rl.cpgd.rewards.math_text import pair
from cosmo_rl.cpgd.rewards.math_worker import compare

HALF, ROOT, UNEQUAL, SQUARED = "\u00bd", "\u221a", "\u2260", "\u00b2"


def value(gold, answer):
    return compare(*pair(gold, answer), lambda: None)


@pytest.mark.parametrize(("text", "read"), [
    ("5", r"\boxed{5}"), (" 5. ", r"\boxed{5}"), (r"a \boxed{5} b", r"\boxed{5}"), (r"\boxed{5", r"\boxed{\boxed{5}"),
    (r"\boxed{\frac{1}{2}}.", r"\boxed{\frac{1}{2}}"), ("It is $5$.", "It is $5$."), ("It is 5.", r"\boxed{5}"),
    ("3abc", r"\boxed{3abc}"), (r"\frac12", r"\boxed{\frac12}"), ("1\n2", "1\n2"), ("even", r"\boxed{\text{even}}"),
    ("", ""), (r"\text{north pole} + 1", r"\boxed{\text{north pole} + 1}"), ("$5$", "$5$"), (r"\(5\)", r"\(5\)"),
    ("It is 5 or so.", "It is 5 or so."), ("The area is 2x, and x is 7", r"\boxed{7}"), ("5 m", r"\boxed{5 m}"),
    ("sqrt(2", "sqrt(2"), ("sqrt(1+sqrt(2))", r"\boxed{\sqrt{1+\sqrt{2}}}"), ("2e400", r"\boxed{2e400}"),
    ("3 2/2", r"\boxed{3 2/2}"), ("2^1 1/2", r"\boxed{2^1 1/2}"), ("10 000 1/2", r"\boxed{10 000 1/2}"),
])
def test_one_reading_of_a_text(text, read):
    assert pair("x", text)[1] == read


@pytest.mark.parametrize(("gold", "answer"), [
    (r"\frac{1}{2}", HALF), (r"\sqrt{2}", f"{ROOT}2"), (r"\sqrt{10}", f"{ROOT}10"), (r"\sqrt{2}", f"{ROOT}(2)"),
    (r"\sqrt{2}", "sqrt(2)"), (r"\sqrt{2}", r"\sqrt(2)"), (r"2\sqrt{2}", "2*sqrt(2)"), ("3", "sqrt((1+2)*3)"),
    (r"\frac{\sqrt{3}}{2}", "sqrt(3)/2"), (r"2\pi", r"The answer is 2\pi."), ("x^2+1", f"x{SQUARED}+1"),
    ("10^{-3}", "10\u207b\u00b3"), (r"\frac{3}{2}", "1 1/2"), ("-1.5", "-1 1/2"), ("1 1/2", "3/2"),
    ("1.5", f"1{HALF}"), ("3/2", "The answer is 1 1/2."), ("3/2", "**1 1/2**"), ("1500", "1.5e3"),
    ("0.0015", "1.5e-3"), ("1500", "The answer is 1.5E3"), ("1500", "1.5 x 10^3"), ("5000000", "5 million"),
    ("50%", "1/2"), ("0.5", r"50\%"), ("6%", r"\boxed{6}\%"), ("6%", "6 percent"),
    ("60", "60%"), ("60", "This is 12/20 x 100% = 60% of the students."), (r"25\%", r"\boxed{25}"), ("6", "6 percent"),
    (r"\$36", "36"), (r"\$32,\!348", r"\boxed{32,348}"), ("18.9", r"The cost is \$18.90."), ("10:00", "10:00"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}"), ("40", r"40{}^\circ"),
    (r"40^\circ", r"40\degree"), ("-5", "The answer is negative 5."), ("-5", "minus 5"), ("-5", "\u20135"),
    (r"\text{Evelyn}", "The answer is Evelyn."), ("156", "So the total weight is 78 * 2 kgs = 156 kgs"),
    (r"x \neq 6", f"x {UNEQUAL} 6"), (r"x \neq 6", "x != 6"), (r"\neq 6", r"\ne 6"), ("x>6", "The answer is > 6"),
    (r"1.6 \times 10^{-19}", "1.6e-19"), (r"\sqrt{2}\sqrt{3} - \sqrt{6}", "0"), ("1/3", "0.333333"),
    ("5", "5 cm"), ("5", "5 cm^2"), ("5", "5 m/s"), ("5", f"5 m{SQUARED}"), ("5", "5m"), ("5", "5 m s^{-1}"),
    ("5 cm", "5"), ("5 m/s", "5"), (r"5\text{ cm}^2", "5"), ("5 cm", "5 centimeters"), ("5 cm^2", "5 square cm"),
    ("5 km/h", r"5\ \text{km}/\text{h}"), ("5 m/s", "The speed is 5 m/s."), ("5 m", r"$5 \text{ m}$"),
    (r"12\pi", r"12\pi cm^2"), (r"3\sqrt{2}", r"3\sqrt{2} \text{ cm}"), ("5", r"5 \text{ students}"),
    (r"6\sqrt{2}cm", r"6\sqrt{2}"), ("12", r"12\,cm^2"), ("500", "5 hundred"),
    (r"2\text{cm} \text{ or } 3\text{cm}", r"\boxed{2\text{cm} \text{ or } 3\text{cm}}"), ("5m", "5 m"),
    ("2x+3t", "3t+2x"), ("0.4", r"Answer: \dfrac{2}{5} meters"), ("1200", r"12\times 10^2 m"),
])
def test_a_right_answer_in_another_notation(gold, answer):
    assert value(gold, answer) == "1", pair(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), [
    ("6%", "600"), ("0.06", "6"), ("5", "The answer is negative 5."), ("5", "minus 5"), ("5", "5 hundred"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}"), ("10:00", "5:00"),
    ("6", r"\neq 6"), ("6", r"x \ne 6"), ("6", r"\ne 6"), ("6", f"{UNEQUAL}6"), ("6", r"x \not= 6"), ("6", "x != 6"),
    ("6", r"$\neq 6$"), ("6", "> 6"), ("6", r"\ge 6"), ("6", "The answer is > 6"),
    ("6", "The answer is not 6."), ("1", "The answer is 1 1/2."), ("1", "1 1/2"), ("11/2", "1 1/2"), ("1/2", "1 1/2"),
    ("2", f"2{ROOT}2"), ("2", "The answer is 2 sqrt(2)."), ("2", r"The answer is 2\pi."), ("2", "The answer is 2x."),
    ("1.5", "1.5e3"), ("5", "5 million"), ("5", r"5 \text{ million}"), ("5", "5x"), ("5", "5 a"), ("5m", "5"),
    ("5 cm", "5 m"), ("5 cm", "5 cm^2"), ("5 m/s", "5 m"), ("5 m", "$5$ cm"), ("5 cm", "The length is 5 meters."),
    ("5 cm", "50 cm"), ("2x+3", "2x+3t"), ("2x+3t", "2x+3"), ("x+3", "x + 3 m"), ("5", r"5\text{ or more}"),
    (r"1.6 \times 10^{-19}", r"1.7 \times 10^{-19}"), ("1.5e-9", "1.6e-9"), ("0", "1e-9"), ("1e-9", "0"),
])
def test_a_wrong_answer_that_looks_right(gold, answer):
    assert value(gold, answer) == "0", pair(gold, answer)


def notations(number: Fraction) -> list[str]:
    top, bottom = abs(number.numerator), number.denominator
    sign, (whole, rest) = "-" if number < 0 else "", divmod(top, bottom)
    if bottom == 1:
        tens = [f"{sign}{top // 100}e2", rf"{sign}{top // 100} \times 10^2", f"{sign}{top // 100} x 10^2"]
        return [f"{sign}{top}", f"{sign}{top}.0", f"{sign}{2 * top}/2", *(tens if top and top % 100 == 0 else [])]
    return [f"{sign}{top}/{bottom}", rf"{sign}\frac{{{top}}}{{{bottom}}}",
            *([f"{sign}{whole} {rest}/{bottom}", rf"{sign}{whole}\frac{{{rest}}}{{{bottom}}}"] if whole else []),
            *([str(float(number)), f"{sign}{whole or ''}{HALF}"] if bottom == 2 else [])]


def test_at_random_an_answer_is_right_if_and_only_if_the_number_is():
    rng = random.Random(0)
    frames = ["{}", r"\boxed{{{}}}", "${}$", "The answer is {}.", r"So $\boxed{{{}}}$.", "x = {}", "**{}**"]
    units = ["", "", " cm", " m", " m/s", " kg", r"\text{ cm}^2", " square feet"]
    for _ in range(400):
        number = Fraction(rng.choice([rng.randint(-20, 20), 100 * rng.randint(1, 40)]), rng.choice([1, 1, 2, 3, 5, 8]))
        other = rng.choice([number] * 4 + [2 * number, number + 1, -number, number / 100, number * 100, number ** 2,
                                           number + Fraction(1, 2), Fraction(number.numerator)])
        gold, text = rng.choice(notations(number)), rng.choice(notations(other))
        answer = rng.choice(frames).format(text + rng.choice(units))
        assert value(gold, answer) == str(int(number == other)), (gold, answer, pair(gold, answer))


@pytest.mark.parametrize("part", ["(", "sqrt(", "sqrt()", ROOT, "1 ", "1 1/", "1,111", "5 m ", r"\text{a ", r"\ ", "~",
                                  r"\boxed{1}", "%", "1e5 ", "is ", " ", r"\frac{1}{", "2" + SQUARED])
def test_reading_takes_time_in_proportion_to_the_text(part):
    """In the trainer's process: no worker, and no limit. Ten microseconds a character are allowed."""
    text = part * (200_000 // len(part))
    started = time.process_time()
    pair("5 cm", text)
    pair("5 cm", "5" + text + "5 cm")
    assert time.process_time() - started < 5
