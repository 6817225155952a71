"""SFT: the loss is that of the response alone, and it is learned."""

import itertools
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from unit.training.tiny import tiny_model, tiny_tokenizer

from evaluation.contest import Prompt
from training.dataset import Demonstration
from training.policy import load_policy
from training.settings import TrainingSettings
from training.sft import _row, checkpoint_epochs, fine_tune

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


@pytest.mark.parametrize("packed", [False, True])
def test_loss_is_on_the_response_only_and_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr("training.sft.PACKED", packed)
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


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_demonstrations_do_not_see_each_other(tmp_path: Path, attention: str) -> None:
    """TRL vouches for this with flash attention only; we rely on it with every other."""
    model = LlamaForCausalLM.from_pretrained(
        tiny_model(tmp_path / "policy"), dtype=torch.float32, attn_implementation=attention
    )
    packed = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([*map(_row, DEMONSTRATIONS)])
    assert packed["input_ids"].shape[0] == 1
    alone = [*map(_row, DEMONSTRATIONS)]
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in alone])
        found = model(**packed, use_cache=False)
        blind = model(input_ids=packed["input_ids"], use_cache=False).logits[0]
    assert torch.allclose(found.logits[0], expected, atol=1e-5)
    assert float(found.loss) == pytest.approx(_slow_loss(model, DEMONSTRATIONS), rel=1e-5)
    assert (blind - expected).abs().max() > 0.1  # so they would be seen, if position ids did not tell


def test_packing_changes_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(packed: bool) -> list[float]:
        monkeypatch.setattr("training.sft.PACKED", packed)
        found: list[float] = []
        fine_tune(
            tiny_model(tmp_path / "policy"),
            tiny_tokenizer(),
            DEMONSTRATIONS * 2,
            settings=TrainingSettings(sft_epochs=10, sft_learning_rate=3e-3),
            work=tmp_path / "work",
            report=lambda step, steps, figures: found.append(figures["loss"]),
        )
        return found

    padded, packed = losses(False), losses(True)
    assert packed[-1] < 0.5 * packed[0]
    assert packed == pytest.approx(padded, rel=0.03)  # they round differently in bfloat16


def test_each_epoch_is_told_with_its_loss_and_its_weights(tmp_path: Path) -> None:
    model_dir = tiny_model(tmp_path / "policy")
    demonstrations = DEMONSTRATIONS * 2  # two steps an epoch
    losses: list[float] = []
    epochs: list[tuple[int, float, torch.Tensor]] = []
    tuned = fine_tune(
        model_dir,
        tiny_tokenizer(),
        demonstrations,
        settings=TrainingSettings(sft_epochs=3, sft_learning_rate=5e-3),
        work=tmp_path / "work",
        report=lambda step, steps, figures: losses.append(figures["loss"]),
        epoch_end=lambda epoch, loss, policy: epochs.append(
            (epoch, loss, policy.lm_head.weight.detach().clone())
        ),
    )
    assert [epoch for epoch, _, _ in epochs] == [1, 2, 3]
    assert [loss for _, loss, _ in epochs] == pytest.approx([sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)])
    assert torch.equal(epochs[2][2], tuned.lm_head.weight)
    assert not torch.equal(epochs[1][2], epochs[2][2])


def test_checkpoints_are_spread_over_the_epochs() -> None:
    for epochs, count in itertools.product(range(1, 40), range(1, 9)):
        kept = checkpoint_epochs(epochs, count)
        assert len(set(kept)) == len(kept) == min(epochs, count)
        assert kept == sorted(kept)
        assert kept[-1] == epochs
        gaps = [after - before for before, after in itertools.pairwise([0, *kept])]
        assert max(gaps) - min(gaps) <= 1
