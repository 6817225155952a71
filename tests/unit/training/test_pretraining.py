"""Files of prompts and pretraining texts: what becomes of them, and what is said of a bad one."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from unit.training.tiny import tiny_tokenizer

from training.pretraining import FileProblem, PretrainingTexts, read_prompts
from training.settings import TrainingSettings


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "file.jsonl"
    path.write_text(text)
    return path


def test_prompts_are_rendered_as_chats_and_lose_their_beginning(tmp_path: Path) -> None:
    file = _file(tmp_path, '{"prompt": "w1 w2"}\n\n{"messages": [{"role": "user", "content": "w3"}]}\n')
    tokenizer = tiny_tokenizer()
    prompts = read_prompts(file, tokenizer, 100)
    expected = [
        tokenizer("user w1 w2 <end> assistant").input_ids,
        tokenizer("user w3 <end> assistant").input_ids,
    ]
    assert [prompt.token_ids for prompt in prompts] == expected
    assert len({prompt.key for prompt in prompts}) == 2
    assert read_prompts(file, tokenizer, 2)[0].token_ids == expected[0][-2:]


def test_texts_are_cut_into_whole_pieces(tmp_path: Path) -> None:
    file = _file(tmp_path, '{"text": "w1 w2 w3 w4 w5"}\n{"text": "w6"}\n')
    texts = PretrainingTexts(file, tiny_tokenizer(), 2)
    ids = tiny_tokenizer()("w1 w2 w3 w4").input_ids
    assert sorted(texts.batch(0, 2, seed=0)) == sorted([ids[:2], ids[2:]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "w1"}\n{"prompt": 3}\n', 'line 2: "prompt"'),
        ('{"messages": []}\n', 'line 1: "prompt"'),
        ("[1]\n", "line 1: not a JSON object"),
        ("{\n", "not JSON lines"),
    ],
)
def test_a_bad_prompt_file_is_named_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FileProblem, match=message):
        read_prompts(_file(tmp_path, text), tiny_tokenizer(), 10)


def test_a_bad_text_file_is_named_with_the_field(tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match='line 1: "text"'):
        PretrainingTexts(_file(tmp_path, '{"prompt": "w1"}\n'), tiny_tokenizer(), 2)
    with pytest.raises(FileProblem, match="no text of 9 tokens"):
        PretrainingTexts(_file(tmp_path, '{"text": "w1"}\n'), tiny_tokenizer(), 9)
    with pytest.raises(FileProblem, match="can't be read"):
        PretrainingTexts(tmp_path / "absent.jsonl", tiny_tokenizer(), 2)


def test_a_batch_that_its_parts_do_not_divide_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"ppo_batch \(4\).*ppo_mini_batches \(2\)"):
        TrainingSettings(ppo_batch=4)
    assert TrainingSettings(ppo_batch=4, ppo_mini_batches=1).ppo_batch == 4
