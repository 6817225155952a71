"""One epoch of our reward-model fit against TRL's unmodified RewardTrainer on the same pairs.

Rankings of K = 4 (QA-Feedback) and K = 7 (UKPConvArg1's human rankings in groups of seven). We pack a prompt
with its K responses in one row and take all pairs from their K scores; TRL knows pairs only, so that each of
the C(K, 2) is two rows. Same start, attention, precision (bfloat16 autocast over float32 weights), learning
rate and number of prompts a step; each run is a process of its own, ours and TRL's by turns, so that peak
memory is each one's. An epoch ends with its last step; the whole fit has our pass that standardises scores
in it, which is bounded and which TRL has not. Prints JSON; `make bench-rm`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as HfDataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from evaluation.comparison import clustered_mean, paired_difference
from evaluation.reward_model import ATTENTION, DEVICE, RewardModel, score_responses
from instructloop import model, processes
from tests.benchmarks import ranked_data
from training.dataset import Comparison, Side
from training.reward_model import fit
from training.reward_quality import pair_outcomes
from training.settings import TrainingSettings

BATCH = 4
SETTINGS = TrainingSettings(
    reward_epochs=1,
    reward_learning_rate=3e-5,
    reward_batch=BATCH,
    prompt_tokens=128,
    response_tokens=96,
)
PAIRS_A_PASS = 4
"""About 1,000 tokens a pass, as in our fit."""
COSTS = ("cpu_seconds", "wall_seconds", "whole_fit_cpu_seconds", "whole_fit_wall_seconds", "peak_rss_gib")


@dataclass(frozen=True, slots=True)
class Split:
    """Rankings to fit to and to measure on."""

    train: list[Comparison]
    test: list[Comparison]


def main() -> None:
    """Run the benchmark, or with `--run` one of the runs that it is made of."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts-4", type=int, default=64, help="rankings of four to fit to")
    parser.add_argument("--prompts-7", type=int, default=20, help="rankings of seven to fit to")
    parser.add_argument("--test", type=int, default=60, help="rankings to measure on, at most")
    parser.add_argument("--repeats", type=int, default=1, help="how often each is run, by turns")
    parser.add_argument("--run", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--k", type=int, choices=(4, 7), help=argparse.SUPPRESS)
    options = parser.parse_args()
    directory = model.ensure_default_model(ranked_data.ROOT / ".instructloop" / "test-model")
    if options.run:
        split = _split(options, directory)
        print(json.dumps(_ours(split, directory) if options.run == "ours" else _trl(split, directory)))
        return
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "prompts_a_step": BATCH}
    for k in (4, 7):
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
        for _ in range(options.repeats):
            for name, made in runs.items():
                made.append(_run_alone(name, k))
        found[f"K={k}"] = _compared(runs["ours"], runs["trl"])
    print(json.dumps(found, indent=1))


