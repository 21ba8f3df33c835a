r"""What math-verify is to read of a reference and of an answer: one reading of each, and in notations that it knows.

Rewritten here is what it cannot read (1 1/2, 1.5e3, sqrt(2), signs of Unicode) or takes for something else: it reads
"\neq 6" and "The answer is 2x" as numbers, and removes a final letter of 2x + 3t as a unit.
"""

import re
import unicodedata
from decimal import Decimal

from .format import boxes

_DELIMITED = re.compile(r"(?<!\\)\$|\\\(|\\\[")
_NAMED = re.compile(r"\\(?:begin|end|text|textbf|mathrm|mbox|operatorname)\*?\s*\{[^{}]*\}|\\[a-zA-Z]+")
_PROSE = re.compile(r"[A-Za-z]{4}|(?<![A-Za-z])(?:an|and|are|for|has|is|it|of|or|so|the|to|was|we)(?![A-Za-z])|\n",
                    re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z]+(?: [A-Za-z]+)*\.?")
_CLAIM = re.compile(r"(?:\b(?:is|are|be|equals)|(?<=[A-Za-z*]):|(?<![<>])=)\s")
"""In prose, what comes before the answer."""

# -- notations --------------------------------------------------------------------------------------------------------

_SIGNS = {ord("\u00b0"): r"^\circ ", ord("\u221e"): r"\infty ", ord("\u2212"): "-", ord("\u2013"): "-",
          ord("\u2260"): r"\neq ", ord("\u2264"): r"\leq ", ord("\u2265"): r"\geq ", ord("\u00b7"): r"\cdot ",
          ord("\u22c5"): r"\cdot "}
for _code in (0xbc, 0xbd, 0xbe, *range(0x2150, 0x215f)):  # halves, thirds, ...
    _SIGNS[_code] = r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", chr(_code)).split("\u2044"))
_RAISED = re.compile("[\u207a\u207b]?[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+")
_SPACED = re.compile(r"(?<=\d)\\[,!;](?=\d{3}(?!\d))")
"""Between thousands."""
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d{1,40}(?:\.\d{1,40})?)[eE]([+-]?\d{1,2})(?!\w|\.\d)")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(r"(?<![\w.,])(\d{1,3}(?:,\d{3}){1,9}|\d{1,40})(\.\d{1,40})?[\s~]{0,9}(?:\\text\s?\{\s?)?"
                     rf"({'|'.join(_SCALES)})\b(?:\s?\}})?")
_TIMES = re.compile(r"(?<=\d) ?x ?(?=10 ?\^)")
_MIXED = re.compile(r"(?<![\w.,/^*)}])(?<![/^*\d] )(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\w/^]|\.\d)")
_ROOT = re.compile(r"(?:\u221a|(?<![A-Za-z\\])sqrt) ?(\d{1,40}(?:\.\d{1,40})?|[a-z](?![a-z]))")
_BRACKET = re.compile(r"(?P<root>(?:\u221a|\\?sqrt) ?)?\(|\)")
_MINUS = re.compile(r"\b(?:negative|minus) (?=\d)", re.IGNORECASE)
_UNEQUAL = re.compile(r"\\not ?=|!=|=/=")
_ONE_SIDED = re.compile(r"(?:^|(?<=\$)|(?<=\\\()|(?<=\\\[))\s{0,9}"
                        r"(?=\\(?:neq?|[lg]eq?|[lg]t|[lg]eqslant)(?![A-Za-z])|[<>])")


def pair(gold: str, answer: str) -> tuple[str, str]:
    """(gold, answer) as `math_verify.parse` is to read them, both without the unit of a quantity.

    A unit may be left out in one of the two. Where both have one and not the same, the answer is "", which equals
    nothing: no units are converted. Words are English ones, and 1,5 is two numbers.
    """
    (value, boxed), (given, given_boxed) = _reading(gold), _reading(answer)
    value, unit = _quantity(value)
    number = not re.search("[A-Za-z]", _NAMED.sub("", re.sub(r"^[A-Za-z]\w* ?=", "", value)))
    if unit is not None or number or _is_prose(value):
        given, other = _quantity(given, number)
        if unit and other and unit != other:
            given = ""
    return _form(value, boxed), _form(given, given_boxed)


