r"""How people write a number, and the one name that it has here.

``1,080``, ``$1{,}080.00$``, ``Rs. 1080``, ``1 080`` and full-width digits are one
number, named ``"1080"``. :func:`plain` turns the ways of LaTeX, of typography and of
other scripts into ASCII's, ``NUMBER`` finds numbers in what it returns, and
:func:`value_of` values them. Everything is exact (``fractions.Fraction``); a number
without a finite decimal expansion is named by its fraction in lowest terms.

Time is linear in the length of a text. Left out: numbers in words, powers and roots,
decimal commas (``1.080,50``).
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

# No answer or expression of the tasks comes near this, but a degenerate sample can be
# one number of a million digits.
MAX_NUMBER = 60  # characters

# 1080, 1,080 and, in India, 10,00,000
_WHOLE = (
    r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,16}(?![0-9])"
    r"|[0-9]{1,2}(?:,[0-9]{2}){1,16},[0-9]{3}(?![0-9]|,[0-9])|[0-9]+)"
)
# The point of "Rs.14" belongs to the word
DECIMAL = rf"(?:{_WHOLE}(?:\.[0-9]+)?|(?<![A-Za-z0-9])\.[0-9]+)"
# 42, 1,080, .5, -$5, 3/4, 1e3; "units" are the 1 of the mixed number 1 3/4.
_NUMBER_SOURCE = rf"""
    (?P<minus> (?<![A-Za-z0-9])- (?:\$\ ?)? )?
    (?: (?P<units>[0-9]{{1,20}}) \ {{1,3}} (?=[0-9]{{1,20}}\ ?/\ ?[0-9]) )?
    (?P<decimal>{DECIMAL})
    (?P<exponent> [eE][-+]?[0-9]+ )?
    (?: \ ?/\ ? (?P<denominator>{_WHOLE}) )?