def _run_alone(name: str, k: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.reward_model_against_trl", *sys.argv[1:]]
    done = subprocess.run(
        [*command, "--run", name, "--k", str(k)],
        env=processes.environment(os.environ),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"K={k} {name}: " + ", ".join(f"{cost} {found[cost]:.1f}" for cost in COSTS), file=sys.stderr)
    return found


def _compared(ours: list[dict[str, Any]], trl: list[dict[str, Any]]) -> dict[str, Any]:
    """Set the quickest run of each side by side; the outcomes are the same in every run."""

    def least(runs: list[dict[str, Any]], name: str) -> float:
        return min(float(run[name]) for run in runs)

    clusters, mine, theirs = ours[0]["clusters"], ours[0]["outcomes"], trl[0]["outcomes"]
    return {
        "rankings": ours[0]["rankings"],
        "pairs": trl[0]["pairs"],
        "ours": {name: least(ours, name) for name in COSTS}
        | {"accuracy": clustered_mean(clusters, mine).figures()},
        "trl": {name: least(trl, name) for name in COSTS}
        | {"accuracy": clustered_mean(clusters, theirs).figures()},
        "times_faster": {name: least(trl, name) / least(ours, name) for name in COSTS[:4]},
        "accuracy_difference": paired_difference(clusters, theirs, mine).figures(),
        "longer_accuracy": clustered_mean(clusters, ours[0]["longer"]).figures(),
    }


def _split(options: argparse.Namespace, directory: Path) -> Split:
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    if options.k == 4:
        data = ranked_data.dataset(ranked_data.qa_feedback(), tokenizer, SETTINGS)
        return Split(data.train.comparisons[: options.prompts_4], data.held_out.comparisons[: options.test])
    # A debate is measured on with both its sides or not at all.
    debates = ranked_data.ukp_convincing()
    held_out = set(sorted({name.split("_")[0] for name in debates})[::3])
    sides: dict[bool, list[ranked_data.Record]] = {True: [], False: []}
    # The first ranking of each side, then the second of each: few rankings are of many debates all the same.
    for number in range(max(map(len, debates.values()))):
        for name, records in debates.items():
            sides[name.split("_")[0] in held_out] += records[number : number + 1]
    train = ranked_data.all_comparisons(sides[False][: options.prompts_7], tokenizer, SETTINGS)
    return Split(train, ranked_data.all_comparisons(sides[True][: options.test], tokenizer, SETTINGS))


def _ours(split: Split, directory: Path) -> dict[str, Any]:
    torch.manual_seed(SETTINGS.seed)
    reward_model = RewardModel.from_decoder(directory, SETTINGS.reward_heads)
    side, watch = Side(comparisons=split.train), Watch()
    fit(reward_model, side, SETTINGS, lambda *_: watch.step())
    return watch.costs() | _outcomes(reward_model, split)


def _trl(split: Split, directory: Path) -> dict[str, Any]:
    torch.manual_seed(SETTINGS.seed)
    pairs = [
        {
            "chosen_ids": [*item.prompt.token_ids, *item.responses[i]],
            "rejected_ids": [*item.prompt.token_ids, *item.responses[j]],
        }
        for item in split.train
        for i, better in enumerate(item.ranks)
        for j, worse in enumerate(item.ranks)
        if better < worse
    ]
    classifier = AutoModelForSequenceClassification.from_pretrained(
        str(directory), num_labels=1, dtype=torch.float32, attn_implementation=ATTENTION
    )
    # As many pairs a step as our prompts a step have on average.
    passes = max(1, round(len(pairs) / len(split.train) * BATCH / PAIRS_A_PASS))
    with tempfile.TemporaryDirectory() as work:
        trainer = RewardTrainer(
            model=classifier,
            args=RewardConfig(
                output_dir=work,
                seed=SETTINGS.seed,
                num_train_epochs=1,
                learning_rate=SETTINGS.reward_learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=1,
                per_device_train_batch_size=PAIRS_A_PASS,
                gradient_accumulation_steps=passes,
                gradient_checkpointing=False,
                bf16=True,
                use_cpu=DEVICE.type == "cpu",
                max_length=None,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=HfDataset.from_list(pairs),
            processing_class=AutoTokenizer.from_pretrained(str(directory)),
        )
        watch = Watch()
        trainer.train()
        watch.step()
        cost = watch.costs()
    # Its trunk and head in our module, so that both are measured by the same code.
    reward_model = RewardModel(classifier.model, 1)
    with torch.no_grad():
        reward_model.head.weight.copy_(classifier.score.weight)
    return cost | {"pairs": len(pairs)} | _outcomes(reward_model, split)


class Watch:
    """Takes the time of a fit from when it is made: up to the last step, and up to when it is asked."""

    def __init__(self) -> None:
        self._start = self._last = (time.process_time(), time.monotonic())

    def step(self) -> None:
        """Note that a step has ended."""
        self._last = (time.process_time(), time.monotonic())

    def costs(self) -> dict[str, float]:
        """Return what COSTS names."""
        (cpu, wall), (last_cpu, last_wall) = self._start, self._last
        return {
            "cpu_seconds": last_cpu - cpu,
            "wall_seconds": last_wall - wall,
            "whole_fit_cpu_seconds": time.process_time() - cpu,
            "whole_fit_wall_seconds": time.monotonic() - wall,
            "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }


def _outcomes(reward_model: RewardModel, split: Split) -> dict[str, Any]:
    """Outcome of each held-out pair with its cluster: the prompt."""
    scores = score_responses(reward_model, [(item.prompt.token_ids, item.responses) for item in split.test])
    clusters, outcomes, longer = [], [], []
    for item, own in zip(split.test, scores, strict=True):
        mine = pair_outcomes(own, item.ranks)
        outcomes += mine
        longer += pair_outcomes([float(len(response)) for response in item.responses], item.ranks)
        clusters += [item.prompt.key] * len(mine)
    return {"rankings": len(split.train), "clusters": clusters, "outcomes": outcomes, "longer": longer}


if __name__ == "__main__":
    main()
