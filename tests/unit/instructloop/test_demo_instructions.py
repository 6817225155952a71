"""The demo's instructions: enough of them, a clean split, fair checks, honest repairs."""

from collections import Counter

import pytest

from evaluation.checks import all_satisfied, satisfied, validate, words
from instructloop.demo_instructions import KINDS, Instruction, demonstration, held_out, training

RESPONSE = (
    "{Topic} are a fine thing, and many people enjoy them every day. Some say that {topic} are best, "
    "others are not so sure. They have a long history. There is always more to learn about them, which"
)


def _response(instruction: Instruction) -> str:
    return RESPONSE.format(Topic=instruction.topic.capitalize(), topic=instruction.topic)


def test_there_are_enough_of_every_kind_in_both_splits() -> None:
    assert len(training()) >= 150
    assert len(held_out()) >= 60
    assert len(training()) + len(held_out()) >= 200
    assert len(KINDS) >= 12
    assert set(Counter(item.kind for item in training()).values()) == {10}
    assert set(Counter(item.kind for item in held_out()).values()) == {4}
    assert {item.kind for item in training()} == {item.kind for item in held_out()} == set(KINDS)


def test_no_text_and_no_topic_is_in_both_splits() -> None:
    texts = [item.text for item in training() + held_out()]
    assert len(set(texts)) == len(texts)
    assert not {item.topic for item in training()} & {item.topic for item in held_out()}
    unseen = {item.topic.removeprefix("the ") for item in held_out()}
    # A held-out topic must not slip into training's tasks as a word either ("snow" in "winter and snow").
    for item in training():
        assert not unseen & set(words(item.text.lower())), item.text


@pytest.mark.parametrize("instruction", training() + held_out(), ids=lambda item: item.text[:60])
def test_checks_are_sound_and_an_empty_or_constant_answer_fails(instruction: Instruction) -> None:
    for check in instruction.checks:
        validate(check)
    assert not all_satisfied(instruction.checks, "")
    # The same answer to everything is not on the topic, whatever its form.
    assert not all_satisfied(instruction.checks, "I would be happy to help you with that.")


@pytest.mark.parametrize("instruction", training() + held_out(), ids=lambda item: item.text[:60])
def test_a_good_answer_is_repaired_so_that_it_meets_every_check(instruction: Instruction) -> None:
    repaired = demonstration(instruction, _response(instruction))
    assert repaired is not None
    assert all_satisfied(instruction.checks, repaired)
    assert len(words(repaired)) <= 60
    assert "which" not in words(repaired), "the sentence that was cut off must go"


def test_repairs_keep_what_was_said() -> None:
    by_kind = {item.kind: item for item in training()}
    lower = by_kind["lowercase"]
    assert demonstration(lower, _response(lower)) == (
        f"{lower.topic} are a fine thing, and many people enjoy them every day. some say that {lower.topic} "
        "are best, others are not so sure."
    )
    bullets = by_kind["bullet_list"]
    assert (demonstration(bullets, _response(bullets)) or "").splitlines()[2] == "- They have a long history."
    opening = next(item for item in training() if item.kind == "starts_with")
    begun = f"{opening.checks[0]['text']} {opening.topic} are a fine thing."
    assert demonstration(opening, begun) == begun


@pytest.mark.parametrize(
    "response", ["", "...", "no no no no", "Here are some facts:", "I cannot help with it."]
)
def test_nothing_sensible_to_repair_gives_none(response: str) -> None:
    assert all(demonstration(item, response) is None for item in training())


def test_a_response_that_misses_the_constraint_fails_for_the_constraint_alone() -> None:
    easy = {"single_paragraph", "forbidden_words"}  # the plain answer happens to meet these
    for item in training() + held_out():
        if item.kind not in easy:
            assert not satisfied(item.checks[0], _response(item)), item.text
        assert all(satisfied(check, _response(item)) for check in item.checks[1:]), item.text
