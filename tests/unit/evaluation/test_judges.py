"""The reward model as a judge, which reads as training does, and cases, which judge as for the gate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from unit.training.tiny import END, WORDS, tiny_model, tiny_tokenizer

from evaluation.cases import CaseTest
from evaluation.judges import CasesJudge, ChatPrompt, Pair, RewardModelJudge
from evaluation.prompts import case_chats
from evaluation.reward_model import RewardModel, score_responses
from evaluation.sampler import Sample
from feedback.cases import Case
from feedback.privacy import PrivacyFilter


@pytest.fixture
def model(tmp_path: Path) -> RewardModel:
    found = RewardModel.from_decoder(tiny_model(tmp_path / "policy"), heads=2)
    torch.nn.init.normal_(found.head.weight)
    return found


def test_the_answer_with_the_higher_score_wins_and_order_is_of_no_account(model: RewardModel) -> None:
    judge = RewardModelJudge("held-out reward model", model, tiny_tokenizer())
    prompts = [ChatPrompt(f"p{i}", ({"role": "user", "content": f"w{i} w{i + 1}"},)) for i in range(12)]
    pairs = [Pair(p, f"w{i} w{2 * i}", f"w{3 * i} w7 w{i + 9}") for i, p in enumerate(prompts)]
    verdicts = judge.compare(pairs)
    items = [
        (
            [WORDS.index(w) for w in ("user", f"w{i}", f"w{i + 1}", "<end>", "assistant")],
            [[WORDS.index(w) for w in text.split()] + [END] for text in (pair.first, pair.second)],
        )
        for i, pair in enumerate(pairs)
    ]
    assert verdicts == [float(first > second) for first, second in score_responses(model, items)]
    assert set(verdicts) == {0.0, 1.0}
    swapped = judge.compare([pair.swapped for pair in pairs])
    assert swapped == [1 - verdict for verdict in verdicts if verdict is not None]
    assert judge.compare([Pair(prompts[0], "w5", "w5")]) == [0.5]


def test_an_answer_is_scored_once_however_many_it_is_compared_with(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = RewardModelJudge("rm", model, tiny_tokenizer())
    prompt = ChatPrompt("p", ({"role": "user", "content": "w1 w2"},))
    texts = ["w3", "w4 w5", "w6 w7 w8", "w9"]
    read: list[int] = []

    def counting(model: RewardModel, items: Any) -> list[list[float]]:
        read.extend(len(answers) for _, answers in items)
        return score_responses(model, items)

    monkeypatch.setattr("evaluation.judges.score_responses", counting)
    for first in texts:
        for second in texts:
            alone = RewardModelJudge("rm", model, tiny_tokenizer()).compare([Pair(prompt, first, second)])
            read.clear()
            assert judge.compare([Pair(prompt, first, second)]) == alone
    # The last pair is of two that were scored before.
    assert read == []
    fresh = RewardModelJudge("rm", model, tiny_tokenizer())
    fresh.compare([Pair(prompt, first, second) for first in texts for second in texts])
    assert read == [len(texts)]


def test_long_texts_are_cut_as_in_training(model: RewardModel) -> None:
    judge = RewardModelJudge("rm", model, tiny_tokenizer(), prompt_tokens=4, response_tokens=3)
    turns = ({"role": "user", "content": "w1 w2 w3"},)
    longer = ({"role": "user", "content": "w9 w9 w9 w9 w2 w3"},)
    pair = Pair(ChatPrompt("p", turns), "w4 w5 w6", "w7 w8 w10")
    beyond = Pair(ChatPrompt("p", longer), "w4 w5 w6 w11 w12", "w7 w8 w10 w13")
    assert judge.compare([pair]) == judge.compare([beyond])
    assert judge._prompt(pair.prompt) == judge._prompt(beyond.prompt)
    assert judge._answer("w4 w5") == [WORDS.index("w4"), WORDS.index("w5"), END]
    assert judge._answer("w4 w5 w6 w7") == judge._answer("w4 w5 w6")


def case(id: str, **changed: Any) -> Case:
    fields: dict[str, Any] = {"checks": [], "good": None, "bad": None, "trainings": 0, "added_by": "ann"}
    messages = [{"role": "user", "content": "w1 w2"}]
    return Case(**{"id": id, "title": id, "messages": messages, "added_at": 1.0} | fields | changed)


def test_who_passes_a_case_beats_who_does_not_just_as_for_the_gate(model: RewardModel) -> None:
    cases = [
        case("case-1", checks=[{"kind": "mentions_any", "words": ["w3"]}, {"kind": "max_words", "n": 2}]),
        case("case-2", good="w5", bad="w6 w7"),
    ]
    answers = ["w3", "w3 w4 w5", "w4", "w6 w7", "w8 w9", "w10", "w11 w12 w13", "w14 w14 w14 w14 w14 w14"]
    tokenizer = tiny_tokenizer()
    gate = CaseTest(tokenizer, prompt_tokens=64, max_tokens=16)

    def passes(one: Case, text: str) -> bool:
        ids = [*(WORDS.index(word) for word in text.split()), END]
        sample = Sample(ids, [0.0] * len(ids), text, "stop")
        return gate.passed([one], [sample], lambda: lambda items: score_responses(model, items))[0]

    judge = CasesJudge(RewardModelJudge("rm", model, tokenizer, prompt_tokens=64, response_tokens=16))
    without = CasesJudge(None)
    for one, prompt in zip(cases, case_chats(cases), strict=True):
        pairs = [Pair(prompt, ours, theirs) for ours in answers for theirs in answers]
        expected = [(1 + passes(one, pair.first) - passes(one, pair.second)) / 2 for pair in pairs]
        assert judge.compare(pairs) == expected
        assert set(expected) == {0.0, 0.5, 1.0}, "nothing was told apart"
        assert without.compare(pairs) == (expected if one.checks else [None] * len(pairs))
    assert judge.compare([Pair(ChatPrompt("p", prompt.messages), "w1", "w2")]) == [None]


def test_what_is_asked_of_cases_is_cleaned_like_other_prompts_of_the_store() -> None:
    message = {"role": "user", "content": "write to ann@example.com"}
    (prompt,) = case_chats(
        [case("case-1", messages=[message], bad="ann@example.com it is")], PrivacyFilter([])
    )
    assert prompt.key == "case-1"
    assert "ann@" not in str(prompt.messages) + str(prompt.bad)
    assert prompt.messages[0]["content"].startswith("write to ")
    (raw,) = case_chats([case("case-1", messages=[message])])
    assert raw.messages == (message,)
