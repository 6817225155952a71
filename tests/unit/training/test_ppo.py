"""The PPO stage: what one update computes, that it learns, that it resumes, and TRL's shape."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.experimental.ppo import PPOConfig, PPOTrainer
from unit.training.tiny import END, WORDS, TransformersSampler, tiny_model, tiny_tokenizer

from evaluation.contest import Prompt
from evaluation.reward_model import RewardModel
from training.logprobs import total_logprobs
from training.ppo import PPO, Critic
from training.rollouts import Rollouts, load_policy, prompts_of_update
from training.settings import TrainingSettings

SETTINGS = TrainingSettings(
    ppo_updates=3,
    ppo_batch=8,
    ppo_mini_batches=2,
    ppo_response_tokens=6,
    ppo_learning_rate=1e-3,
    ppo_checkpoint_updates=2,
)
PROMPTS = [Prompt(str(i), [3, 5 + i, 6 + i, 4]) for i in range(11)]


class WordReward(RewardModel):
    """Scores a response by the share of `w7` and the end token, whatever the trunk says."""

    def __init__(self, trunk: RewardModel) -> None:
        super().__init__(trunk.backbone)

    def hidden(self, rows: Any) -> torch.Tensor:
        self._rows = rows
        return super().hidden(rows)

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        wanted = WORDS.index("w7")
        scores = []
        for row, spans in enumerate(self._rows.spans):
            for start, end in spans:
                response = self._rows.input_ids[row, start:end].tolist()
                scores.append(4 * response.count(wanted) / len(response))
        return torch.tensor(scores)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "policy")


def _ppo(
    model_dir: Path, work: Path, settings: TrainingSettings, reward: RewardModel | None = None
) -> tuple[PPO, list[Mapping[str, float]]]:
    torch.manual_seed(0)
    figures: list[Mapping[str, float]] = []
    rollouts = Rollouts(
        TransformersSampler(model_dir),
        tiny_tokenizer(),
        work / "rollout",
        max_tokens=settings.ppo_response_tokens,
        temperature=settings.ppo_temperature,
    )
    ppo = PPO(
        policy=load_policy(model_dir),
        tokenizer=tiny_tokenizer(),
        reward_model=reward or RewardModel.from_decoder(model_dir),
        prompts=PROMPTS,
        rollouts=rollouts,
        settings=settings,
        work=work,
        report=lambda step, steps, values: figures.append(dict(values)),
    )
    return ppo, figures


def test_ppo_raises_the_reward_it_is_given(model_dir: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(
        update={"ppo_updates": 30, "ppo_batch": 32, "ppo_learning_rate": 5e-3, "ppo_kl_coefficient": 0.0}
    )
    reward = WordReward(RewardModel.from_decoder(model_dir))
    ppo, figures = _ppo(model_dir, tmp_path / "work", settings, reward)
    ppo.train()
    scores = [f["objective/scores"] for f in figures]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 1.0


def test_a_kl_penalty_holds_the_policy_back(model_dir: Path, tmp_path: Path) -> None:
    final = {}
    for beta in (0.0, 5.0):
        settings = SETTINGS.model_copy(
            update={"ppo_updates": 12, "ppo_batch": 16, "ppo_learning_rate": 5e-3, "ppo_kl_coefficient": beta}
        )
        reward = WordReward(RewardModel.from_decoder(model_dir))
        ppo, figures = _ppo(model_dir, tmp_path / str(beta), settings, reward)
        ppo.train()
        final[beta] = sum(f["objective/kl"] for f in figures[-4:])
    assert final[5.0] < 0.5 * final[0.0]


def test_rollout_logprobs_are_the_policys_own(model_dir: Path, tmp_path: Path) -> None:
    ppo, _ = _ppo(model_dir, tmp_path / "work", SETTINGS)
    ppo._begin()
    episodes = ppo._roll_out()
    # bfloat16 weights in the rollout checkpoint against mixed precision over float32 weights
    for row, sample in enumerate(episodes.samples):
        assert episodes.old_logprobs[row][episodes.mask[row]].tolist() == pytest.approx(
            sample.logprobs, abs=0.05
        )
    assert 0 < episodes.logprob_gap < 0.02
    assert torch.equal(episodes.ref_logprobs, episodes.old_logprobs)  # nothing has been learned yet
    items = [(p.token_ids, s.token_ids) for p, s in zip(episodes.prompts, episodes.samples, strict=True)]
    totals = total_logprobs(ppo.policy_model, items, SETTINGS.ppo_temperature)
    assert totals == pytest.approx((episodes.ref_logprobs * episodes.mask).sum(1).tolist(), abs=0.05)


def test_the_end_token_is_part_of_the_episode(model_dir: Path, tmp_path: Path) -> None:
    ppo, _ = _ppo(model_dir, tmp_path / "work", SETTINGS)
    ppo._begin()
    found = 0
    for update in range(6):
        ppo.state.global_step = update
        episodes = ppo._roll_out()
        for row, sample in enumerate(episodes.samples):
            assert int(episodes.mask[row].sum()) == len(sample.token_ids)
            if sample.finish_reason == "stop":
                found += 1
                assert sample.token_ids[-1] == END
    assert found > 0


def test_the_critic_starts_as_the_reward_model(model_dir: Path) -> None:
    torch.manual_seed(0)
    reward_model = RewardModel.from_decoder(model_dir, heads=2)
    torch.nn.init.normal_(reward_model.head.weight)
    reward_model.offset.copy_(torch.tensor([0.3, -0.1]))
    reward_model.scale.copy_(torch.tensor([2.5, 0.7]))
    features = torch.randn(5, 128)
    assert torch.allclose(Critic(reward_model)(features), reward_model.score(features), atol=1e-5)


def test_a_killed_run_goes_on_to_the_same_weights(model_dir: Path, tmp_path: Path) -> None:
    whole, _ = _ppo(model_dir, tmp_path / "whole", SETTINGS)
    whole.train()

    class KilledError(Exception):
        pass

    broken, _ = _ppo(model_dir, tmp_path / "broken", SETTINGS)
    end_update = broken._end_update

    def killed_after_the_checkpoint(*arguments: Any) -> None:
        end_update(*arguments)
        if broken.state.global_step == 2:
            raise KilledError

    broken._end_update = killed_after_the_checkpoint
    with pytest.raises(KilledError):
        broken.train()
    resumed, figures = _ppo(model_dir, tmp_path / "broken", SETTINGS)
    resumed.train()
    assert len(figures) == 1  # only the update that was left
    for (name, a), b in zip(
        whole.policy_model.state_dict().items(), resumed.policy_model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_an_engine_with_other_weights_stops_the_round(model_dir: Path, tmp_path: Path) -> None:
    ppo, _ = _ppo(model_dir, tmp_path / "work", SETTINGS)
    other = TransformersSampler(tiny_model(tmp_path / "other", seed=9))
    with torch.no_grad():
        for parameter in other._model.parameters():
            parameter.mul_(3)
    other.load = lambda model_dir: None  # type: ignore[method-assign]
    ppo._rollouts._sampler = other
    with pytest.raises(RuntimeError, match="other weights"):
        ppo.train()


def test_prompts_of_an_update_depend_on_nothing_but_its_number() -> None:
    stream = [p.key for u in range(11) for p in prompts_of_update(PROMPTS, u, 8, seed=3)]
    for sweep in range(8):
        assert sorted(stream[11 * sweep : 11 * (sweep + 1)]) == sorted(p.key for p in PROMPTS)
    assert [p.key for p in prompts_of_update(PROMPTS, 4, 8, seed=3)] == stream[32:40]
    assert stream[:11] != stream[11:22]


def test_trl_still_has_the_shape_that_we_build_on() -> None:
    parameters = list(inspect.signature(PPOTrainer.__init__).parameters)
    assert parameters == [
        "self",
        "args",
        "processing_class",
        "model",
        "ref_model",
        "reward_model",
        "train_dataset",
        "value_model",
        "data_collator",
        "eval_dataset",
        "optimizers",
        "callbacks",
        "peft_config",
    ]
    assert {
        "kl_coef",
        "cliprange",
        "cliprange_value",
        "vf_coef",
        "gamma",
        "lam",
        "missing_eos_penalty",
    } <= set(PPOConfig.__dataclass_fields__)
    assert inspect.getsource(PPOTrainer.train).count("\n") > 300  # the one function that our step replaces
