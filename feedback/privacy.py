"""Replaces what names a person in a text by placeholders such as `<EMAIL>`; `KINDS` are all of them.

It goes for precision, so that what is learned from stays language: a number has to be one by its own rules
(numbering plans from Google's libphonenumber, check digits and formats from python-stdnum), not only look
like one. Names of people and places are not found: that takes a model, and guesses.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Sequence

import phonenumbers
from stdnum import iban, luhn
from stdnum.exceptions import ValidationError
from stdnum.us import ssn

KINDS = ("email", "iban", "card", "ssn", "ip", "phone")

_EMAIL = re.compile(
    r"(?<![\w.+%-])[\w.+%'-]{1,64}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,24}(?![\w-]|\.\w)"
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,30}(?![a-z0-9])")
_CARD = re.compile(r"(?<![\w.,-])\d(?:[ -]?\d){12,18}(?![\w-]|[.,]\d)")
_SSN = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")
_IP = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:]))"
)
# Prefix and length of the schemes: Visa, Mastercard, American Express, Discover, JCB, Diners Club, UnionPay.
_SCHEME = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|2(?:2[2-9]|[3-6]\d|7[01]))\d{14}|222[1-9]\d{12}|2720\d{12}|3[47]\d{13}"
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|62\d{14,17}"
)
_GIVEN_OUT = ipaddress.IPv6Network("2000::/3")
_PERHAPS_PHONE = re.compile(r"(?:\d[\s().\-/]{0,3}){7}")


class PrivacyFilter:
    """Cleans texts. Phone numbers with a `+` are always found, others as `regions` (ISO 3166) write them.

    Addresses that belong to nobody, such as private networks' and loopback, stay.
    """

    def __init__(self, regions: Sequence[str] = ()) -> None:
        if unknown := set(regions) - set(phonenumbers.SUPPORTED_REGIONS):
            raise ValueError(f"{sorted(unknown)[0]!r} is not a country's ISO 3166 code")
        self._regions = tuple(regions)

    def clean(self, text: str) -> tuple[str, Counter[str]]:
        """Return the text with placeholders, and how many of each kind were put in."""
        counts: Counter[str] = Counter()
        for kind, pattern, find in _NUMBERS:
            text = _replaced(text, kind, pattern, find, counts)
        return self._without_phones(text, counts), counts

    def _without_phones(self, text: str, counts: Counter[str]) -> str:
        if not _PERHAPS_PHONE.search(text):
            return text
        find, leniency = phonenumbers.PhoneNumberMatcher, phonenumbers.Leniency
        spans = {(match.start, match.end) for match in find(text, None, leniency.VALID)}
        for region in self._regions:
            # Digits alone could be any number: only those are trusted that are grouped as phone numbers are.
            found = find(text, region, leniency.EXACT_GROUPING)
            spans |= {(match.start, match.end) for match in found if not match.raw_string.isdigit()}
        for start, end in sorted(_apart(spans), reverse=True):
            text = f"{text[:start]}<PHONE>{text[end:]}"
            counts["phone"] += 1
        return text


def _replaced(
    text: str, kind: str, pattern: re.Pattern[str], find: Callable[[str], str], counts: Counter[str]
) -> str:
    """Replace what `find` returns of each match, which begins it or is empty."""

    def replace(match: re.Match[str]) -> str:
        found = find(match[0])
        if not found:
            return match[0]
        counts[kind] += 1
        return f"<{kind.upper()}>{match[0][len(found) :]}"

    return pattern.sub(replace, text)


def _apart(spans: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of spans that overlap, keep the first."""
    kept: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if not kept or start >= kept[-1][1]:
            kept.append((start, end))
    return kept


def _email(text: str) -> str:
    return text


def _account(text: str) -> str:
    """Return the longest beginning that is an IBAN: words in capitals may follow it."""
    for end in range(len(text), 14, -1):
        if text[end - 1].isalnum() and _is_valid(iban.validate, text[:end]):
            return text[:end]
    return ""


def _card(text: str) -> str:
    digits = re.sub(r"[ -]", "", text)
    return text if _SCHEME.fullmatch(digits) and _is_valid(luhn.validate, digits) else ""


def _social_security(text: str) -> str:
    return text if _is_valid(ssn.validate, text) else ""


def _address(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return ""
    # Of version 6 only what is given out, which all begin alike: `a::b` is an address as well, and C++.
    given_out = address.version == 4 or address in _GIVEN_OUT
    return text if address.is_global and given_out else ""


def _is_valid(validate: Callable[[str], object], text: str) -> bool:
    try:
        validate(text)
    except ValidationError:
        return False
    return True


_NUMBERS: tuple[tuple[str, re.Pattern[str], Callable[[str], str]], ...] = (
    ("email", _EMAIL, _email),
    ("iban", _IBAN, _account),
    ("card", _CARD, _card),
    ("ssn", _SSN, _social_security),
    ("ip", _IP, _address),
)
