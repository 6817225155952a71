"""The SFT stage: TRL's SFTTrainer on what people wrote, with loss on the response only."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as HfDataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from evaluation.reward_model import DEVICE
from registry.precision import matrix_dtype
from training import processes
from training.dataset import Demonstration
from training.policy import Policy, load_policy
from training.progress import ReportedLogs
from training.reward_model import Report
from training.settings import TrainingSettings

# A batch as one row without padding, where position ids keep each demonstration to itself. Every attention of
# Transformers heeds them as long as there is no key-value cache, and SFTTrainer wants none. On a CPU it does
# not pay: attention over the longer row costs a tenth more than the padding did, a quarter of the tokens.
PACKED = DEVICE.type != "cpu"

EpochEnd = Callable[[int, float, Policy], None]
"""Called after each epoch with its number (from 1), the mean loss of its steps, and the policy as it is."""


def fine_tune(
    model_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    settings: TrainingSettings,
    work: Path,
    report: Report,
    epoch_end: EpochEnd = lambda epoch, loss, policy: None,
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
        per_device_train_batch_size=max(1, 8 // processes.count()),
        gradient_checkpointing=False,
        bf16=matrix_dtype() == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not finite is to be seen, and ends the stage
        report_to=[],
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        padding_free=PACKED,
        max_length=None,
    )
    trainer = SFTTrainer(
        model=load_policy(model_dir, processes.loading_device()),
        args=config,
        train_dataset=HfDataset.from_list([_row(item) for item in demonstrations]),
        processing_class=tokenizer,
        callbacks=[ReportedLogs(report), _Epochs(epoch_end)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def checkpoint_epochs(epochs: int, count: int) -> list[int]:
    """Return the epochs (from 1) to keep a checkpoint of: `count` evenly spread, the last among them."""
    count = min(epochs, count)
    return [round(epochs * k / count) for k in range(1, count + 1)]


def _row(item: Demonstration) -> dict[str, list[int]]:
    prompt, response = item.prompt.token_ids, item.response
    return {"input_ids": [*prompt, *response], "labels": [*[-100] * len(prompt), *response]}


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Tells of each epoch's end."""

    def __init__(self, epoch_end: EpochEnd) -> None:
        self._epoch_end = epoch_end
        self._losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Remember the loss of a step."""
        if logs and "loss" in logs:
            self._losses.append(float(logs["loss"]))

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Tell, and begin the next epoch's mean."""
        self._epoch_end(round(state.epoch), sum(self._losses) / len(self._losses), model)
        self._losses.clear()
