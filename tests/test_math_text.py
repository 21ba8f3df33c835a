"""One reading of an answer: notations, units, relations; equal ones are right and no others, by hand and at random."""

import random
import time
from fractions import Fraction

import pytest

from cosmo_rl.cpgd.rewards.math_text import LENGTH, pair
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


KINDS = {  # kind -> (reference, right answers, wrong ones that look alike)
    "marks": [
        ("72", ["The perimeter is ***72***.", "**72 cm**.", "So the perimeter is `72 cm`.",
         "The result is <answer>72 cm\xb2</answer>.", r"The final answer is $\boxed{**72**}$."], [
         "The perimeter is **27**.", "**7** and **2**", "> **72**"]),
        ("40%", ["**40%**."], []),
        ("[2,5]", [], ["2 < x \u2264 5"]),
        ("(2,5)", ["The point is `(2, 5)`."], []),
        ("15", ["**\u20ac15**."], []),
        ("64", ["**64**.", "The area is **64**.", "The total is `64`.", "**64** cm\xb2.", "<answer>64</answer>",
         "***64***.", "$**64**$", "__64__", "_64_.", "The area is _64_.", "The area is *64*.", r"\boxed{**64**}",
         "Therefore, the area is **64 cm\xb2**.", "The area is `64` cm\xb2.", "\u201c64\u201d", "64\u3002",
         "**64**\u3002", "**64**,", "(**64**)", r"\boxed{<answer>64</answer>}", "So it is <answer>64</answer>.",
         "<ANSWER>64</ANSWER>", "65 <Answer>64</Answer>",
         "<answer>65</answer> <answer>64</answer>", r"\boxed{65} <answer>64</answer>", "65 <answer>64</answer>",
         "The area is **64**, not **65**.", "The area is **64** cm\xb2", "So the total:\n\n**64**.", "__**64**__",
         "**_64_**.", "**The area is 64**.", r"$\boxed{**64**}$", "**64**%", "**<answer>64</answer>**",
         "$<answer>64</answer>$", "<answer> The area is **64** cm\xb2. </answer>", "</answer>64",
         r"\boxed{\text{<answer>64</answer>}}"], ["> 64", "**64**!", "<answer>64</answer> or <answer>65</answer>",
         r"<answer>64</answer> \boxed{65}", "<answer>64 or 65</answer>", "<answer></answer>64", "**64** or **65**",
         "**65** **64**", "**64** **65**", "`64` `65`", "The area is **64** or **65**.", "**64**65", "**6****4**",
         "**-64**", "The area is **not 64**.", "```\n65\n```", "**6**4", "**", "****", "64<answer></answer>",
         "<answer>65</answer>64", r"<answer>\boxed{65}</answer>"]),
        ("65", [], ["**64**.", "The area is **64**.", "The total is `64`.", "**64** cm\xb2.", "<answer>64</answer>",
         "The area is **64** or **65**.", "The area is **64**, not **65**."]),
        ("x+1", ["**Answer:** x + 1", "The answer is **x + 1**.", "The answer is `x+1`."], ["**Answer:** x + 2",
         "The answer is **x + 2**."]),
        ("6465", [], ["**64**65"]),
        ("6", [], ["**6**.**4**", "**6**4", "2 ** 3"]),
        ("24", ["2**3*3"], []),
        ("8", ["2**3", "The answer is 2**3.", "2 ** 3"], []),
        ("-64", ["**-64**."], []),
        ("0.5", ["**0.5**."], []),
        ("1/2", ["**1/2**."], []),
        ("64 cm^2", ["**64** cm\xb2."], ["**64** m\xb2.", "The area is **64** cm."]),
        (r"\text{even}", ["**even**.", "The number is **even**."], ["It is *odd*."]),
        ("64%", ["**64**%"], []),
        ("0.64", ["**64%**."], []),
        ("4", [], ["**6**4"]),
        ("1024", ["2**10"], []),
        ("12345", ["**12,345**."], []),
        ("[0,1]", [], ["0 < x < 1"]),
        ("(1,-2)", ["**(1, -2)**."], []),
    ],
    "words": [
        ("x-3", [], ["Hence the answer is x + 3"]),
        ("12345", ["The total is 12 345."], []),
        ("x>2", [], [r"(3,\infty)", r"[2,\infty)"]),
        ("2", [], ["thus 2\u221a5", "thus 2\u03c0"]),
        ("10", [], ["thus 2\u221a5"]),
        ("x+1", ["so x + 1", "hence x + 1", "therefore x+1", "Thus, x + 1.", "**Answer**\n\nx + 1", "### Answer\nx + 1"
         ], ["Answer: x + 1 or x + 2", "not x + 1", "Answer: not x+1", "**Answer:** x + 11"]),
        (r"2\sqrt{5}", ["Hence, 2\u221a5", "Therefore 2\u221a5.", "which gives 2\u221a5", "we get 2\u221a5."], [
         "thus 2\u221a5 + 1", "2\u221a5 or 3", "thus 3\u221a5"]),
        ("5", [], ["thus 2\u221a5", "thus 5 or 6", "hence 5 and 6"]),
        (r"2\pi", ["thus 2\u03c0"], []),
        ("1/2", [], ["Thus 1/3", "thus -1/2"]),
    ],
    "letters": [
        (r"\mathrm{e}^3", ["e^3"], []),
        ("e^3", [r"\boxed{\mathrm{e}^{3}}"], []),
        ("2-i", [], [r"2+\mathrm{i}"]),
        ("ke", [r"k\mathrm{e}"], []),
        ("e", [r"\mathrm{e}", r"\operatorname{e}"], [r"\mathrm{i}"]),
        ("2e", [r"2\mathrm{e}"], []),
        ("e^2", [r"\mathrm{e}^2", r"\mathrm{e}^{2}"], [r"\mathrm{e}^3"]),
        ("e^{x}", [r"\mathrm{e}^{x}"], []),
        ("2.718281828", [r"\mathrm{e}"], []),
        ("1+2i", [r"1+2\mathrm{i}"], [r"1-2\mathrm{i}"]),
        ("x", [], [r"\mathrm{y}"]),
        ("e+1", [r"\mathrm{e}+1"], [r"\mathrm{e}-1"]),
        ("3e", [r"3\mathrm{e}"], []),
        ("3", [], [r"3\mathrm{e}", r"3\mathrm{i}"]),
        (r"2\mathrm{e}", ["5.43656365691809"], []),
        ("e^{2x}", [r"\mathrm{e}^{2x}"], []),
        (r"\pi e", [r"\pi\mathrm{e}"], []),
        (r"x\mathrm{e}^x", ["xe^x"], [r"x\mathrm{e}^{2x}"]),
        (r"\mathrm{e}^{-1}", [r"\frac{1}{e}"], []),
        (r"\frac{1}{\mathrm{e}}", ["e^{-1}"], []),
        ("3+4i", [r"3+4\mathrm{i}"], [r"3-4\mathrm{i}"]),
        ("5 m", [], [r"5\,\mathrm{s}"]),
        ("5", [], [r"5\mathrm{x}", r"5\mathrm{y}", r"5\mathit{n}"]),
    ],
    "full width": [
        ("85", ["\uff18\uff15", "\u7b54\u6848\uff1a\uff18\uff15"], ["\uff15\uff18"]),
        ("-0.5", ["\uff0d\uff10\uff0e\uff15"], []),
        ("85%", ["\uff18\uff15\uff05"], []),
        ("(3,4)", ["\uff08\uff13\uff0c\uff14\uff09"], ["\uff08\uff14\uff0c\uff13\uff09"]),
        ("64", ["\uff16\uff14"], ["\uff0d\uff16\uff14"]),
        ("-64", ["\uff0d\uff16\uff14"], []),
        ("65", [], ["\uff16\uff14"]),
        ("1/3", ["\uff10.\uff08\uff13\uff09"], []),
        ("12", ["\u7b54\u6848\uff1a**12**", "\uff11\uff12\uff0e", "\uff0812\uff09", "\uff13\xd7\uff14", "\uff11\uff12",
         "\u7b54\u3048\uff1a\uff11\uff12", "\u7b54\u6848\uff1a12\u3002", "\\boxed{\uff11\uff12}",
         "**\uff11\uff12**\u3002", "\u06f1\u06f2", "\u0967\u0968", "\U0001d7cf\U0001d7d0"], [
         "\u7b54\u6848\uff1a13\u3002", "\\boxed{\uff11\uff13}", "\uff11 \uff12", "\u0967\u0969", "\xb9\xb2",
         "\u2081\u2082", "\u2460\u2461", "\u216b", "1\u2082"]),
        ("12.5", ["\uff11\uff12\uff0e\uff15"], []),
        ("-7", ["\uff0d\uff17"], []),
        ("7", ["\uff0b\uff17"], ["\uff0d\uff17"]),
        ("50%", ["\uff15\uff10\uff05\u3002", "\uff15\uff10\uff05", "\uff15\uff10"], []),
        ("3*4", ["\uff13\xd7\uff14"], []),
        ("x+y", ["\uff58\uff0b\uff59"], ["\uff58\uff0d\uff59"]),
        ("5", ["x\uff1d\uff15", "\uff15 cm", "\uff15 \uff43\uff4d", "\uff58\uff1d\uff15"], ["\uff58\uff1d\uff16"]),
        ("5 cm", [], ["\uff15 \uff4d"]),
        ("1234", ["\uff11,\uff12\uff13\uff14"], []),
        ("7%", ["\uff17\uff05"], []),
        ("-12", ["\u2212\uff11\uff12"], []),
        ("3/4", ["\uff13\uff0f\uff14"], []),
        ("3+x", ["\uff13\uff0b\uff58"], []),
        ("3.5", ["\uff13\uff0e\uff15"], []),
        ("(1,2)", ["\uff08\uff11\uff0c\uff12\uff09"], ["\uff08\uff12\uff0c\uff11\uff09"]),
        ("x=5", ["\uff58\uff1d\uff15"], []),
        ("1000", ["\uff11\uff0c\uff10\uff10\uff10"], []),
        ("x>5", ["x\uff1e5"], ["x\uff1c5"]),
        ("x<5", ["\uff58\uff1c\uff15"], []),
        ("3:4", ["\uff13\uff1a\uff14"], ["\uff13\uff1a\uff15"]),
        ("2^3", ["\uff12\uff3e\uff13"], []),
        ("3/2", ["\uff11\xbd"], []),
        ("0.5", ["\uff15\uff10\uff05"], ["\uff15\uff05"]),
        ("[1,2]", ["\uff3b\uff11\uff0c\uff12\uff3d"], []),
    ],
    "names": [
        (r"2\pi", ["2pi", "2*pi", "2 pi", "The answer is 2pi.", "2pi cm", "2pi square units"], ["2", "pi", "2p"]),
        (r"\frac{\pi}{4}", ["pi/4", r"\frac{pi}{4}"], ["4/pi"]),
        (r"\ln 2", ["ln(2)", "ln 2", r"\operatorname{ln} 2", r"\mathrm{ln}2", r"\text{ln}(2)"], ["2", "ln(3)", "lg 2"]),
        (r"\sin x", ["sin(x)", "sin x", r"\mathrm{sin}x"], [r"\cos x", "x", "sinx + 1"]),
        (r"x\sin^2 x", ["x sin^2(x)"], ["x sin(x)"]),
        ("3", ["log_2(8)", "log_2 8"], ["log 3", "sin 3", "3pi"]),
        (r"(-\infty,3)", ["(-infinity, 3)"], ["(infinity, 3)"]),
        (r"\infty", ["infinity", "The answer is infinity."], ["-infinity"]),
        (r"\text{tan}", ["tan", "The answer is tan."], ["brown"]),
        (r"\emptyset", [r"\varnothing", "\u2205"], ["0"]),
    ],
    "powers": [
        ("0.001", ["10^-3", "10**-3", r"\boxed{10^-3}", "10^{-3}", "10^ -3"], ["10-3", "10^3"]),
        ("7", [], ["10^-3"]),
        ("1/x", ["x^-1"], ["x-1"]),
        ("x-1", [], ["x^-1"]),
        ("2^{-n}", ["2^-n"], ["2^n"]),
        ("1.6e-19", ["1.6*10^-19", "1.6 x 10^-19"], ["1.6*10^-18"]),
        ("5 m s^{-1}", ["5 m s^-1"], []),
    ],
    "Chinese": [
        ("7", ["\u7b54\u6848\u662f7", "\u56e0\u6b64\uff0c\u7b54\u6848\u662f7\u3002", "\u7b54\u6848\u4e3a**7**\u3002"],
         ["\u7b54\u6848\u662f8", "\u7b54\u6848\u662f7, 8"]),
        ("x+1", ["\u7b54\u6848\u662f x+1"], []),
    ],
    "repeating": [
        ("7/9", ["0.777...", r"0.\overline{7}", "0.(7)"], []),
        ("41/333", ["0.(123)"], []),
        ("22/7", ["3.(142857)"], []),
        ("0.1(3)", ["2/15"], []),
        (r"\frac{1}{3}", [r"0.\overline{3}"], []),
        ("1/3", ["0.(3)", "0.333...", "thus 0.(3)", "**0.333...**", r"$0.\overline{3}$.", r"0.\bar{3}",
         r"\frac{0.(6)}{2}", "0.333\u2026", "0.3333...", r"$0.\overline{3}$", r"\boxed{0.\overline{3}}",
         "The answer is 0.333...", "The answer is 0.(3).", r"\boxed{0.\bar{3}}", r"0.\bar 3", r"0.333\ldots",
         r"0.333\dots", r"33.\overline{3}\%"], [r"0.\overline{34}", r"0.\overline{3}\%"]),
        ("0.3", [], ["0.(3)"]),
        ("3", [], ["0.(3)", "1, 2, 3..."]),
        ("1/30", ["0.0(3)", "0.0333..."], []),
        ("100/3", ["33.333...", "33.(3)", "33.(3) cm"], []),
        ("1/11", [r"0.\overline{09}", "0.0909...", "0.090909\u2026"], [r"0.\overline{9}"]),
        ("2", ["1.999..."], []),
        ("1/7", [r"0.\dot{1}4285\dot{7}", r"0.\overline{142857}", "0.(142857)"], [r"0.\dot{1}4285\dot{8}", "0.(142858)"
         ]),
        (r"0.1\overline{6}", ["1/6"], ["0.16"]),
        ("-0.(3)", ["-1/3"], []),
        ("2/3", ["0.666...", "0.(6)"], ["0.67"]),
        ("1/6", ["0.1666...", "0.1(6)", r"0.1\overline{6}"], [r"0.\overline{16}"]),
        ("16/99", [r"0.\overline{16}"], []),
        ("1/9", [r"0.\dot{1}"], []),
        ("4/33", [r"0.\dot{1}\dot{2}"], []),
        ("1", ["0.999...", "0.(9)"], []),
        ("5/3", ["1.(6)", "1.666...", r"1.\overline{6}"], []),
        ("-1/3", ["-0.333..."], ["0.333..."]),
        ("-5/3", [r"-1.\overline{6}"], []),
        (r"\pi", [], ["3.14159..."]),
        (r"0.\overline{3}", ["1/3", r"0.\overline{3}"], ["0.333"]),
        ("0.(3)", [r"0.\overline{3}"], []),
        ("0.333...", ["1/3"], []),
        ("0.333", [], ["0.333..."]),
        ("6", [], ["2.0(3)"]),
        ("1.2(3)", ["37/30"], []),
        ("7.5", [], ["2.5(3)"]),
        ("1, 2, 3", [], ["1, 2, 3, ..."]),
        ("12.1212...", ["400/33"], []),
        ("33.333...%", ["1/3"], []),
        (r"33.\overline{3}\%", ["1/3"], []),
        ("3333", [], ["0.333..."]),
    ],
    "ratios": [
        ("2:3:5", ["4:6:10", r"\boxed{\frac{2}{5}:\frac{3}{5}:1}"], ["2:5:3", "30/6"]),
        ("5:2", ["5 to 2"], ["2:5", "5:2:1"]),
        ("9:45", [], ["9:54"]),
        ("3:00", ["3"], ["2:60"]),
        ("3:4:5", ["6:8:10", "3:4:5", "They are in the ratio 3:4:5.", "**3:4:5**.", "\uff13\uff1a\uff14\uff1a\uff15",
         r"3 \colon 4 \colon 5", r"\boxed{3{:}4{:}5}", "<answer>6:8:10</answer>", "0.75:1:1.25",
         r"\frac{3}{4}:1:\frac{5}{4}", "3 to 4 to 5", r"\boxed{6:8:10}"], ["3:5:4", "The ratio is $3:5:4$.",
         "They are in the ratio 3:4:6.", "3:4:5:6", "5:4:3 or 3:4:5", "3:4", "3:4:6", "The ratio is 5:4:3.",
         "a:b:c=5:4:3", r"\boxed{6:8:9}", "3/4/5", "3,4,5", "(3,4,5)", "0.15", "3:4:5 or 3:5:4", "3:5:4, 3:4:5"]),
        ("10:30", ["10:30", "At 10:30 in the morning"], ["10.5", "1:3"]),
        ("6:8:10", ["3:4:5"], []),
        ("1:2:3", [r"\frac{1}{3}:\frac{2}{3}:1"], [r"\frac{1}{3}:\frac{1}{2}:1"]),
        ("2:3:4", ["20:30:40", "x:y:z = 4:6:8"], ["20:30:41"]),
        ("2:0:1", ["4:0:2"], ["4:1:2"]),
        ("0:0:1", ["0:0:5"], []),
        ("1.5:2:3", ["3:4:6"], ["3:4:5"]),
        ("3:4", ["3 to 4", r"3 \text{ to } 4", "The ratio is **3:4**.", r"3 \colon 4"], ["4:3", "The ratio is 4:3.",
         "3:4:5", "AB:BC = 4:3", "3", "4"]),
        ("1:2", [], ["2:1"]),
        ("1:1:1", ["2:2:2"], []),
        ("1:2:3:4", ["2:4:6:8"], ["2:4:6:9", "1:2:3"]),
        (r"1:\sqrt{3}:2", [r"\sqrt{3}:3:2\sqrt{3}"], [r"1:2:\sqrt{3}"]),
        ("0:1:2", [], ["0:1:3"]),
        ("7", [], ["3:4"]),
        ("3", [], ["3:4"]),
        ("4", [], ["3:4"]),
    ],
    "times": [
        ("10:30", ["10:30 a.m.", "10:30 AM", "The time is 10:30 am.", r"\boxed{10{:}30}",
         r"\boxed{10:30 \text{ a.m.}}", "**10:30 a.m.**"], ["10:31", "20:60", "1030", "10 30", "30:10", "10",
         "10:30 or 10:45", "between 10:30 and 10:45", r"\boxed{10:20 \text{ a.m.}}"]),
        ("10:30 a.m.", ["10:30 am"], ["10:30 p.m."]),
        ("10:30 AM", ["10:30"], []),
        ("10", [], ["10:30"]),
        ("30", [], ["10:30"]),
        (r"10:30 \text{ p.m.}", ["10:30 PM", "10:30 pm"], [r"10:30 \text{ a.m.}"]),
        ("10:30 p.m.", ["The movie ends at 10:30 p.m.", "The movie ends at **10:30 p.m.**"], [
         "The movie ends at 10:40 p.m."]),
        ("10:00", ["10:00 a.m."], ["5:00", "2:00"]),
        ("9:05", ["9:05 PM"], ["9:50", "9:06 PM"]),
        ("09:05", ["9:05 a.m."], []),
        ("1:30:15", [], ["1:15:30"]),
        ("7:30", [], ["15:60"]),
        ("2:15 pm", ["2:15", "$2:15$ pm"], ["2:51 pm"]),
        ("10{:}30", ["10:30"], []),
        ("10 a.m.", ["10 am"], ["10 pm"]),
        ("10 am", ["10"], []),
        ("2:30", [], ["5:60"]),
        ("9:45", ["9:45 a.m.", r"\boxed{9:45\,\mathrm{a.m.}}"], []),
        ("9:45 PM", ["The train leaves at 9:45 PM."], ["9:45 AM"]),
        ("3:00", ["3 o'clock"], []),
        ("11:20", ["11:20 p.m. on Friday"], []),
        ("4:30 p.m.", ["16:30"], ["4:30 and 5:30"]),
        (r"10:30 \text{ a.m.}", [r"\boxed{10:30 \text{ a.m.}}"], [r"\boxed{10:30 \text{ p.m.}}"]),
        ("8:15 AM", ["8:15 a.m."], [r"8:15 \text{ PM}"]),
        ("12:00 p.m.", ["12:00"], []),
        ("12:30 a.m.", ["0:30"], ["12:30 p.m."]),
        ("7 p.m.", ["19:00", "7:00 PM"], ["7:30 PM"]),
    ],
    "denied": [
        ("8", ["8, not 9", "5 more than 3 is 8."], ["It isn't equal to 8.", "x can never be 8.",
         "The value is not 8; it's 9.", "It's definitely not **8**.", "The answer is greater than 8.",
         "I would not say 8", "The answer is certainly not $8$"]),
        ("9", ["Not 8 but 9.", "It does not exceed 10; it is 9."], ["8, not 9"]),
        ("3", ["She has 3 more than Tom.", "It should be 3, not 4.", "There are 3 apples, not 4.", "Not 4. 3"], [
         "It is not equal to 3.", "It isn't 3.", "It does not equal 3.", "It doesn't equal 3", "It cannot be 3.",
         "x is never 3", "The answer is not equal to $3$.", "The answer is not $3$.", "The answer isn't $3$.",
         "The answer is anything but 3.", "neither 2 nor 3", "It won't be 3", "It is unequal to 3.",
         "It is different from 3", "other than 3", "The answer is other than 3.", "everything except 3", "excluding 3",
         "It is less than 3.", "It is greater than 3.", "more than 3", "fewer than 3", "The answer is less than 3.",
         "It exceeds 3", "between 2 and 3", "is not = 3", "The answer is not\n3", "I don't think it is 3.",
         "I do not think that the answer is 3.", "**not** 3", "It is *not* **3**.", "It is false that it is 3.",
         "It is wrong that the answer is 3.", r"The answer is not \boxed{3}.", r"It is not \boxed{3}",
         "not <answer>3</answer>", r"The answer is not \boxed{3} but \boxed{4}.", "The answer isn\u2019t 3.",
         "It is not equal to: 3", "It is not $x = 3$.", r"The answer is not \(3\).", "x does not equal $3$",
         "It is not the number 3", "It ain't 3", "The answer is neither 3 nor 4.", "The answer is 2 and not 3",
         "The answer is 2 rather than 3.", "It is not 3 but -3", "It is not true that x = 3.",
         "It is not the case that x is 3.", "It cannot equal 3.", "It could not be 3.", "It must not be 3.",
         "There aren't 3"]),
        ("10:30", [], ["not 10:30"]),
        ("3:4:5", [], ["not 3:4:5"]),
        ("64", [], ["<answer>The area is not 64.</answer>"]),
        ("4", ["It is not 3 but 4.", "The smallest number that is not prime is 4.",
         "The number of primes less than 10 is 4.", "The number of primes between 1 and 10 is 4.",
         r"The answer is not \boxed{3} but \boxed{4}."], ["The answer is neither 3 nor 4."]),
        ("7", ["The number of integers not divisible by 3 is 7."], []),
        ("20", ["The number of ways such that no two are adjacent is 20."], []),
        ("3/5", ["The probability of not drawing a red ball is 3/5."], []),
        ("10", [], ["The number of primes between 1 and 10 is 4.", "There are not more than 10."]),
        ("5", [r"Since x is not 2 we get \boxed{5}", r"x is not 2, so \boxed{5}.", "No. It is 5.", "Notice it is 5.",
         "I note that it is 5", "nothing else, 5"], []),
        ("x=3", [], ["It is not $x=3$"]),
        ("2", ["The answer is not 3; it is 2.", "The answer is 2 and not 3", "The answer is 2 rather than 3.",
         "The answer is not 3. The answer is 2."], []),
        ("1/2", ["It is not 1/3 but 1/2."], []),
        ("1/3", [], ["It is not 1/3 but 1/2."]),
        (r"\frac{1}{2}", [], [r"It is not $\frac{1}{2}$."]),
        ("x+1", ["The answer is not x + 2 but x + 1."], ["The answer is not x + 1.", "The answer isn't $x+1$."]),
        ("-3", ["It is not 3 but -3"], []),
        ("100", [], ["It cannot exceed 100"]),
        ("0", [], ["x is not 0."]),
        ("1", ["x is nonzero and is 1"], []),
    ],
    "roots": [
        (r"3\sqrt{7}", ["hence 3\u221a7 cm"], ["hence 7\u221a3 cm"]),
        ("21", [], ["hence 3\u221a7"]),
        (r"\sqrt[3]{9}", ["\u221b9", "The answer is \u221b9 cm."], ["\u221a9"]),
        (r"\sqrt[4]{7}", ["\u221c7"], []),
        (r"\sqrt[3]{\frac{1}{2}}", ["\u221b(1/2)"], []),
        ("4", ["\u221b64"], []),
        (r"4\sqrt[3]{2}", ["4\u221b2"], ["4\u221a2"]),
        (r"2\sqrt{5}", ["thus 2\u221a5"], ["thus 5\u221a2"]),
        (r"\sqrt{5}", [], ["thus 2\u221a5"]),
        (r"\sqrt[3]{2}", ["\u221b2", r"\sqrt[3]{2}", "cbrt 2", "cbrt(2)", "\xb3\u221a2", "The answer is \u221b2."], [
         r"\sqrt{2}", "3\u221a2", "cbrt(3)", "3\u221b2"]),
        ("\u221b2", [r"\sqrt[3]{2}"], []),
        (r"\sqrt[3]{5}", ["\u221b5.", "**\u221b5**"], []),
        (r"\frac{\sqrt[3]{5}}{2}", ["\u221b5/2"], []),
        (r"\sqrt[3]{x}", ["\u221bx"], []),
        (r"\sqrt[3]{x^2}", ["\u221b(x\xb2)"], ["\u221bx"]),
        (r"\sqrt[4]{x+1}", ["\u221c(x+1)"], []),
        (r"\sqrt[5]{3}", ["\u2075\u221a3"], []),
        (r"2\sqrt[3]{5}", ["2\u221b5"], []),
        ("2", ["\u221b8", "\u221c16"], ["\u221c8", "\u221b27"]),
        (r"\sqrt[3]{2}+1", ["\u221b2+1"], []),
        (r"\sqrt[3]{3}", [], ["\u221b2+1"]),
        (r"3\sqrt[3]{2}", ["3\u221b2"], []),
        (r"\sqrt[4]{2}", ["\u221c2"], ["\u221b2"]),
        (r"\sqrt[3]{x+1}", ["\u221b(x+1)"], ["\u221b(x+2)"]),
        ("3", ["\u221b27"], []),
        (r"\sqrt[3]{10}", ["\u221b10"], []),
        (r"2\sqrt[3]{4}", [], [r"2\sqrt{4}"]),
        (r"\sqrt[3]2", [r"\sqrt[3]{2}"], []),
        (r"\sqrt{3+4}", ["\u221a{7}"], []),
        (r"\sqrt{6}", [], ["\u221a5 + 1"]),
        ("15", [], ["5\u221a3"]),
        (r"\sqrt{\frac{1}{2}}", ["\u221a\xbd"], []),
    ],
    "two answers": [
        ("4", [], ["The answer is $4$ or 5.", "<answer>4</answer> <answer>5</answer>", "The answer is 4 (or 5)."]),
        ("5", [], ["The answer is 4 or $5$.", "It is 4 or 5", "4 or 5", "4 and 5", "either 4 or 5",
         "It is either 4 or 5.", "The answer is **4** or **5**", "3 to 5", "x=4 or x=5", "x = 4 or x = 5"]),
        (r"\{4,5\}", ["x = 4 or x = 5"], []),
        ("4,5", ["The answers are 4 and 5.", "4 and 5", "x = 4 and x = 5"], []),
        ("3x", [], ["so we get 3x or 4x"]),
        ("6", [], ["It is either 6 or 7.", "6 (or maybe 7)", "$6$, possibly $7$", "The possible answers are 6, 7"]),
        ("7", [], ["It is either 6 or 7.", "$6$ or $7$", "The possible answers are 6, 7"]),
        ("6,7", ["6 and 7"], []),
    ],
    "signs": [
        (r"(-\infty,3)", ["(-\u221e,3)"], ["(-\u221e,3]"]),
        ("2x", ["2\u00b7x"], []),
        ("3:4:5", ["3\u22364\u22365"], ["3\u22365\u22364"]),
        ("1,2", ["1\u30012"], ["1\u30013"]),
        ("5", ["\u20185\u2019"], []),
        ("2/3", ["\u2154"], ["\u2153"]),
        ("1234567", ["1\u2009234\u202f567", "1\u00a0234\u00a0567"], ["1\u2009234\u202f568"]),
        ("12345", [r"12\,345", r"\boxed{12\;345}"], [r"12\,346", r"12\,34"]),
        ("x+1", ["### x + 1", "```python\nx + 1\n```"], ["### x + 2"]),
    ],
    "percent, grouped, sets": [
        ("3x", ["so we get 3x"], []),
        ("7/9", [], ["0.7", "0.78"]),
        ("41/333", [], ["0.123"]),
        ("37.5%", ["37.5"], ["3.75"]),
        ("37.5", ["37.5%"], []),
        ("2500", ["2 500"], ["2.500"]),
        ("16/3", [], ["5 2/3"]),
        ("[2,5]", ["2 \u2264 x \u2264 5"], []),
        ("(2,5)", [], ["(5,2)"]),
        ("15", ["\xa315"], ["\u20ac51"]),
        ("1/3", [], ["0.3", "0.33333", "33.3%"]),
        ("7", ["7 p.m."], []),
        ("5 m", [], ["5 pm"]),
        ("2", [], ["1.9999"]),
        ("12.5%", ["12.5"], ["1.25"]),
        ("12.5", ["12.5%"], []),
        ("0.5", [], ["0.5%"]),
        ("0.5%", [], ["0.5"]),
        ("33.3%", ["33.3"], []),
        (r"\frac{100}{3}\%", ["33.333333"], []),
        ("20%", [], ["0.02"]),
        ("1234", [], ["1, 234"]),
        ("12345", ["12 345"], ["12 346", "12.345"]),
        ("1000000", ["1 000 000"], []),
        ("[0,1]", ["0 \u2264 x \u2264 1"], ["0\u2264x\u22642"]),
        (r"[0,\infty)", ["x \u2265 0"], ["x > 0"]),
        (r"\{1,2,3\}", [], ["{1, 2, 4}"]),
        ("(1,-2)", [], ["(-1, 2)"]),
        ("31/2", [], ["3 1/2"]),
        ("3/2", [], ["3 1/2"]),
        ("7/2", [], ["-3\xbd"]),
        ("1000", ["1 000"], []),
        ("[1,2)", [r"1 \le x < 2"], []),
        (r"(-\infty,3)", ["x<3"], []),
        (r"\{1,2\}", ["1 and 2", "x=1 or x=2"], []),
        ("(2,3)", ["The point is **(2, 3)**."], []),
        ("25%", ["The probability is **25%**."], []),
        ("64", ["The area is **64** cm\xb2."], []),
        ("45", ["**45\xb0**.", "The angle is **45\xb0**."], []),
        ("12", ["12 \u20ac ", "\u20ac12", "\xa312.", r"**\$12**."], []),
    ],
}


