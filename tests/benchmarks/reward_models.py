"""Held-out accuracy of reward models on public preferences, beside length and published figures.

The model is fitted to HH-RLHF helpful-base (`hh`) and QA-Feedback (`qa`, K = 4), each split by prompt as a
round splits it, and measured on their held-out prompts and on `llmbar` and `hhh`; `curve` also fits to an
eighth, a quarter and a half of it. All is bounded by `--train` and `--test` rankings a set. Prints JSON.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from evaluation.reward_model import RewardModel
from instructloop import model
from tests.benchmarks import ranked_data
from training.dataset import Comparison, Dataset, Side
from training.progress import Progress
from training.reward_model import fit
from training.reward_quality import measure
from training.settings import TrainingSettings

SETTINGS = TrainingSettings(
    reward_epochs=1, reward_learning_rate=2e-5, reward_batch=16, prompt_tokens=256, response_tokens=256
)
SETS = ("hh", "qa", "llmbar", "hhh", "curve")
# Accuracies that others report: RewardBench's preference sets, as the data's README cites them.
PUBLISHED = {
    "mt_bench": {
        "oasst-rm-2.1-pythia-1.4b": 0.68,
        "reward-model-deberta-v3-large-v2": [0.61, 0.68],
        "the longer answer, whole texts": 0.70,
    },
    "llmeval2": {"the longer answer, whole texts": 0.61},
    "hhh": {"oasst-rm-2.1-pythia-1.4b": 0.69, "reward-model-deberta-v3-large-v2": [0.82, 0.96]},
}


def main() -> None:
    """Run the benchmark once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", default=SETS, help=f"of {', '.join(SETS)}; default: all")
    parser.add_argument("--train", type=int, default=1200, help="rankings of a set to fit to, at most")
    parser.add_argument("--test", type=int, default=500, help="rankings of a set to measure on, at most")
    parser.add_argument("--heads", type=int, default=SETTINGS.reward_heads)
    options = parser.parse_args()
    if unknown := set(options.sets) - set(SETS):
        parser.error(f"no such set: {', '.join(sorted(unknown))}")
    print(json.dumps(Bench(options).run(options.sets), indent=1))


class Bench:
    """The sets, cut to the budget, and the models fitted to them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._settings = SETTINGS.model_copy(update={"reward_heads": options.heads})
        self._directory = model.ensure_default_model(ranked_data.ROOT / ".instructloop" / "test-model")
        self._tokenizer = AutoTokenizer.from_pretrained(str(self._directory))

    def run(self, sets: Sequence[str]) -> dict[str, Any]:
        """Fit to what hh and qa have for training, or to parts of it, and measure on each of the sets."""
        hh, qa = self._split(ranked_data.hh_rlhf()), self._split(ranked_data.qa_feedback())
        tests = {"hh": hh.held_out.comparisons, "qa": qa.held_out.comparisons}
        for name, read in (("llmbar", ranked_data.llmbar), ("hhh", ranked_data.hhh_alignment)):
            tests[name] = self._cut(ranked_data.all_comparisons(read(), self._tokenizer, self._settings))
        tests = {name: test for name, test in tests.items() if name in sets}
        fitted = []
        for part in (8, 4, 2, 1) if "curve" in sets else (1,):
            train = [c for of in (hh.train, qa.train) for c in of.comparisons[: len(of.comparisons) // part]]
            fitted.append(self._fitted(train, tests))
        return {"published": PUBLISHED, "fitted": fitted}

    def _split(self, records: list[ranked_data.Record]) -> Dataset:
        data = ranked_data.dataset(records, self._tokenizer, self._settings)
        data.train.comparisons = self._cut(data.train.comparisons, self._options.train)
        data.held_out.comparisons = self._cut(data.held_out.comparisons)
        return data

    def _cut(self, comparisons: list[Comparison], most: int | None = None) -> list[Comparison]:
        most = self._options.test if most is None else most
        return random.Random(self._settings.seed).sample(comparisons, min(most, len(comparisons)))

    def _fitted(self, train: list[Comparison], tests: dict[str, list[Comparison]]) -> dict[str, Any]:
        """Fit to `train`; return the cost and the quality on each of the tests."""
        torch.manual_seed(self._settings.seed)
        reward_model = RewardModel.from_decoder(self._directory, self._settings.reward_heads)
        wall, cpu = time.monotonic(), time.process_time()
        with Progress("reward_model", lambda step, figures: None) as report:
            fit(reward_model, Side(comparisons=train), self._settings, report)
        cost = {"wall_seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
        quality = {name: measure(reward_model, test).figures() for name, test in tests.items()}
        for name, figures in quality.items():
            print(f"{len(train)} rankings, {name}: {figures['held_out_accuracy']}", file=sys.stderr)
        return {"train": len(train), "heads": self._settings.reward_heads, **cost, "on": quality}


if __name__ == "__main__":
    main()
