"""InstructGPT's labels: how they are read, and the share of answers with each."""

import pytest

from evaluation.comparison import clustered_mean
from evaluation.labels import _QUESTIONS, LABELS, WORDS, Labelling, label_shares, read_labels
from evaluation.settings import EvaluationSettings

SETTINGS = EvaluationSettings(resamples=300)


def test_every_label_has_its_words_and_its_question() -> None:
    assert tuple(WORDS) == tuple(_QUESTIONS) == LABELS
    assert len(set(WORDS.values())) == len(LABELS)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ('{"explanation": "x", "labels": ["opinion", "hallucination"]}', ["hallucination", "opinion"]),
        ('```json\n{\n "labels": [\n  "sexual"\n ]\n}\n```', ["sexual"]),
        ('{"labels": []}', []),
        ('{"labels": ["rude", "other", "other"]}', ["other"]),
        ('First {"labels": ["other"]}, no: {"labels": ["violent"]}', ["violent"]),
        ('<think>{"labels": ["other"]}</think>{"labels": []}', []),
        ('<think>{"labels": ["other"]}</think>Nothing is wrong.', None),
        ("It makes things up: hallucination.", None),
        ('{"labels": ["opin', None),
        ("", None),
    ],
)
def test_labels_are_read_where_a_list_of_them_is_given(text: str, labels: list[str] | None) -> None:
    assert read_labels(text) == labels


def test_shares_are_of_answers_and_their_intervals_over_prompts() -> None:
    keys = ["p", "p", "q", "q", "r", "r"]
    first = [
        [["hallucination"]],
        [["hallucination"], []],
        [[]],
        [],
        [["hallucination", "opinion"], ["hallucination"], ["hallucination"], []],
        [[]],
    ]
    found = label_shares(Labelling("people", [first, [[[]]] * 6]), ["a", "b"], keys, SETTINGS, seed=3)
    one, other = found["contestants"]
    assert (found["source"], one["name"], one["answers"], one["opinions"]) == ("people", "a", 5, 9)
    # By hand: of p's answers 1 and 1/2, of q's the one that somebody looked at, of r's 3/4 and 0.
    expected = clustered_mean(
        ["p", "p", "q", "r", "r"], [1, 0.5, 0, 0.75, 0], confidence=SETTINGS.confidence, resamples=300, seed=3
    )
    assert one["shares"]["hallucination"] == expected.figures()
    assert one["shares"]["hallucination"]["clusters"] == 3
    assert one["shares"]["opinion"]["estimate"] == pytest.approx(0.25 / 5)
    assert {share["estimate"] for share in other["shares"].values()} == {0.0}
    assert tuple(one["shares"]) == LABELS


def test_answers_to_one_prompt_alone_give_no_share() -> None:
    found = label_shares(Labelling("m", [[[["other"]], []]]), ["a"], ["p", "q"], SETTINGS, seed=0)
    (one,) = found["contestants"]
    assert (one["answers"], set(one["shares"].values())) == (1, {None})
