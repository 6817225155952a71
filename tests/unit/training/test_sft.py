"""SFT: the loss is that of the response alone, and it is learned."""

from pathlib import Path

import pytest
import torch
from unit.training.tiny import tiny_model, tiny_tokenizer

from evaluation.contest import Prompt
from training.dataset import Demonstration
from training.policy import load_policy
from training.settings import TrainingSettings
from training.sft import fine_tune

# One batch of eight, with responses of different lengths.
DEMONSTRATIONS = [Demonstration(Prompt(str(i), [3, 5 + i, 6]), [7, *[8 + i] * (i % 3), 2]) for i in range(8)]


def _slow_loss(model: torch.nn.Module, demonstrations: list[Demonstration]) -> float:
    """Mean of -log p over all response tokens, one sequence and one token at a time."""
    terms = []
    for item in demonstrations:
        tokens = [*item.prompt.token_ids, *item.response]
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        terms += [-float(logprobs[t - 1, tokens[t]]) for t in range(len(item.prompt.token_ids), len(tokens))]
    return sum(terms) / len(terms)


def test_loss_is_on_the_response_only_and_falls(tmp_path: Path) -> None:
    model_dir = tiny_model(tmp_path / "policy")
    losses: list[float] = []
    tuned = fine_tune(
        model_dir,
        tiny_tokenizer(),
        DEMONSTRATIONS,
        settings=TrainingSettings(sft_epochs=20, sft_learning_rate=5e-3),
        work=tmp_path / "work",
        report=lambda step, steps, figures: losses.append(figures["loss"]),
    )
    assert len(losses) == 20
    assert losses[0] == pytest.approx(_slow_loss(load_policy(model_dir), DEMONSTRATIONS), rel=0.01)
    assert _slow_loss(tuned.eval(), DEMONSTRATIONS) < 0.2 * losses[0]
