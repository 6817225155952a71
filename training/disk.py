"""What a round takes of the disk, and what is kept of it.

Owns the estimate that a round is refused on, and the deletion of a round's files; which rounds are kept is
decided by `training/trainer.py`.
"""

import math
import shutil
from collections.abc import Collection
from pathlib import Path

from safetensors import safe_open

from training.round import MODELS, RoundRefused
from training.settings import TrainingSettings
from training.trackers import TRACKING

_TO_SPARE = 1.1


def tidy(root: Path, keep_models: Collection[int | None]) -> None:
    """Delete the working files of all rounds below `root`, and the models of those not in `keep_models`.

    No round may be running. Results and samples, which are small, stay; so does what trackers wrote.
    """
    for directory in root.glob("[0-9]*"):
        kept = {TRACKING, *(MODELS if int(directory.name) in keep_models else ())}
        for path in directory.iterdir():
            if path.is_dir() and path.name not in kept:
                shutil.rmtree(path)


def check_space(root: Path, parent: Path, settings: TrainingSettings) -> None:
    """Raise RoundRefused where there is too little free space below `root` for a round.

    `parent` is the directory of the version that it starts from.
    """
    needed = _TO_SPARE * weights_a_round(settings) * 2 * _parameters(parent)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise RoundRefused(
            f"a round from {parent.name} takes up to {needed / 2**30:.1f} GiB of disk and {root} has "
            f"{free / 2**30:.1f} GiB free: free some, or lower training.keep_rounds and keep_versions"
        )


def weights_a_round(settings: TrainingSettings) -> int:
    """How much a round has on disk at most, in multiples of the policy's weights in bfloat16.

    The SFT policy, two rollouts' and the candidate (4), two reward models in float32 (4), and twice PPO's
    checkpoint, while one replaces the other: weights in float32 with Adam's two moments (6), their average
    (2), and as much for a critic with a trunk of its own. Adapters weigh next to nothing. Each checkpoint of
    the policy but the last, which is the candidate, adds 1.
    """
    checkpoint = 0 if settings.ppo_lora_rank else 6
    checkpoint += 2 if settings.ppo_ema_decay and not settings.ppo_lora_rank else 0
    checkpoint += 6 if settings.ppo_critic == "separate" else 0
    kept = settings.ppo_checkpoints
    if settings.algorithm in ("ppo", "rloo"):
        kept = min(kept, settings.ppo_updates)
    return 8 + max(0, kept - 1) + 2 * checkpoint


def _parameters(directory: Path) -> int:
    """How many weights the checkpoint holds."""
    count = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count
