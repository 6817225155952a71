"""The Transformers sampler: its logprobs are the model's, and it ends where the model ends."""

from pathlib import Path

import pytest
import torch
from unit.training.tiny import END, tiny_model

from evaluation.sampler import TransformersSampler
from training.logprobs import response_logprobs
from training.policy import load_policy

PROMPTS = [[3, 5, 4], [3, 7, 9, 11, 4], [3, 4]]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "policy")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_model(temperature: float, model_dir: Path) -> None:
    sampler = TransformersSampler(model_dir, batch=4)
    groups = sampler.sample(PROMPTS, n=3, max_tokens=8, temperature=temperature, seed=1)
    assert [len(group) for group in groups] == [3, 3, 3]
    model = load_policy(model_dir)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        logprobs, _ = response_logprobs(model, [(prompt, [s.token_ids for s in group])], temperature)
        ours = [value for sample in group for value in sample.logprobs]
        assert ours == pytest.approx(logprobs.tolist(), abs=0.05)


def test_responses_end_with_the_end_token_or_at_the_limit(model_dir: Path) -> None:
    groups = TransformersSampler(model_dir).sample(PROMPTS, n=30, max_tokens=20, temperature=1.0, seed=2)
    samples = [sample for group in groups for sample in group]
    for sample in samples:
        assert END not in sample.token_ids[:-1]
        assert len(sample.token_ids) == len(sample.logprobs)
        assert (sample.token_ids[-1] == END) == (sample.finish_reason == "stop")
        assert sample.finish_reason == "stop" or len(sample.token_ids) == 20
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}


def test_the_seed_decides_and_leaves_other_randomness_alone(model_dir: Path) -> None:
    sampler = TransformersSampler(model_dir)
    torch.manual_seed(5)
    untouched = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (
        sampler.sample(PROMPTS, n=2, max_tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), untouched)
    assert first == again
    assert first != other


def test_new_weights_are_taken(model_dir: Path, tmp_path: Path) -> None:
    sampler = TransformersSampler(model_dir)
    before = sampler.sample(PROMPTS, n=2, max_tokens=8, temperature=0.0, seed=1)
    sampler.load(tiny_model(tmp_path / "other", seed=3))
    assert sampler.sample(PROMPTS, n=2, max_tokens=8, temperature=0.0, seed=1) != before
