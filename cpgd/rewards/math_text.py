r"""What math-verify is to read of a reference and of an answer: one reading of each, and in notations that it knows.

Rewritten here is what it cannot read (1 1/2, 1.5e3, sqrt(2), 0.(3), signs of Unicode) or takes for something else: it
reads "\neq 6", "It is not equal to 6." and "The answer is 2x" as numbers, 3:5:4 as 3 / 5 / 4, and removes a final
letter of 2x + 3t as a unit.
"""

import math
import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from functools import cache

from .format import boxes

LENGTH = 4_000
"""Characters of a text that are read: from its last box or <answer>, or else its last lines or sentences."""

_TAG = re.compile("</?answer>", re.IGNORECASE)
_DELIMITED = re.compile(r"(?<!\\)\$|\\[()\[\]]")
_NAMED = re.compile(r"\\(?:begin|end|text|textbf|mathrm|mbox|operatorname)\*?\s*\{[^{}]*\}|\\[a-zA-Z]+")
_PROSE = re.compile(r"[A-Za-z]{4}|(?<![A-Za-z])(?:an|and|are|for|has|is|it|of|or|so|the|to|was|we)(?![A-Za-z])|\n|"
                    "[\u3040-\u9fff]", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z]+(?: [A-Za-z]+)*\.?")
_CLAIM = re.compile(r"\b(?:is|are|be|equals?|thus|so|hence|therefore|gives?|get|have|either)\b,?\s|(?<=[A-Za-z]):\s|"
                    "(?<=[^\x00-\x7f]):|\u7b54\u6848[\u662f\u4e3a]|" r"\banswer\s*\n|(?<![<>])=\s", re.IGNORECASE)
"""In prose, what comes before the answer."""
_OR = re.compile(r",? (?:or|and) (?=[-\d\\($]|[a-z] ?=)")
"""Between two answers, which are then read as both."""
_ASIDE = re.compile(r" ?\((or|and) ([^()]{1,60})\)")

# -- marks and denials ------------------------------------------------------------------------------------------------

_MARKED = re.compile(r"(?<![\w)}\]\\^*`])(?<![\d)}\]] )(?P<mark>\*{1,3}|_{1,2}|`{1,3})(?=\S)"
                     r"((?:(?!(?P=mark))[^\n]){1,300})(?<![\s\\])(?P=mark)(?![\w(*`]|\.\d)",
                     re.ASCII)
"""Markdown's bold, italic and code, but no product and no index."""
_HEADING = re.compile(r"^#{1,6}\s|^```\w*$", re.MULTILINE)
_NUMERIC = r"[-+]?[\d.$\\(\u221a]"
_REST = r"[^\s,;]{0,80}(?: [-+*/=] [^\s,;]{1,40}){0,5}"
_DENIED = re.compile(
    r"(?:, ?(?:and )?)?(?:(?<=[a-z])n't|(?<![\\\w])(?:not|never|cannot|neither|nor|unequal|except|excluding|exceeds?|"
    r"between|false|wrong|incorrect|(?:anything|everything|nothing|all) but|(?:other|rather|different|less|more|fewer|"
    r"greater|larger|higher|bigger|smaller|lower) (?:than|from)))\b"
    r"(?:[\s:=]{1,4}(?:equals?|be|been|to|from|the|it|is|that|think|believe|say|true|case|answer|value|number|result|"
    r"for|exactly|simply|[a-z](?= (?:is|=) ))\b){0,8}"
    rf"[\s:=]{{1,4}}(?:{_NUMERIC}|<answer>|(?!a\s)[A-Za-z](?![A-Za-z'])){_REST}"
    rf"(?:(?:, (?:or |and |nor )?| (?:or|and|nor|to) ){_NUMERIC}{_REST}){{0,9}}(?:,? but\b)?", re.IGNORECASE)
"""A value said not to be the answer: "isn't 3", "not equal to 3", "less than 3", "4, not 3", "not 3 but 4"."""

# -- notations --------------------------------------------------------------------------------------------------------

