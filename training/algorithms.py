"""How the policy learns: the configured algorithm, on one side of a round's dataset.

Owns the choice and what DPO, KTO and RLOO (all TRL's trainers) are given; PPO is `training/ppo.py`'s. Each
begins at the SFT policy, which is its reference as well, and changes the policy in place.
"""

import copy
import importlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset as HfDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.models import prepare_fsdp

from evaluation.contest import Prompt
from evaluation.reward_model import RewardModel, scores_and_spreads
from registry.precision import matrix_dtype
from training import processes
from training.checkpoints import Checkpoints, KeepCheckpoints
from training.dataset import Comparison, Side
from training.policy import Policy, with_adapter
from training.ppo import PPO, KeepSamples
from training.pretraining import PretrainingTexts, in_passes
from training.progress import ReportedLogs
from training.rater_weights import thinned
from training.reward_model import Report
from training.rollouts import Rollouts
from training.settings import TrainingSettings

# TRL 1.12.0 knows vLLM up to 0.27.1 and imports from it what later ones have no more, asked for it or not.
with mock.patch.object(
    importlib.import_module("trl.import_utils"), "is_vllm_available", lambda *_, **__: False
):
    from trl import RLOOConfig, RLOOTrainer

Row = dict[str, Any]
Result = dict[str, Any]
Reward = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[float]]
"""Prompts and one response to each, as token ids, to scores."""


@dataclass(frozen=True, slots=True)
class Task:
    """What an algorithm works with.

    `policy` is the SFT policy as `load_policy` reads it, `prompts` are what PPO and RLOO ask, `reward_model`
    is a directory that is read only where it is needed, `work` takes an algorithm's own files. `updates` is
    the number of updates where it is given: instead of the settings' (PPO, RLOO), or at most (DPO, KTO, whose
    number follows from the data). `texts` are PPO's pretraining mix, `keep_samples` takes some responses
    and `checkpoints` the policy after some of the updates.
    """

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    side: Side
    prompts: Sequence[Prompt]
    reward_model: Path
    rollouts: Rollouts
    settings: TrainingSettings
    work: Path
    report: Report
    updates: int | None = None
    texts: PretrainingTexts | None = None
    keep_samples: KeepSamples | None = None
    checkpoints: Checkpoints | None = None


class NothingToLearnFrom(ValueError):  # noqa: N818
    """The feedback has nothing that the algorithm learns from; the message says what is missing."""


def train(task: Task) -> tuple[Policy, Result]:
    """Return the policy as the configured algorithm leaves it, and what it tells of its run as plain JSON.

    Raises NothingToLearnFrom.
    """
    return {"ppo": _ppo, "rloo": _rloo, "dpo": _dpo, "kto": _kto}[task.settings.algorithm](task)


def _ppo(task: Task) -> tuple[Policy, Result]:
    settings = task.settings
    if task.updates is not None:
        settings = settings.model_copy(update={"ppo_updates": task.updates})
    policy = task.policy
    torch.manual_seed(settings.seed)  # an adapter begins the same in every process
    ppo = PPO(
        policy=with_adapter(policy, settings.ppo_lora_rank) if settings.ppo_lora_rank else policy,
        tokenizer=task.tokenizer,
        reward_model=RewardModel.load(task.reward_model, processes.loading_device()),
        prompts=task.prompts,
        rollouts=task.rollouts,
        settings=settings,
        work=task.work,
        report=task.report,
        texts=task.texts,
        keep_samples=task.keep_samples,
        checkpoints=task.checkpoints,
    )
    ppo.train()
    return ppo.trained_policy(), ppo.result()


