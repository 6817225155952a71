"""The PPO stage: what one update computes, that it learns, that it resumes, and TRL's shape."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.experimental.ppo import PPOConfig, PPOTrainer
from unit.training.tiny import END, WORDS, TransformersSampler, tiny_model, tiny_tokenizer

from evaluation.contest import Prompt
from evaluation.reward_model import RewardModel, autocast, score_responses
from evaluation.sampler import Sample
from training.checkpoints import Checkpoints
from training.critic import Critic
from training.episodes import Episodes
from training.logprobs import total_logprobs
from training.policy import load_policy, merged_weights, with_adapter
from training.ppo import PPO
from training.pretraining import PretrainingTexts, in_passes
from training.rollouts import Rollouts
from training.settings import TrainingSettings

SETTINGS = TrainingSettings(
    ppo_updates=3,
    ppo_batch=8,
    ppo_samples_per_prompt=2,
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
    model_dir: Path,
    work: Path,
    settings: TrainingSettings,
    reward: RewardModel | None = None,
    *,
    texts: PretrainingTexts | None = None,
    checkpoints: Checkpoints | None = None,
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
        policy=with_adapter(load_policy(model_dir), settings.ppo_lora_rank)
        if settings.ppo_lora_rank
        else load_policy(model_dir),
        tokenizer=tiny_tokenizer(),
        reward_model=reward or RewardModel.from_decoder(model_dir),
        prompts=PROMPTS,
        rollouts=rollouts,
        settings=settings,
        work=work,
        report=lambda step, steps, values: figures.append(dict(values)),
        texts=texts,
        checkpoints=checkpoints,
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


def _scored(ppo: PPO) -> Any:
    ppo._begin()
    episodes = ppo._roll_out()
    ppo._score(episodes)
    return episodes


def test_rollout_logprobs_are_the_policys_own(model_dir: Path, tmp_path: Path) -> None:
    ppo, _ = _ppo(model_dir, tmp_path / "work", SETTINGS)
    episodes = _scored(ppo)
    assert [len(episodes.prompts), len(episodes.samples)] == [4, 8]
    for row, sample in enumerate(episodes.samples):
        assert episodes.old_logprobs[row][episodes.mask[row]].tolist() == pytest.approx(sample.logprobs)
    assert 0 < episodes.logprob_gap < 0.02
    assert episodes.weights is None
    # Nothing has been learned: the reference differs by the engine's rounding only.
    assert episodes.kl().abs().max() < 0.1
    prompts = [episodes.prompts[row // 2].token_ids for row in range(8)]
    items = [(p, s.token_ids) for p, s in zip(prompts, episodes.samples, strict=True)]
    totals = total_logprobs(ppo.policy_model, items, SETTINGS.ppo_temperature)
    assert totals == pytest.approx((episodes.ref_logprobs * episodes.mask).sum(1).tolist(), abs=0.02)


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


def test_unended_and_too_short_responses_pay(model_dir: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"ppo_minimum_tokens": 4, "ppo_missing_end_penalty": 7.0})
    ppo, _ = _ppo(model_dir, tmp_path / "work", settings)
    found = set()
    for update in range(6):
        ppo.state.global_step = update
        episodes = ppo._roll_out()
        ppo._score(episodes)
        free = [
            float(score)
            for i in range(4)
            for score in score_responses(ppo.reward_model, [episodes.items([i])[0]])[0]
        ]
        for sample, score, whole in zip(episodes.samples, episodes.scores.tolist(), free, strict=True):
            pays = sample.finish_reason != "stop" or len(sample.token_ids) < 4
            found.add(pays)
            assert score == pytest.approx(whole - 7.0 * pays, abs=0.02)
    assert found == {True, False}


def test_the_critic_starts_as_the_reward_model(model_dir: Path) -> None:
    torch.manual_seed(0)
    reward_model = _random_reward_model(model_dir)
    features = torch.randn(5, 128)
    for kind in ("reward_model", "separate"):
        assert torch.allclose(Critic(reward_model, kind)(features), reward_model.score(features), atol=1e-5)
    assert not Critic(reward_model, "policy")(features).any()


def _random_reward_model(model_dir: Path) -> RewardModel:
    reward_model = RewardModel.from_decoder(model_dir, heads=2)
    torch.nn.init.normal_(reward_model.head.weight)
    reward_model.offset.copy_(torch.tensor([0.3, -0.1]))
    reward_model.scale.copy_(torch.tensor([2.5, 0.7]))
    return reward_model


@pytest.mark.parametrize("kind", ["reward_model", "policy", "separate"])
def test_values_are_those_of_the_trunk_before_each_token(kind: str, model_dir: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"ppo_critic": kind})
    ppo, _ = _ppo(model_dir, tmp_path / "work", settings, _random_reward_model(model_dir))
    torch.nn.init.normal_(ppo.value_model.score.weight)
    episodes = _scored(ppo)
    trunk = ppo.policy_model.model if kind == "policy" else ppo.reward_model.backbone
    for row, sample in enumerate(episodes.samples):
        prompt = episodes.prompts[row // 2].token_ids
        with torch.no_grad(), autocast():
            ids = torch.tensor([[*prompt, *sample.token_ids]])
            states = trunk(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
        expected = ppo.value_model.score(states.float()).squeeze(-1)
        assert torch.allclose(episodes.values[row][episodes.mask[row]], expected, atol=0.1)
    before = {name: value.clone() for name, value in ppo.value_model.state_dict().items()}
    ppo._set_advantages(episodes)
    ppo._optimise(episodes)
    moved = {
        name for name, value in ppo.value_model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert {"score.weight", "score.bias"} <= moved
    assert any(name.startswith("backbone.") for name in moved) == (kind == "separate")


VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"ppo_lora_rank": 4},
    "separate critic, average, adaptive KL": {
        "ppo_critic": "separate",
        "ppo_ema_decay": 0.5,
        "ppo_kl_target": 0.01,
    },
    "pretraining mix": {"ppo_ptx_batch": 3, "ppo_ptx_tokens": 8},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_goes_on_to_the_same_weights(variant: str, model_dir: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update=VARIANTS[variant])
    texts = _texts(tmp_path, settings) if variant == "pretraining mix" else None
    whole, all_figures = _ppo(model_dir, tmp_path / "whole", settings, texts=texts)
    whole.train()

    class KilledError(Exception):
        pass

    broken, _ = _ppo(model_dir, tmp_path / "broken", settings, texts=texts)
    end_update = broken._end_update

    def killed_after_the_checkpoint(*arguments: Any) -> None:
        end_update(*arguments)
        if broken.state.global_step == 2:
            raise KilledError

    broken._end_update = killed_after_the_checkpoint
    with pytest.raises(KilledError):
        broken.train()
    resumed, figures = _ppo(model_dir, tmp_path / "broken", settings, texts=texts)
    resumed.train()
    assert figures == all_figures[2:]  # only the update that was left
    expected = dict(merged_weights(whole.trained_policy()))
    for name, value in merged_weights(resumed.trained_policy()):
        assert torch.equal(value, expected[name]), name
    start = dict(merged_weights(load_policy(model_dir)))
    assert any(not torch.equal(value, start[name]) for name, value in expected.items())


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


def test_a_gap_beyond_the_bound_is_corrected_or_stops_the_round(model_dir: Path, tmp_path: Path) -> None:
    corrected = SETTINGS.model_copy(update={"ppo_logprob_gap": 0.0})
    ppo, figures = _ppo(model_dir, tmp_path / "corrected", corrected)
    episodes = _scored(ppo)
    assert episodes.weights is not None
    for row, sample in enumerate(episodes.samples):
        own = episodes.old_logprobs[row][episodes.mask[row]]
        engine = torch.tensor(sample.logprobs)
        assert not torch.equal(own, engine)  # now the trainer's
        assert torch.allclose(episodes.weights[row][episodes.mask[row]], (own - engine).exp(), atol=1e-6)
    ppo.train()
    assert [f["rollout/corrected"] for f in figures] == [1.0, 1.0, 1.0]
    ppo, _ = _ppo(model_dir, tmp_path / "stop", corrected.model_copy(update={"ppo_beyond_gap": "stop"}))
    with pytest.raises(RuntimeError, match="ppo_logprob_gap"):
        ppo.train()


def test_the_last_policy_within_the_kl_budget_is_taken(model_dir: Path, tmp_path: Path) -> None:
    free = SETTINGS.model_copy(
        update={"ppo_updates": 8, "ppo_learning_rate": 5e-3, "ppo_kl_coefficient": 0.0}
    )
    ppo, figures = _ppo(model_dir, tmp_path / "free", free, WordReward(RewardModel.from_decoder(model_dir)))
    ppo.train()
    kls = [f["objective/kl"] for f in figures]
    budget = sorted(kls)[4]
    stopped = next(i for i, kl in enumerate(kls) if kl > budget)
    bounded = free.model_copy(update={"ppo_kl_budget": budget})
    ppo, figures = _ppo(
        model_dir, tmp_path / "bound", bounded, WordReward(RewardModel.from_decoder(model_dir))
    )
    ppo.train()
    assert len(figures) == stopped
    assert ppo.result()["stopped_by_kl_budget"]
    shorter = free.model_copy(update={"ppo_updates": 8})
    expected, _ = _ppo(
        model_dir, tmp_path / "shorter", shorter, WordReward(RewardModel.from_decoder(model_dir))
    )
    expected._begin()
    for _ in range(stopped - 1):
        episodes = expected._roll_out()
        expected._score(episodes)
        expected._set_advantages(episodes)
        expected._end_update(episodes, expected._optimise(episodes))
    weights = dict(merged_weights(ppo.trained_policy()))
    for name, value in merged_weights(expected.policy_model):
        assert torch.equal(weights[name].to(torch.bfloat16), value.to(torch.bfloat16)), name


def test_a_step_that_is_not_finite_goes_back_to_the_checkpoint_and_halves_the_rate(
    model_dir: Path, tmp_path: Path
) -> None:
    ppo, figures = _ppo(model_dir, tmp_path / "work", SETTINGS)
    step, broken = ppo._step, [True]

    def step_or_break() -> float:
        if ppo.state.global_step == 2 and broken:
            broken.pop()
            next(iter(ppo._learning)).grad.fill_(float("nan"))
        return step()

    ppo._step = step_or_break
    ppo.train()
    assert ppo.result()["retreats"] == 1
    assert [f["lr"] for f in figures] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 6])
    assert all(torch.isfinite(parameter).all() for parameter in ppo._learning)
    ppo, _ = _ppo(model_dir, tmp_path / "hopeless", SETTINGS)

    def always_break() -> float:
        next(iter(ppo._learning)).grad.fill_(float("inf"))
        return PPO._step(ppo)

    ppo._step = always_break
    with pytest.raises(FloatingPointError, match="lower ppo_learning_rate"):
        ppo.train()


def test_the_average_of_the_weights_is_that_of_every_step(model_dir: Path, tmp_path: Path) -> None:
    ppo, _ = _ppo(model_dir, tmp_path / "work", SETTINGS.model_copy(update={"ppo_ema_decay": 0.7}))
    seen = [[parameter.detach().clone() for parameter in ppo._learning]]
    step = ppo._step

    def step_and_look() -> float:
        norm = step()
        seen.append([parameter.detach().clone() for parameter in ppo._learning])
        return norm

    ppo._step = step_and_look
    ppo.train()
    assert len(seen) == 1 + 3 * 2 * 2
    expected = seen[0]
    for weights in seen[1:]:
        expected = [0.7 * average + 0.3 * new for average, new in zip(expected, weights, strict=True)]
    ppo.trained_policy()
    for parameter, average in zip(ppo._learning, expected, strict=True):
        assert torch.allclose(parameter, average, atol=1e-6)


def test_kept_checkpoints_are_what_was_published_had_training_ended_there(
    model_dir: Path, tmp_path: Path
) -> None:
    def run(name: str, **more: Any) -> tuple[Checkpoints, Path]:
        settings = SETTINGS.model_copy(update={"ppo_updates": 6, **more})
        kept = Checkpoints(tmp_path / name / "kept", tiny_tokenizer(), 4)
        ppo, _ = _ppo(model_dir, tmp_path / name, settings, checkpoints=kept)
        ppo.train()
        return kept, tmp_path / name / "rollout"

    def weights(directory: Path) -> dict[str, torch.Tensor]:
        return dict(merged_weights(load_policy(directory)))

    kept, rollouts = run("plain")
    # Four over six updates; the last one is the candidate itself.
    assert list(kept.kept(before=6)) == [2, 3, 4]
    last = 4
    assert list(kept.kept(before=3)) == [2]
    # The engine's own checkpoint of that update is still there, and holds the same weights.
    same = weights(rollouts / f"{last:04d}")
    assert all(torch.equal(value, same[name]) for name, value in weights(kept.kept(before=6)[last]).items())
    # With an average of the weights it is the average that is kept, and training goes on undisturbed.
    averaged, rollouts = run("averaged", ppo_ema_decay=0.5)
    own, current = weights(averaged.kept(before=6)[last]), weights(rollouts / f"{last:04d}")
    assert any(not torch.equal(value, current[name]) for name, value in own.items())
    assert all(torch.equal(value, current[name]) for name, value in same.items())


def test_lora_trains_adapters_only_and_its_reference_is_the_model_without_them(
    model_dir: Path, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"ppo_lora_rank": 4, "ppo_learning_rate": 2e-2})
    ppo, figures = _ppo(model_dir, tmp_path / "work", settings)
    ppo.train()
    assert figures[-1]["objective/kl"] != 0
    plain = load_policy(model_dir)
    base = ppo.policy_model.get_base_model()
    for name, value in base.state_dict().items():
        if "lora_" not in name and name != "lm_head.weight":
            assert torch.equal(value.float(), plain.state_dict()[name.replace(".base_layer.", ".")]), name
    ppo.state.global_step = 1
    episodes = ppo._roll_out()
    ppo._score(episodes)
    items = [
        (episodes.prompts[row // 2].token_ids, sample.token_ids)
        for row, sample in enumerate(episodes.samples)
    ]
    without = (episodes.ref_logprobs * episodes.mask).sum(1).tolist()
    assert without == pytest.approx(total_logprobs(plain, items, 1.0), abs=0.02)
    # The sampler has read the merged weights, and is as near to the adapted policy as always.
    assert episodes.logprob_gap < 0.02
    assert (
        max(abs(a - b) for a, b in zip(without, total_logprobs(ppo.policy_model, items, 1.0), strict=True))
        > 0.1
    )


def _texts(tmp_path: Path, settings: TrainingSettings) -> PretrainingTexts:
    file = tmp_path / "texts.jsonl"
    lines = [{"text": " ".join(f"w{(i * j) % 59}" for j in range(1, 30))} for i in range(5)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return PretrainingTexts(file, tiny_tokenizer(), settings.ppo_ptx_tokens)


def test_the_pretraining_mix_adds_its_own_gradient(model_dir: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(
        update={"ppo_ptx_batch": 3, "ppo_ptx_tokens": 8, "ppo_ptx_coefficient": 2.5}
    )
    texts = _texts(tmp_path, settings)
    ppo, _ = _ppo(model_dir, tmp_path / "work", settings, texts=texts)
    ppo._begin()
    figures = ppo._pretraining(1)
    found = [parameter.grad.clone() for parameter in ppo._learning]
    slow = load_policy(model_dir)
    ids = torch.tensor(texts.batch(1, 3, seed=0))
    assert ids.shape == (3, 8)
    loss = slow(input_ids=ids, labels=ids).loss  # Transformers' own: the mean over all predicted tokens
    (2.5 * loss).backward()
    assert figures["loss/ptx_avg"] == pytest.approx(float(loss.detach()), rel=0.01)
    for gradient, parameter in zip(found, slow.parameters(), strict=True):
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), parameter.grad.flatten(), 0) > 0.99
        assert float(gradient.norm()) == pytest.approx(float(parameter.grad.norm()), rel=0.05)


def test_the_pretraining_mix_keeps_the_texts_likely(model_dir: Path, tmp_path: Path) -> None:
    losses = {}
    for coefficient in (0.0, 1.0):
        settings = SETTINGS.model_copy(
            update={"ppo_updates": 10, "ppo_ptx_tokens": 8, "ppo_ptx_coefficient": coefficient}
        )
        texts = _texts(tmp_path, settings)
        ppo, _ = _ppo(model_dir, tmp_path / str(coefficient), settings, texts=texts)
        ppo.train()
        ids = torch.tensor(texts.batch(0, 10, seed=1))
        losses[coefficient] = float(ppo.policy_model(input_ids=ids, labels=ids).loss.detach())
    assert losses[1.0] < losses[0.0] - 0.2


def test_passes_over_prompts_depend_on_nothing_but_the_position() -> None:
    stream = [p.key for u in range(11) for p in in_passes(PROMPTS, u * 8, 8, seed=3)]
    for sweep in range(8):
        assert sorted(stream[11 * sweep : 11 * (sweep + 1)]) == sorted(p.key for p in PROMPTS)
    assert [p.key for p in in_passes(PROMPTS, 32, 8, seed=3)] == stream[32:40]
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


def test_gold_is_what_programs_check_of_the_responses_that_have_checks() -> None:
    words = ({"kind": "max_words", "n": 2},)
    prompts = [Prompt("a", [3, 4], words), Prompt("b", [3, 5])]
    texts = ["one two", "one two three", "long long long", "also much too long"]
    samples = [Sample([7, 8], [-1.0, -1.0], text, "stop") for text in texts]
    zeros = torch.zeros(4, 2)
    episodes = Episodes(
        prompts, samples, torch.ones(4, 2, dtype=torch.bool), zeros, zeros, zeros[:, 0], zeros, returns=zeros
    )
    assert episodes.figures(0.1)["objective/gold"] == 0.5
    episodes.prompts = [Prompt("a", [3, 4]), Prompt("b", [3, 5])]
    assert "objective/gold" not in episodes.figures(0.1)