def is_prose(text: str) -> bool:
    """It has words, beside a unit, and neither LaTeX delimiters nor a box."""
    value, boxed = _reading(text)
    return not boxed and not _DELIMITED.search(value) and _is_prose(_quantity(value)[0])


def _reading(text: str) -> tuple[str, bool]:
    r"""The last \boxed{...} of a text or else all of it, in notations that are read; and whether it was boxed."""
    text = _SPACED.sub("", text.translate(_SIGNS)).strip().removeprefix("<answer>").removesuffix("</answer>")
    text = _notation(text.strip("*` \t\r\n").replace("{}", "").replace(r"\degree", r"^\circ "))
    found = boxes(text)
    return (found[-1].rstrip("."), True) if found else (text, False)


def _form(text: str, boxed: bool) -> str:
    r"""One reading of a text, so that a response cannot hedge.

    Words alone as \text{...}; what prose says last "is", if that is no prose; else a text with LaTeX delimiters or
    words as it is, where math-verify takes what follows "answer", or stands last; else the whole, as if it were boxed.
    """
    if not text:
        return ""
    if not boxed and not _DELIMITED.search(text) and _is_prose(text):
        claims = list(_CLAIM.finditer(text))
        claimed = text[claims[-1].end():].strip("*` \t\r\n") if claims else ""
        if _WORDS.fullmatch(text):
            return rf"\boxed{{\text{{{(claimed or text).rstrip('.')}}}}}"
        if not claimed or _is_prose(claimed):
            return text
        text = claimed
    if not boxed and _DELIMITED.search(text):
        return _ONE_SIDED.sub("x ", text)
    return rf"\boxed{{{_ONE_SIDED.sub('x ', text if boxed else text.rstrip('.,;'))}}}"


def _is_prose(text: str) -> bool:
    return bool(_PROSE.search(_NAMED.sub(" ", text)))


def _notation(text: str) -> str:
    text = _RAISED.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0]).replace(chr(0x2212), '-')}}}", text)
    text = _SCIENTIFIC.sub(lambda found: _decimal(found[1], int(found[2])), text)
    text = _SCALED.sub(lambda found: _decimal(found[1].replace(",", "") + (found[2] or ""), _SCALES[found[3]]), text)
    text = _MIXED.sub(_improper, _MINUS.sub("-", _TIMES.sub(r"\\times ", text)))
    return _roots(_UNEQUAL.sub(r"\\neq ", text))


def _decimal(number: str, exponent: int) -> str:
    return format(Decimal(number).scaleb(exponent), "f")


def _improper(found: re.Match[str]) -> str:
    whole, top, bottom = map(int, found.groups())
    return rf"\frac{{{whole * bottom + top}}}{{{bottom}}}" if 0 < top < bottom else found[0]


def _roots(text: str) -> str:
    r"""sqrt(...) and the root sign as \sqrt{...}; a bracket that does not close stays."""
    braces: dict[int, tuple[int, str]] = {}  # start -> (end, what stands there instead)
    opened: list[re.Match[str]] = []
    for bracket in _BRACKET.finditer(text):
        if bracket[0] != ")":
            opened.append(bracket)
        elif opened and (first := opened.pop())["root"]:
            braces |= {first.start(): (first.end(), r"\sqrt{"), bracket.start(): (bracket.end(), "}")}
    parts, at = [], 0
    for start, (end, by) in sorted(braces.items()):
        parts += [text[at:start], by]
        at = end
    return _ROOT.sub(r"\\sqrt{\1}", "".join(parts) + text[at:])


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