@pytest.mark.parametrize(("gold", "right", "wrong"), [
    pytest.param(*case, id=f"{kind}: {case[0]}") for kind, cases in KINDS.items() for case in cases])
def test_a_kind_of_answers(gold, right, wrong):
    found = {answer: value(gold, answer) for answer in (*right, *wrong)}
    assert found == dict.fromkeys(right, "1") | dict.fromkeys(wrong, "0")


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


def test_of_a_long_text_the_last_box_or_else_the_last_lines_or_sentences_are_read():
    long = "One more step. " * (LENGTH // 10)
    assert value("5", long + "The answer is 5.") == value("5", "5\n" + "\n" * LENGTH + "x = 5") == "1"
    assert value("5", rf"{long} \boxed{{6}} \boxed{{5}} {long}") == value("5", f"{long}<answer>5</answer>{long}") == "1"
    assert value("6", rf"{long} \boxed{{6}} \boxed{{5}} {long}") == value("5", rf"not \boxed{{5}} {long}") == "0"
    assert value("5", "The answer is 5.\n" + long) == value("5", "5" * (LENGTH + 1)) == "0"


@pytest.mark.parametrize("part", [
    "(", "sqrt(", "sqrt()", ROOT, "1 ", "1 1/", "1,111", "5 m ", r"\text{a ", r"\ ", "~", r"\boxed{1}", "%", "1e5 ",
    "is ", " ", r"\frac{1}{", "2" + SQUARED, "*", "*a ", "`", "_", "1", "1:", "10:30 ", "3:4:5 ", "0.", "0.(3)", "...",
    "not ", "not 3, ", "less than 3 or ", "<answer>", "</answer>", "$", r"\mathrm{e}", "\u221b(", "\uff11", HALF,
    "or 3 ", "\n",
])
def test_reading_takes_time_in_proportion_to_the_text(part):
    """In the trainer's process: no worker, and no limit."""
    text, seconds = part * (100_000 // len(part)), []
    for _ in range(3):
        started = time.process_time()
        pair("5 cm", text)
        pair("3:4:5", "5" + text[:LENGTH - 6] + "5 cm")
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.2