_SIGNS = {"\u00b0": r"^\circ ", "\u221e": r"\infty ", "\u2212": "-", "\u2013": "-", "\u2260": r"\neq ",
          "\u2264": r"\leq ", "\u2265": r"\geq ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u2236": ":",
          "\u3001": ",", "\u3002": ".", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
          "\u221b": "\u221a[3]", "\u221c": "\u221a[4]"}
for _code in (0xbc, 0xbd, 0xbe, *range(0x2150, 0x215f)):  # halves, thirds, ...
    _SIGNS[chr(_code)] = r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", chr(_code)).split("\u2044"))
_POWERS = "\u00b2\u00b3\u00b9\u2070\u2074-\u2079"
_RAISED = re.compile(f"[\u207a\u207b]?[{_POWERS}]+")
_DEGREE = re.compile(rf"(?<![\w)}}\]])([{_POWERS}])\u221a")
_SPACED = re.compile(r"(?<=\d)\\[,!;](?=\d{3}(?!\d))")
"""Between thousands."""
_GROUPED = re.compile(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_CURRENCY = re.compile("[\u20ac\u00a3\u00a5](?= ?\\d)|(?<=\\d) ?[\u20ac\u00a3\u00a5]")
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d{1,40}(?:\.\d{1,40})?)[eE]([+-]?\d{1,2})(?!\w|\.\d)")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(r"(?<![\w.,])(\d{1,3}(?:,\d{3}){1,9}|\d{1,40})(\.\d{1,40})?[\s~]{0,9}(?:\\text\s?\{\s?)?"
                     rf"({'|'.join(_SCALES)})\b(?:\s?\}})?")
_TIMES = re.compile(r"(?<=\d) ?x ?(?=10 ?\^)")
_MIXED = re.compile(r"(?<![\w.,/^*)}])(?<![/^*\d] )(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\w/^]|\.\d)")
_DOTTED = re.compile(r"\\dot ?\{?(\d)\}?(?:(\d{0,20})\\dot ?\{?(\d)\}?)?")
_REPEATING = re.compile(r"(?<![\w.,\\])(\d{0,20})\.(\d{0,40})(?:\\(?:overline|bar) ?\{? ?(\d{1,20}) ?\}?|"
                        r"\((\d{1,20})\)(?![\w(])|(?:\.\.\.|\\[lc]?dots(?![a-z])))")
_ROOT = re.compile(r"(?:\u221a|(?<![A-Za-z\\])sqrt|\\sqrt(?=\[)) ?(\[\w{1,9}\])? ?"
                   r"(\d{1,40}(?:\.\d{1,40})?|[a-z](?![a-z])|\\frac\{\d{1,9}\}\{\d{1,9}\}|(?=\{))")
_CUBE = re.compile(r"(?<![A-Za-z\\])cbrt ?(?=[\d(a-z])")
_BRACKET = re.compile(r"(?P<root>(?:\u221a|\\?sqrt) ?(?P<degree>\[\w{1,9}\] ?)?)?\(|\)")
_UPRIGHT = re.compile(r"([A-Za-z]?)\\(?:math(?:rm|it|bf|sf)|text(?:rm|it|bf)?|operatorname)\*?\s?\{\s?([a-z])\s?\}")
_MINUS = re.compile(r"\b(?:negative|minus) (?=\d)", re.IGNORECASE)
_POWER_OF = re.compile(r"(?<=[\w)}\]]) ?\*\* ?(-?\d{1,9}|[A-Za-z](?![A-Za-z]))")
_NEGATIVE = re.compile(r"\^ ?(-(?:\d+|[A-Za-z](?![A-Za-z])))")
_COLON = re.compile(r"\{:\}|\\colon(?![a-z])")
_TO = re.compile(r"(?<=\d) ?(?:\\text ?\{ ?)?\bto\b(?: ?\})? ?(?=\d)")
_NAME = re.compile(r"(?<![A-Za-z\\])(pi|infinity)(?![A-Za-z])|(?:(?<![A-Za-z\\])|\\(?:operatorname|mathrm|text)\{)"
                   r"(sin|cos|tan|ln|log)(?![A-Za-z])\}?(?= ?[\d_^({\\a-z])")
