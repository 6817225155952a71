"""Every kind of check with texts that meet it and texts that don't."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.checks import (
    KINDS,
    BadCheck,
    all_satisfied,
    degenerate,
    mentions,
    satisfied,
    sentences,
    share_satisfied,
    validate,
    words,
)

# For each kind: the check's parameters, texts that meet it, texts that don't.
CASES: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"kind": "no_commas"}, ["Frogs hop and swim."], ["Frogs hop, and swim."]),
    ({"kind": "lowercase"}, ["frogs hop at 5.", "élan vital"], ["Frogs hop.", "fRogs", "1 2 3"]),
    ({"kind": "uppercase"}, ["FROGS HOP AT 5!"], ["FROGS hOP.", "Frogs", "1 2 3"]),
    ({"kind": "no_digits"}, ["Three frogs."], ["3 frogs.", "Frog no4."]),
    (
        {"kind": "max_sentences", "n": 2},
        [
            "Frogs hop. They swim.",
            "One only",
            "Dr. Green met Mrs. Frog. They spoke.",
            "It costs 3.50 e.g. here.",
        ],
        ["One. Two. Three.", "Really? Yes! No.", "- one\n- two\n- three", "One.\nTwo.\nThree"],
    ),
    ({"kind": "min_sentences", "n": 2}, ["Frogs hop. They swim", "a frog\na pond"], ["Frogs hop."]),
    ({"kind": "max_words", "n": 4}, ["Don't be well-known, frog.", "Hop"], ["One two three four five"]),
    ({"kind": "min_words", "n": 4}, ["The frogs hop high."], ["The frogs hop."]),
    (
        {"kind": "forbidden_words", "words": ["toad", "pond life"]},
        ["A frog and a toadstool.", "Life in the pond."],
        ["A TOAD.", "Two toads.", "Toad's", "The pond\nlife here."],
    ),
    (
        {"kind": "required_words", "words": ["pond", "box"]},
        ["Ponds and boxes.", "A box in the pond"],
        ["A pond.", "A pondering box."],
    ),
    ({"kind": "mentions_any", "words": ["sea", "ocean"]}, ["The Sea!", "Two oceans."], ["A season."]),
    (
        {"kind": "starts_with", "text": "Once upon"},
        ["Once upon a time", "  once Upon it"],
        ["And once upon a time"],
    ),
    (
        {"kind": "ends_with", "text": "The end."},
        ["So it was. The end.\n", "x THE END."],
        ["The end. Or not", "The end"],
    ),
    (
        {"kind": "bullet_list"},
        ["- frogs\n- toads", "Here they are:\n* frogs\n* toads", "• a\n\n• b"],
        ["- only one", "Frogs\n- a\n- b", "- frogs\n- toads\nThat is all.", "1. a\n2. b", "-frogs\n-toads"],
    ),
    ({"kind": "bullet_list", "n": 3}, ["- a\n- b\n- c"], ["- a\n- b"]),
    (
        {"kind": "numbered_list"},
        ["1. frogs\n2. toads", "The list:\n1) frogs\n2) toads"],
        ["1. one", "1. frogs\n3. toads", "2. a\n3. b", "- a\n- b", "1. frogs\n2. toads\nDone."],
    ),
    ({"kind": "single_paragraph"}, ["Frogs hop. They swim.\n"], ["Frogs hop.\n\nThey swim.", "a\nb"]),
    ({"kind": "question"}, ["Do frogs hop?", 'She asked: "Why frogs?"'], ["Why? Because.", "Frogs"]),
    ({"kind": "quoted"}, ['"Frogs hop."', "“Frogs hop.”"], ['"Frogs" hop.', "'Frogs hop.'", "Frogs"]),
    (
        {"kind": "title"},
        ["<<Frogs>>\nThey hop.", " <<My frogs>> hop"],
        ["Frogs <<hop>>", "<<>> They hop.", "<<Frogs>>", "<Frogs> They hop."],
    ),
    ({"kind": "json"}, ['{"frog": 1}', '["frogs", "toads"]'], ["frog: 1", '"frog"', '{"frog": 1} and more']),
]


def test_there_are_cases_for_every_kind() -> None:
    assert {check["kind"] for check, _, _ in CASES} == set(KINDS)
    assert len(KINDS) >= 12


@pytest.mark.parametrize(("check", "good", "bad"), CASES, ids=lambda value: str(value)[:40])
def test_texts_that_meet_a_check_and_texts_that_do_not(
    check: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    for text in good:
        assert satisfied(check, text), text
    for text in bad:
        assert not satisfied(check, text), text


@pytest.mark.parametrize("check", [check for check, _, _ in CASES], ids=lambda check: str(check["kind"]))
@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "...",
        "!!!",
        "frog frog frog",
        "a a a a a a",
        "- frog\n- frog\n- frog",
        "the frog hops " * 30,
    ],
)
def test_a_degenerate_response_meets_nothing(check: dict[str, Any], text: str) -> None:
    assert degenerate(text)
    assert not satisfied(check, text)


@pytest.mark.parametrize(
    "text",
    [
        "Yes.",
        "No, no.",
        "Paris",
        "The frog saw the other frog and the two frogs went to the pond to see the rest of the frogs.",
        "蛙は池に飛び込む。",
    ],
)
def test_a_short_or_plain_answer_is_not_degenerate(text: str) -> None:
    assert not degenerate(text)


def test_a_long_text_that_gets_stuck_is_degenerate() -> None:
    fine = " ".join(f"word{n}" for n in range(80))
    assert not degenerate(fine)
    assert degenerate(fine + " and again" * 30)


@pytest.mark.parametrize(
    ("check", "field"),
    [
        ({}, "kind"),
        ({"kind": "rhymes"}, "kind"),
        ({"kind": ["no_commas"]}, "kind"),
        ({"kind": "max_words"}, "n"),
        ({"kind": "max_words", "n": 0}, "n"),
        ({"kind": "max_words", "n": True}, "n"),
        ({"kind": "max_words", "n": "5"}, "n"),
        ({"kind": "starts_with", "text": " "}, "text"),
        ({"kind": "forbidden_words", "words": []}, "words"),
        ({"kind": "forbidden_words", "words": "toad"}, "words"),
        ({"kind": "required_words", "words": ["a", ""]}, "words"),
        ({"kind": "no_commas", "n": 3}, "n"),
        ({"kind": "bullet_list", "n": -1}, "n"),
    ],
)
def test_a_bad_check_names_its_field(check: dict[str, Any], field: str) -> None:
    with pytest.raises(BadCheck, match=rf"^{field}: "):
        validate(check)
    with pytest.raises(BadCheck):
        satisfied(check, "Frogs hop.")


def test_shares() -> None:
    checks = [
        {"kind": "no_commas"},
        {"kind": "lowercase"},
        {"kind": "max_words", "n": 3},
        {"kind": "question"},
    ]
    assert share_satisfied(checks, "frogs hop high") == 0.75
    assert not all_satisfied(checks, "frogs hop high")
    assert all_satisfied(checks, "do frogs hop?")
    with pytest.raises(ValueError, match="no checks"):
        share_satisfied([], "Frogs")


def test_sentences_and_words() -> None:
    assert sentences("He left. Then rain… Why? ") == ["He left.", "Then rain…", "Why?"]
    assert sentences("1. Frogs hop.\n2. Toads wait") == ["Frogs hop.", "Toads wait"]
    assert words("It's a well-known fact: 3 frogs_hop") == [
        "It's",
        "a",
        "well-known",
        "fact",
        "3",
        "frogs",
        "hop",
    ]


@given(st.text(max_size=200))
def test_no_text_breaks_a_check_and_sentences_lose_no_word(text: str) -> None:
    for check, _, _ in CASES:
        assert satisfied(check, text) in (True, False)
    if not any(marker in text for marker in "-*•.)") and not any(char.isdigit() for char in text):
        assert [word for sentence in sentences(text) for word in words(sentence)] == words(
            " ".join(text.splitlines())
        )


@given(st.from_regex(r"[a-z]{1,8}( [a-z]{1,8})?", fullmatch=True))
def test_a_word_is_mentioned_in_any_case_but_not_inside_another(word: str) -> None:
    assert mentions(f"So, {word.upper()}!", word)
    assert not mentions(f"x{word}", word)
