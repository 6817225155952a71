"""What is personal is replaced, what only looks so stays."""

import ipaddress
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stdnum import luhn

from feedback.privacy import KINDS, PrivacyFilter

FILTER = PrivacyFilter(["US"])

PERSONAL = [
    ("write to joe.o'neil+news@mail.example.co.uk.", "write to <EMAIL>."),
    ("<ann@example.org>, bob_1@müller.de", "<<EMAIL>>, <EMAIL>"),
    ("DE89 3704 0044 0532 0130 00 IS MY ACCOUNT", "<IBAN> IS MY ACCOUNT"),
    ("to GB82WEST12345698765432, please", "to <IBAN>, please"),
    ("4111 1111 1111 1111, or 378282246310005.", "<CARD>, or <CARD>."),
    ("5555-5555-5555-4444 (exp. 12/29)", "<CARD> (exp. 12/29)"),
    ("my number is 123-45-6789", "my number is <SSN>"),
    ("call (415) 555-2671 or 1-415-555-2672", "call <PHONE> or <PHONE>"),
    ("+44 20 7946 0958, +49 30 901820", "<PHONE>, <PHONE>"),
    ("+12125550123", "<PHONE>"),
    ("from 8.8.8.8 and http://8.8.4.4:80/x", "from <IP> and http://<IP>:80/x"),
    ("[2001:4860:4860::8888]", "[<IP>]"),
    ("Ann, ann@x.com, 212.555.0123", "Ann, <EMAIL>, <PHONE>"),
]

HARMLESS = [
    "user@localhost, @handle, a @ b, name@, x@y",
    "def f(a, *b): return a @ b  # c@d.e",
    "GB82WEST12345698765433 and DE00 1234 5678 9012 3456 78",
    "4111 1111 1111 1112 and 1234567812345670",
    "078-05-1120, 219-09-9999, 000-12-3456, 666-12-3456 and 123-45-67890",
    "2125550123 bytes, order 4155552671, 555-2671",
    "192.168.0.1, 10.0.0.7, 127.0.0.1, 0.0.0.0, 255.255.255.0, 300.1.1.1",
    "version 1.2.3.4.5, v8.8.8.8, 1.2.3",
    "::1, fe80::1, 2001:db8::1, std::vector, a::b, 12:30:45, 10:20",
    "ISBN 978-3-16-148410-0, pi is 3.14159265358979323846",
    "1 2 3 4 5 6 7 8 9 10 11 12, 1970-01-01, 2024-12-31 23:59:59",
    "1,234,567,890,123,456 people",
]


@pytest.mark.parametrize(("text", "expected"), PERSONAL)
def test_what_is_personal_is_replaced_and_counted(text: str, expected: str) -> None:
    cleaned, counts = FILTER.clean(text)
    assert cleaned == expected
    assert counts == Counter({kind: n for kind in KINDS if (n := expected.count(f"<{kind.upper()}>"))})
    assert FILTER.clean(cleaned) == (cleaned, Counter())


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_personal_stays(text: str) -> None:
    assert FILTER.clean(text) == (text, Counter())


def test_phone_numbers_without_country_code_are_found_where_they_are_asked_for() -> None:
    text = "(415) 555-2671, 020 7946 0958, +1 415 555 2671"
    assert PrivacyFilter().clean(text)[0] == "(415) 555-2671, 020 7946 0958, <PHONE>"
    assert PrivacyFilter(["US", "GB"]).clean(text)[0] == "<PHONE>, <PHONE>, <PHONE>"
    with pytest.raises(ValueError, match="'XX' is not a country"):
        PrivacyFilter(["US", "XX"])


@given(
    st.sampled_from(["4", "51", "55", "2221", "2720", "6011", "65", "3528"]),
    st.integers(min_value=0, max_value=10**16),
    st.sampled_from(["", " ", "-"]),
)
def test_every_card_number_is_found_and_none_with_a_wrong_digit(prefix: str, rest: int, gap: str) -> None:
    digits = f"{prefix}{rest:016d}"[:15]
    number = digits + luhn.calc_check_digit(digits)
    wrong = digits + str((int(number[-1]) + 1) % 10)
    for written, found in ((number, True), (wrong, False)):
        text = f"card {gap.join(written[i : i + 4] for i in range(0, 16, 4))}!"
        assert FILTER.clean(text)[0] == ("card <CARD>!" if found else text)


@given(st.ip_addresses(v=4))
def test_of_addresses_those_that_are_somebodys_are_found(address: ipaddress.IPv4Address) -> None:
    expected = "at <IP>," if address.is_global else f"at {address},"
    assert FILTER.clean(f"at {address},")[0] == expected


@given(st.text())
def test_any_text_can_be_cleaned_and_twice_changes_nothing_more(text: str) -> None:
    cleaned, _ = FILTER.clean(text)
    assert FILTER.clean(cleaned) == (cleaned, Counter())


def test_a_long_text_of_near_misses_takes_no_time_to_speak_of() -> None:
    """No pattern backtracks: twice the text takes about twice the time, not four times."""
    import time

    generator = random.Random(1)
    pieces = ["a." * 40, "1-" * 40, "DE89 " * 9, ":" * 60, "1.1.", "x@", "+1 ", "(4", "0" * 60]

    def took(count: int) -> float:
        text = "".join(generator.choice(pieces) for _ in range(count))
        began = time.process_time()
        FILTER.clean(text)
        return time.process_time() - began

    assert took(2000) < 5.0