_UNEQUAL = re.compile(r"\\not ?=|!=|=/=")
_ONE_SIDED = re.compile(r"(?:^|(?<=\$)|(?<=\\\()|(?<=\\\[))\s{0,9}"
                        r"(?=\\(?:neq?|[lg]eq?|[lg]t|[lg]eqslant)(?![A-Za-z])|[<>])")


def pair(gold: str, answer: str) -> tuple[str, str]:
    """(gold, answer) as `math_verify.parse` is to read them, both without the unit of a quantity.

    A unit may be left out in one of the two. Where both have one and not the same, the answer is "", which equals
    nothing: no units are converted. Words are English ones, and 1,5 is two numbers. A value that the answer denies is
    not read. To a time (10:30, 9 a.m.) only that time is equal, with the half of the day or without; a ratio equals its
    multiples, and with three parts or more no number.
    """
    (value, boxed), (given, given_boxed) = _reading(gold), _reading(answer, _DENIED)
    time, said = _clock(value, alone=True), _clock(given if given_boxed else _claimed(given) or given)
    if time and (_only_a_time(value, time) or (said and said[2])):
        minutes = rf"\boxed{{{60 * time[0] + time[1]}}}"
        return minutes, minutes if said and _same_time(time, said) else ""
    value, unit = _quantity(value)
    number = not re.search("[A-Za-z]", _NAMED.sub("", re.sub(r"^[A-Za-z]\w* ?=", "", value)))
    if unit is not None or number or _is_prose(value):
        given, other = _quantity(_TO.sub(":", given), number)
        if unit and other and unit != other:
            given = ""
    return _ratios(_form(value, boxed), _form(given, given_boxed))


def is_prose(text: str) -> bool:
    """It has words, beside a unit, and neither LaTeX delimiters nor a box."""
    value, boxed = _reading(text)
    return not boxed and not _DELIMITED.search(value) and _is_prose(_quantity(value)[0])


def _reading(text: str, without: re.Pattern[str] | None = None) -> tuple[str, bool]:
    r"""What a text gives as its answer, in notations that are read; and whether it is in a box.

    That is the last \boxed{...} or <answer>, or what of these stands in the other; else all.
    """
    text = _TAG.sub(lambda tag: tag[0].lower(), text.strip())
    at = max(text.rfind(r"\boxed"), text.rfind("<answer>"))
    if len(text) > LENGTH and at >= 0:
        text = text[max(at - 200, 0):][:LENGTH]  # with what denies it
    elif len(text) > LENGTH:
        text = "".join(re.split(r"\n|(?<=[.!?]) ", text[-LENGTH:], maxsplit=1)[1:])
    text, boxed = _plain(text)[:2 * LENGTH], False
    if without:
        text = without.sub("", text)
    for _ in range(4):
        before, _, after = text.rpartition("</answer>")
        if found := boxes(after):
            text, boxed = found[-1], True
        elif "<answer>" in before:
            text, boxed = before.rpartition("<answer>")[2], False
        else:
            break
    text = _notation(_TAG.sub(" ", text).strip("*` \t\r\n"))
    return (text.rstrip("."), True) if boxed else (text, False)


def unmarked(text: str) -> str:
    """`text` without Markdown's headings, bold, italic and code; products and indices stay."""
    text = _HEADING.sub("", text)
    for _ in range(3):  # a mark in a mark
        text, before = _MARKED.sub(r"\2", text), text
        if text == before:
            break
    return text


def _plain(text: str) -> str:
    """`text` in ASCII and without Markdown."""
    return re.sub(r"[^\x00-\x7f]", lambda found: _ascii(found[0]), _SPACED.sub("", unmarked(text)))


@cache
def _ascii(char: str) -> str:
    if char in _SIGNS:
        return _SIGNS[char]
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    if unicodedata.category(char) == "No" or char in "\u207a\u207b":  # raised, lowered, in a circle
        return char
    normal = unicodedata.normalize("NFKC", char)
    return "".join(map(_ascii, normal)) if normal != char else char