"""
NUMBER = re.compile(_NUMBER_SOURCE, re.VERBOSE)
_NUMBER_ALONE = re.compile(rf"[+$]*\ ?{_NUMBER_SOURCE}\ ?[%$]?\.?", re.VERBOSE)
_UNREADABLE_BEFORE = ("^", "√", "±", "/")  # x^2, √2, ±2, x/2
_UNREADABLE_BEHIND = re.compile(r"\s?[√π]")

DASHES = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{EM DASH}": "-"})


def canonical_number(text: str) -> str | None:
    """The one name of a number that is written alone, or None if it is not one.

    Currency, separators of thousands, a percent sign and a full stop may stand with
    it; words may not.

    >>> canonical_number("1,080.00"), canonical_number("-.5"), canonical_number("4/6")
    ('1080', '-0.5', '2/3')
    """
    match = number_alone(plain(text))
    value = value_of(match) if match else None
    return None if value is None else name_of(value)


def number_alone(text: str) -> re.Match[str] | None:
    """The match of a plain text that is one number and nothing else.

    Here a common space separates thousands too. Inside a text it may as well stand
    between two numbers: ``2 250 ml bottles``.
    """
    text = text.strip()
    if spaced := _SPACED.match(text):
        text = spaced[0].replace(" ", "") + text[spaced.end() :]
    return _NUMBER_ALONE.fullmatch(text)


def value_of(match: re.Match[str]) -> Fraction | None:
    """The value of a match of ``NUMBER``; None if it cannot be read.

    So it is with a number over zero, one that is too long, and the digits of
    something else: 5² is not 5, nor is √5 or 5π.
    """
    text, exponent = match.string, match["exponent"] or ""
    if len(match[0]) > MAX_NUMBER or len(exponent) > 4:
        return None
    behind = text[match.end() : match.end() + 2]
    if behind[:1].isnumeric() or _UNREADABLE_BEHIND.match(behind):
        return None
    before = text[max(match.start() - 2, 0) : match.start()].rstrip()
    if before.endswith(_UNREADABLE_BEFORE):
        return None
    value = Fraction(match["decimal"].replace(",", "") + exponent)
    if match["denominator"]:
        denominator = int(match["denominator"].replace(",", ""))
        if denominator == 0:
            return None
        value /= denominator
    value += int(match["units"] or 0)
    if len(name_of(value)) > MAX_NUMBER:  # 1e99: a name must be readable as a number
        return None
    return -value if match["minus"] else value


def name_of(value: Fraction) -> str:
    """``value`` as a decimal number where it has a finite one, else as a fraction."""
    places = decimal_places(value)
    if places is None or places == 0:
        return str(value)  # "1/3", "-5"
    digits = str(abs(value.numerator) * 10**places // value.denominator)
    digits = digits.rjust(places + 1, "0")
    return f"{'-' * (value < 0)}{digits[:-places]}.{digits[-places:]}"


def decimal_places(value: Fraction) -> int | None:
    """How many decimals write ``value`` exactly; None if no number of them does."""
    rest, powers = value.denominator, []
    for prime in (2, 5):
        power = 0
        while rest % prime == 0:
            rest, power = rest // prime, power + 1
        powers.append(power)
    return max(powers) if rest == 1 else None


# ----------------------------------------------------------------------------------
# From the ways of LaTeX, typography and other scripts to ASCII's


_JOINING = "\N{THIN SPACE}"  # stands for every space that does not break a number
_THOUSANDS = re.compile(
    rf"(?<![0-9.,'{_JOINING}])[0-9]{{1,3}}(?:['{_JOINING}][0-9]{{3}})+(?![0-9])"
)
_SPACED = re.compile(r"[^0-9.]{0,8}[0-9]{1,3}(?: [0-9]{3})+(?! ?[0-9/])")
_CURRENCY_WORD = re.compile(
    r"(?<![A-Za-z])(?:[Rr]s\.?|INR|USD|EUR|GBP|CAD|AUD|JPY|CNY|CHF|[A-Z]{1,3}(?=\$))"
    r" ?(?=-? ?\$? ?\.?[0-9])"
)
# Where a text or a claim begins, a dash is a sign, whatever stands around it
_SIGN = re.compile(r"((?:^|[:=]|\bis\b)[\s$*_]*)-[\s$*_]*(?=\.?[0-9])")


def plain(text: str) -> str:
    """``text`` with its numbers as ASCII writes them; all else about as it was."""
    if not text.isascii():
        text = text.translate(_GLYPHS)
    if "\\" in text or "{" in text:
        text = _without_latex(text)
    if _JOINING in text or "'" in text:
        text = _THOUSANDS.sub(lambda found: re.sub(r"[^0-9]", "", found[0]), text)
        text = text.replace(_JOINING, " ")
    text = _CURRENCY_WORD.sub("$", text)
    return _SIGN.sub(r"\1-", text)


class _Glyphs(dict[int, str]):
    """A table for ``str.translate`` that is filled as characters are met."""

    def __missing__(self, code: int) -> str:
        self[code] = glyph = _ascii(chr(code))
        return glyph


def _ascii(char: str) -> str:
    """What ASCII writes for a character, or the character itself."""
    category = unicodedata.category(char)
    if char.isascii():
        return char
    if category == "Nd":  # the digits of every script
        return str(unicodedata.digit(char))
    if category == "Zs":
        return _JOINING
    if category == "Sc":
        return "$"
    if category == "Pd":
        return "-"
    if category == "Cf":  # zero-width and soft ones
        return ""
    form = unicodedata.normalize("NFKC", char)
    if category == "No" and "\N{FRACTION SLASH}" in form:  # ½, behind 1 a mixed number
        return f" {form} ".translate(_GLYPHS)
    # Full-width signs. Not superscripts, of which NFKC makes digits.
    return form if category[0] in "PSL" and form.isascii() and len(form) == 1 else char


_GLYPHS = _Glyphs(
    DASHES
    | str.maketrans(
        {
            "\N{FRACTION SLASH}": "/",
            "\N{DIVISION SLASH}": "/",
            "\N{MULTIPLICATION SIGN}": "*",
            "\N{DOT OPERATOR}": "*",
            "\N{MIDDLE DOT}": "*",
            "\N{DIVISION SIGN}": "/",
            "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        }
    )
)

_FRACTION = re.compile(
    r"\\[cdt]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))"
)
_COMMAND = re.compile(r"\\([A-Za-z]+|.)")
_COMMANDS = {
    **dict.fromkeys([",", ";", ":", " "], _JOINING),
    **dict.fromkeys(["times", "cdot", "ast"], "*"),
    **{"div": "/", "pi": "π", "sqrt": "√", "pm": "±", "pounds": "$", "euro": "$"},
    **{"!": "", "\\": " ", "(": "(", "[": "(", ")": ")", "]": ")"},
}
_MARK_UP = re.compile(
    r"text\w*|math\w*|f?boxed|fbox|left|right|displaystyle|q?quad|bf|rm|it|[Bb]igg?[lr]?"
)


def _without_latex(text: str) -> str:
    """``\\boxed{\\frac{3}{4}}`` as ``3/4``: commands spelled out, braces dropped."""
    text = _FRACTION.sub(_fraction, text.replace("{,}", ","))
    text = _COMMAND.sub(_command, text)
    return text.replace("{", "").replace("}", "")


def _fraction(match: re.Match[str]) -> str:
    over, under = match[1] or match[2], match[3] or match[4]
    start = match.start()
    mixed = start > 0 and match.string[start - 1].isdigit()
    return f"{' ' * mixed}{over}/{under}"


def _command(match: re.Match[str]) -> str:
    name = match[1]
    if name in _COMMANDS:
        return _COMMANDS[name]
    if not name.isalpha():
        return name  # \% and \$
    return "" if _MARK_UP.fullmatch(name) else f" {name} "