def _rloo(task: Task) -> tuple[Policy, Result]:
    model = RewardModel.load(task.reward_model)

    def reward(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[float]:
        items = [(prompt, [response]) for prompt, response in zip(prompts, responses, strict=True)]
        found = scores_and_spreads(model, items)
        penalty = task.settings.reward_spread_penalty
        return [scores[0] - penalty * spreads[0] for scores, spreads in found]

    return rloo(task, reward)


def rloo(task: Task, reward: Reward) -> tuple[Policy, Result]:
    """RLOO: the baseline is the mean of a prompt's other responses (Ahmadian et al. 2024, arXiv 2402.14740).

    An update has the episodes of one of PPO's, as many to each of its prompts, and the same penalties for KL,
    a missing end and few tokens. Responses are sampled by Transformers in this process, as TRL does it.
    """
    settings, end = task.settings, task.tokenizer.eos_token_id
    updates = task.updates or settings.ppo_updates
    prompts_an_update = settings.ppo_batch // settings.ppo_samples_per_prompt
    # In the order of use: TRL's own shuffling leaves out what does not fill an update.
    asked = in_passes(task.prompts, 0, updates * prompts_an_update, settings.seed)

    def penalised(prompts: Any, completion_ids: Any, **_: Any) -> list[float]:
        wrong = [ids[-1] != end or len(ids) < settings.ppo_minimum_tokens for ids in completion_ids]
        return [
            score - settings.ppo_missing_end_penalty * penalty
            for score, penalty in zip(reward(prompts, completion_ids), wrong, strict=True)
        ]

    steps_an_update = settings.ppo_mini_batches * settings.ppo_epochs
    config = RLOOConfig(
        **_arguments(task, settings.ppo_learning_rate),
        max_steps=updates * steps_an_update,
        logging_steps=steps_an_update,
        per_device_train_batch_size=settings.ppo_batch // settings.ppo_mini_batches // processes.count(),
        steps_per_generation=settings.ppo_mini_batches,
        num_iterations=settings.ppo_epochs,
        num_generations=settings.ppo_samples_per_prompt,
        max_completion_length=settings.ppo_response_tokens,
        temperature=settings.ppo_temperature,
        beta=0.0,  # TRL would read the reference from disk; it is set below
        shuffle_dataset=False,
        disable_dropout=True,
    )
    trainer = _Rloo(
        model=task.policy,
        reward_funcs=penalised,
        args=config,
        train_dataset=HfDataset.from_list([{"prompt": prompt.token_ids} for prompt in asked]),
        processing_class=task.tokenizer,
        callbacks=[ReportedLogs(_by_update(task.report, steps_an_update))],
    )
    trainer.beta = settings.ppo_kl_coefficient
    reference = copy.deepcopy(task.policy)
    if trainer.is_fsdp_enabled:
        trainer.ref_model = prepare_fsdp(reference, trainer.accelerator)
    else:
        trainer.ref_model = trainer.accelerator.prepare_model(reference, evaluation_mode=True)
    policy, result = _run(trainer, task, steps_an_update)
    return policy, result | {"updates": updates}


def _dpo(task: Task) -> tuple[Policy, Result]:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290) on every pair of the rankings."""
    rows = pairs(thinned(task.side, task.settings.seed).comparisons)
    if not rows:
        raise NothingToLearnFrom("DPO learns from rankings, and there are none on the training prompts")
    return _run(
        _Dpo(
            model=task.policy,
            ref_model=copy.deepcopy(task.policy),
            args=DPOConfig(**_preference_arguments(task, len(rows)), beta=task.settings.preference_beta),
            train_dataset=HfDataset.from_list(rows),
            processing_class=task.tokenizer,
            callbacks=[ReportedLogs(task.report)],
        ),
        task,
    )


def _kto(task: Task) -> tuple[Policy, Result]:
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306) on thumbs, ratings and every pair's two responses."""
    rows = desirability(thinned(task.side, task.settings.seed))
    good = sum(row["label"] for row in rows)
    bad = len(rows) - good
    if not rows:
        raise NothingToLearnFrom("KTO learns from thumbs, ratings and rankings, and there are none to use")
    random.Random(task.settings.seed).shuffle(rows)
    rows = beside_neighbours(rows, task.settings.preference_batch)
    config = KTOConfig(
        **_preference_arguments(task, len(rows)),
        beta=task.settings.preference_beta,
        # The rarer kind weighs as much as the other in sum (the paper's equation 8).
        desirable_weight=bad / good if 0 < good < bad else 1.0,
        undesirable_weight=good / bad if 0 < bad < good else 1.0,
    )
    return _run(
        _Kto(
            model=task.policy,
            ref_model=copy.deepcopy(task.policy),
            args=config,
            train_dataset=HfDataset.from_list(rows),
            processing_class=task.tokenizer,
            callbacks=[ReportedLogs(task.report)],
        ),
        task,
    )


