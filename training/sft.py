"""The SFT stage: TRL's SFTTrainer on what people wrote, with loss on the response only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as HfDataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from training.dataset import Demonstration
from training.policy import load_policy
from training.reward_model import Report
from training.settings import TrainingSettings


def fine_tune(
    model_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    settings: TrainingSettings,
    work: Path,
    report: Report,
) -> Any:
    """Return the policy of `model_dir` fine-tuned on the demonstrations, in float32.

    `work` takes the trainer's own files; nothing there has to be kept.
    """
    config = SFTConfig(
        output_dir=str(work),
        seed=settings.seed,
        num_train_epochs=settings.sft_epochs,
        learning_rate=settings.sft_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        per_device_train_batch_size=8,
        gradient_checkpointing=False,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not finite is to be seen, and ends the stage
        report_to=[],
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    trainer = SFTTrainer(
        model=load_policy(model_dir),
        args=config,
        train_dataset=HfDataset.from_list([_row(item) for item in demonstrations]),
        processing_class=tokenizer,
        callbacks=[_Progress(report)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def _row(item: Demonstration) -> dict[str, list[int]]:
    prompt, response = item.prompt.token_ids, item.response
    return {"input_ids": [*prompt, *response], "labels": [*[-100] * len(prompt), *response]}


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Hands the trainer's logged figures on."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Report the loss of a step; the closing summary has none."""
        if logs and "loss" in logs:
            self._report(state.global_step, state.max_steps, {"loss": float(logs["loss"])})
