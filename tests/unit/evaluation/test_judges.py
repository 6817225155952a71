"""The reward model as a judge: it reads prompts and answers as training does."""

from pathlib import Path

import pytest
import torch
from unit.training.tiny import END, WORDS, tiny_model, tiny_tokenizer

from evaluation.judges import ChatPrompt, Pair, RewardModelJudge
from evaluation.reward_model import RewardModel, score_responses


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