def _form(text: str, boxed: bool) -> str:
    r"""One reading of a text, so that a response cannot hedge.

    Words alone as \text{...}; what prose says last "is", if that is no prose; else a text with LaTeX delimiters or
    words as it is, where math-verify takes what follows "answer", or stands last; else the whole, as if it were boxed.
    """
    if not text:
        return ""
    if not boxed:
        claimed = _claimed(text)
        if _is_prose(text) and _WORDS.fullmatch(text):
            return rf"\boxed{{\text{{{(claimed or text).rstrip('.')}}}}}"
        found = [_OR.sub(", ", _DELIMITED.sub("", part)) if _OR.search(part) else part for part in (text, claimed)
                 if _OR.search(part) or not _DELIMITED.search(text)]
        value = next((part for part in found if part and not _is_prose(part)), None)
        if value is None:
            return _ONE_SIDED.sub("x ", text)
        text = value.strip().rstrip(".,;")
    if _GROUPED.fullmatch(text):
        text = text.replace(" ", "")
    return rf"\boxed{{{_ONE_SIDED.sub('x ', text)}}}"


def _claimed(text: str) -> str:
    """What prose says to be the answer, or "". """
    claims = list(_CLAIM.finditer(text)) if _is_prose(text) else []
    return text[claims[-1].end():].strip("*` \t\r\n") if claims else ""


def _is_prose(text: str) -> bool:
    return bool(_PROSE.search(_NAMED.sub(" ", text)))


def _notation(text: str) -> str:
    text = _DEGREE.sub(lambda found: f"\u221a[{unicodedata.digit(found[1])}]", text)
    text = _RAISED.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0]).replace(chr(0x2212), '-')}}}", text)
    text = _COLON.sub(":", _ASIDE.sub(r" \1 \2", text)).replace("{}", "").replace(r"\degree", r"^\circ ")
    text = text.replace(r"\varnothing", r"\emptyset")
    text = _NAME.sub(lambda found: f"\\{found[1] or found[2]} ".replace("infinity", "infty"), text)
    text = _CURRENCY.sub("", _NEGATIVE.sub(r"^{\1}", _POWER_OF.sub(r"^{\1}", text)))
    text = _SCIENTIFIC.sub(lambda found: _decimal(found[1], int(found[2])), text)
    text = _SCALED.sub(lambda found: _decimal(found[1].replace(",", "") + (found[2] or ""), _SCALES[found[3]]), text)
    text = _MIXED.sub(_improper, _MINUS.sub("-", _TIMES.sub(r"\\times ", text)))
    text = _REPEATING.sub(_repeating, _DOTTED.sub(r"\\overline{\1\2\3}", text))
    return _roots(_UNEQUAL.sub(r"\\neq ", _UPRIGHT.sub(_upright, text)))


def _decimal(number: str, exponent: int) -> str:
    return format(Decimal(number).scaleb(exponent), "f")


def _improper(found: re.Match[str]) -> str:
    whole, top, bottom = map(int, found.groups())
    return rf"\frac{{{whole * bottom + top}}}{{{bottom}}}" if 0 < top < bottom else found[0]


def _upright(found: re.Match[str]) -> str:
    """A letter, unless it is a unit; apart from a command before it."""
    return found[0] if found[2] in _UNITS else found[1] + " " * bool(found[1]) + found[2]