def pairs(comparisons: Sequence[Comparison]) -> list[Row]:
    """Every pair of a ranking as `prompt_ids`, `chosen_ids` and `rejected_ids`; ties are no pairs."""
    return [
        {"prompt_ids": item.prompt.token_ids, "chosen_ids": better, "rejected_ids": worse}
        for item in comparisons
        for better, rank in zip(item.responses, item.ranks, strict=True)
        for worse, other in zip(item.responses, item.ranks, strict=True)
        if rank < other
    ]


def desirability(side: Side) -> list[Row]:
    """Return what was judged as `prompt_ids`, `completion_ids` and `label`, whether it is desirable.

    A thumb or a rating off the middle of its scale gives one row, each pair of a ranking two.
    """
    rows = [
        {
            "prompt_ids": item.prompt.token_ids,
            "completion_ids": item.response,
            "label": item.target > 0.5,
        }
        for item in side.judgements
        if item.target != 0.5
    ]
    for pair in pairs(side.comparisons):
        for ids, label in ((pair["chosen_ids"], True), (pair["rejected_ids"], False)):
            rows.append({"prompt_ids": pair["prompt_ids"], "completion_ids": ids, "label": label})
    return rows


def beside_neighbours(rows: Sequence[Row], batch: int) -> list[Row]:
    """Add `KL_completion_ids`, the response of the row before in the same batch of `batch` rows.

    KTO estimates the policy's KL on responses that do not belong to their prompt (the paper's section 4.1);
    TRL leaves the order of rows alone for it.
    """
    found = []
    for start in range(0, len(rows), batch):
        group = rows[start : start + batch]
        for row, before in zip(group, [group[-1], *group[:-1]], strict=True):
            found.append({**row, "KL_completion_ids": before["completion_ids"]})
    return found


# TRL's trainers take texts and tokenise them; what people judged were token ids.
class _Dpo(DPOTrainer):  # type: ignore[misc]
    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class _Kto(KTOTrainer):  # type: ignore[misc]
    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class _Rloo(RLOOTrainer):  # type: ignore[misc]
    def _tokenize_prompts(self, prompts: Any) -> Any:
        return prompts, None, {}


def _preference_arguments(task: Task, rows: int) -> dict[str, Any]:
    settings = task.settings
    steps = -(-rows // settings.preference_batch) * settings.preference_epochs
    return {
        **_arguments(task, settings.preference_learning_rate),
        "max_steps": min(steps, task.updates or steps),
        "logging_steps": 1,
        "per_device_train_batch_size": max(1, settings.preference_batch // processes.count()),
        "max_length": None,
    }


def _arguments(task: Task, learning_rate: float) -> dict[str, Any]:
    return {
        "output_dir": str(task.work),
        "seed": task.settings.seed,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "gradient_checkpointing": False,
        "bf16": matrix_dtype() == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def _by_update(report: Report, steps_an_update: int) -> Report:
    return lambda step, steps, figures: report(step // steps_an_update, steps // steps_an_update, figures)


def _run(trainer: Any, task: Task, steps_an_update: int = 1) -> tuple[Policy, Result]:
    trainer.remove_callback(PrinterCallback)
    if task.checkpoints is not None:
        trainer.add_callback(
            KeepCheckpoints(
                task.checkpoints, lambda: trainer.accelerator.unwrap_model(trainer.model), steps_an_update
            )
        )
    trainer.train()
    policy: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return policy, {"updates": trainer.state.global_step}