def _repeating(found: re.Match[str]) -> str:
    """A fraction. After 0.333... a period is what stands at the end thrice, or twice if it is longer than a digit."""
    whole, fixed, block = found[1], found[2], found[3] or found[4] or ""
    for n in range(1, len(fixed) // 2 + 1) if not block else ():
        if fixed.endswith(fixed[-n:] * (3 if n == 1 else 2)):
            block = fixed[-n:]
            break
    if not block:
        return found[0]
    tail = int(f"{whole}{fixed}{block}") - int(f"{whole}{fixed}" or "0")
    value = Fraction(tail, 10 ** len(fixed) * (10 ** len(block) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _roots(text: str) -> str:
    r"""sqrt(...) and the root signs as \sqrt{...}; a bracket that does not close stays."""
    text = _CUBE.sub("\u221a[3]", text)
    braces: dict[int, tuple[int, str]] = {}  # start -> (end, what stands there instead)
    opened: list[re.Match[str]] = []
    for bracket in _BRACKET.finditer(text):
        if bracket[0] != ")":
            opened.append(bracket)
        elif opened and (first := opened.pop())["root"]:
            braces |= {first.start(): (first.end(), rf"\sqrt{first['degree'] or ''}{{"),
                       bracket.start(): (bracket.end(), "}")}
    parts, at = [], 0
    for start, (end, by) in sorted(braces.items()):
        parts += [text[at:start], by]
        at = end
    return _ROOT.sub(lambda found: rf"\sqrt{found[1] or ''}" + (f"{{{found[2]}}}" if found[2] else ""),
                     "".join(parts) + text[at:])


# -- times and ratios -------------------------------------------------------------------------------------------------

_CLOCK = re.compile(r"(?<![\d.:,/])(\d{1,2})(?: ?: ?([0-5]\d))?(?![\d:,/]|\.\d)(?:\s{0,9}([ap])\.?\s?m(?![a-z])\.?)?",
                    re.IGNORECASE)
_DECIMAL = re.compile(r"(?<![\d,])\d{0,40}\.\d{1,40}")
_RATIO = re.compile(r"(?<![^\s:,;])[^\s:,;]{1,60}(?: ?: ?[^\s:,;]{1,60}){2,9}")
_Time = tuple[int, int, str]
"""Hours, minutes, and a, p or "" for the half of the day."""


def _clock(text: str, alone: bool = False) -> _Time | None:
    """The one time in a text without other numbers, and, where it must be alone, without words."""
    text = re.sub(r"\\(?:text|mathrm|[,;:! ])|[{}$~]", " ", text)
    found = list(_CLOCK.finditer(text))
    if len(found) != 1 or re.search(r"\w" if alone else r"\d", _CLOCK.sub("", text)) or int(found[0][1]) > 24:
        return None
    hour, minute, half = int(found[0][1]), int(found[0][2] or 0), (found[0][3] or "").lower()
    return (hour % 12 + 12 * (half == "p") if half else hour), minute, half


def _only_a_time(text: str, time: _Time) -> bool:
    """a.m., p.m., or such that it is no ratio, whose parts have no common divisor: 10:30, 9:05."""
    return bool(time[2]) or (":" in text and (":0" in text or math.gcd(time[0], time[1]) > 1))


def _same_time(first: _Time, second: _Time) -> bool:
    unknown = [hour for hour, _, half in (first, second) if not half]
    apart = first[0] - second[0]
    return first[1] == second[1] and (apart == 0 or (len(unknown) == 1 and unknown[0] <= 12 and apart % 12 == 0))


def _ratios(gold: str, answer: str) -> tuple[str, str]:
    """Ratios of three and more parts as tuples, divided by one part; math-verify would divide them to a number."""
    parts, given = _parts(gold), _parts(answer)
    if len(parts) != len(given):
        return gold, ""
    if not parts:
        return gold, answer
    at = next((i for i, part in enumerate(parts) if part.strip("0.")), 0)
    left, right = (", ".join(rf"\frac{{{part}}}{{{ratio[at]}}}" for part in ratio) for ratio in (parts, given))
    return rf"\boxed{{({left})}}", rf"\boxed{{({right})}}"


def _parts(form: str) -> list[str]:
    text = form.removeprefix(r"\boxed{").removesuffix("}") if form.startswith(r"\boxed{") else form
    text = _DELIMITED.sub(" ", text).rpartition("=")[2]
    if _is_prose(text):
        found = _RATIO.findall(text)
        text = found[0] if len(found) == 1 and not re.search(r"\d", _RATIO.sub("", text)) else ""
    parts = [part.strip(" .") for part in _DECIMAL.sub(lambda found: str(Fraction(found[0])), text).split(":")]
    return parts if len(parts) > 2 and all(parts) else []


# -- units ------------------------------------------------------------------------------------------------------------

_UNITS = {name: names.split()[0] for names in (
    "mm millimeter millimeters millimetre millimetres", "cm centimeter centimeters centimetre centimetres", "dm",
    "m meter meters metre metres", "km kilometer kilometers kilometre kilometres", "in inch inches", "ft foot feet",
    "yd yard yards", "mi mile miles", "mg", "g gram grams", "kg kgs kilogram kilograms", "lb lbs pound pounds", "oz",
    "mL ml", "L l liter liters litre litres", "gal gallon gallons", "s sec second seconds", "min minute minutes",
    "h hr hrs hour hours", "day days", "week weeks", "month months", "yr year years", "mph", "N", "J", "kJ", "W", "kW",
    "V", "A", "Hz", "Pa", "kPa", "mol", "K", "deg degree degrees", "rad radian radians", "unit units",
) for name in names.split()}
"""Spelling -> the one that is compared."""
_GLUED = frozenset(("mm", "cm", "km", "kg"))
"""No products of variables where no space is before them."""
_ATOM = rf"(?:{'|'.join(sorted(_UNITS, key=len, reverse=True))})(?![A-Za-z])"
_POWER = r"(?: ?\^ ?(?:\{-?\d\}|-?\d))?"
_GAP = r"(?:\\[,;:! ]|[\s~]){0,9}"
_LAST = r"(?=[.\s]{0,9}(?:\$|\\\)|\\\]|\Z))"
"""Behind a unit."""
_UNIT = re.compile(
    rf"(?<=[\w)}}\]$])(?P<gap>{_GAP})(?P<unit>(?:(?P<whole>square|cubic|sq|cu)\.? )?(?P<first>{_ATOM}){_POWER}"
    rf"(?: ?(?:/|per |\\cdot |\*)? ?{_ATOM}{_POWER}){{0,2}}|\^ ?\{{?\\circ ?\}}? ?[CF]){_LAST}")
_TEXT = re.compile(_GAP + r"\\(?:text|textrm|mathrm|mbox) ?\{(?! ?(?:or|and)\b)((?:[^{}\\]|\\[, ])*)\}")
_THING = re.compile(rf"(?<=[\w)}}\]]){_GAP}" r"\\(?:text|textrm|mathrm|mbox) ?\{ ?"
                    r"(?!(?:or|and|not|no|less|more|least|most|than)\b)[A-Za-z]+(?: [a-z]+)?\.? ?\}(?:\^\d)?" + _LAST)
_NUMBER = re.compile(r"(?:\A|[=:$(]|[A-Za-z]{2} )[\s~]{0,9}-?(?:\d[\d.,]{0,40}(?:/\d{1,40})?|"
                     r"\d{0,9} ?\\[dt]?frac ?\{-?\d{1,40}\} ?\{\d{1,40}\})"
                     r"(?: ?(?:\\times|\\cdot|\*|\u00d7) ?10 ?\^ ?(?:\{-?\d{1,9}\}|-?\d{1,9}))?\$?\Z")


def _quantity(text: str, of_number: bool = False) -> tuple[str, str | None]:
    """(text without its unit, the unit or "" for a thing that is counted; None: it has neither).

    Args:
        of_number: the reference is a number, so that the m of 5m can be no variable.
    """
    plain = _TEXT.sub(r" \1", text)
    for found in _UNIT.finditer(plain):
        head, first = plain[:found.start()], found["first"] or ""
        if not found["gap"] and first and not (of_number or first in _GLUED):
            continue
        if (len(first) == 1 or not found["gap"]) and first not in _GLUED and not _NUMBER.search(head[-100:]):
            continue
        return head + plain[found.end():], _canonical(found["unit"], found["whole"])
    rest = _THING.sub("", text)
    return rest, "" if rest != text else None


def _canonical(unit: str, whole: str | None) -> str:
    if whole:
        unit = unit.split(" ", 1)[1] + ("^2" if whole.startswith("sq") else "^3")
    unit = re.sub("[A-Za-z]+", lambda name: _UNITS.get(name[0], name[0]), unit.replace(r"\cdot", "*"))
    return re.sub(r"[ {}*]", "", unit.replace("per ", "/"))
