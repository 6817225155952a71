"""What PPO gains over the policy it starts from, by a gold preference that it never sees, and what it costs.

The gold preference is a program's: how well an answer keeps to a house style (a bulleted list, of at most 30
words, without commas). The start is the default instruction model. Per seed: the engine answers the demo's
training instructions four times each, the answers are ranked by the gold preference, a reward model is fitted
to these rankings, and PPO runs on the same prompts, with and without the reward model's ensemble of heads and
with and without the pretraining mix. Then start and candidate answer held-out instructions, and HellaSwag
shows what was unlearned (INSTRUCTLOOP_DATA, by default ../shared/data). Prints JSON. Run it with
`make bench-quality`; about an hour on two cores for three seeds.
"""

import argparse
import gzip
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from evaluation.checks import share_satisfied
from evaluation.comparison import clustered_mean, outcome, win_rate
from evaluation.contest import Prompt
from evaluation.reward_model import RewardModel, rows_by_tokens
from evaluation.sampler import Sample, VllmSampler
from instructloop import model
from instructloop.demo_instructions import held_out, training
from training.dataset import Comparison, Side
from training.logprobs import response_logprobs
from training.policy import Policy, load_policy, write_checkpoint
from training.ppo import PPO
from training.pretraining import PretrainingTexts
from training.progress import Progress
from training.reward_model import fit
from training.reward_quality import accuracy_by_source
from training.rollouts import Rollouts
from training.settings import TrainingSettings

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("INSTRUCTLOOP_DATA", ROOT.parent / "shared" / "data"))
STYLE = ({"kind": "bullet_list", "n": 2}, {"kind": "max_words", "n": 30}, {"kind": "no_commas"})
TOKENS = 48
SETTINGS = TrainingSettings(ppo_learning_rate=3e-5, ppo_response_tokens=TOKENS)
VARIANTS: dict[str, dict[str, Any]] = {
    "one head": {"reward_heads": 1},
    "ensemble": {},
    "ensemble, pretraining mix": {"ppo_ptx_coefficient": 1.0},
}
HELLASWAG_ITEMS = 300
RANKED, MEASURED = 4, 4


def main() -> None:
    """Run all seeds and variants and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    needed = [DATA / "hellaswag" / "val_sample.jsonl.gz", DATA / "qa-feedback" / "dev_feedback.jsonl.gz"]
    for file in needed:
        if not file.exists():
            sys.exit(f"{file} is absent: set INSTRUCTLOOP_DATA to the folder of the data sets")
    Bench(model.ensure_default_model(ROOT / ".instructloop" / "test-model"), *needed).run(seeds)


class Bench:
    """One start policy, one engine, all seeds and variants."""

    def __init__(self, start: Path, hellaswag: Path, texts: Path) -> None:
        self._start = start
        self._tokenizer = AutoTokenizer.from_pretrained(str(start))
        self._train, self._held_out = (self._prompts(of) for of in (training(), held_out()))
        self._items = _rows(hellaswag)[:HELLASWAG_ITEMS]
        self._text_rows = _rows(texts)
        self._sampler = VllmSampler(start, max_model_len=512, kv_cache_gib=0.5)
        self._reward_models: dict[tuple[int, int], RewardModel] = {}

    def run(self, seeds: int) -> None:
        start = {"hellaswag": self._hellaswag(load_policy(self._start)).figures()}
        results: dict[str, Any] = {"start": start}
        print(json.dumps(results), file=sys.stderr, flush=True)
        outcomes: dict[str, list[tuple[str, float]]] = {name: [] for name in VARIANTS}
        with tempfile.TemporaryDirectory() as directory:
            texts = self._texts(Path(directory))
            for seed in range(seeds):
                side, unseen = self._rankings(seed)
                before = self._answers(self._start, seed)
                for name, changes in VARIANTS.items():
                    work = Path(directory) / f"{seed}-{name}"
                    found = self._variant(
                        changes, seed=seed, side=side, unseen=unseen, before=before, texts=texts, work=work
                    )
                    outcomes[name] += found.pop("outcomes")
                    results.setdefault(name, []).append(found)
                    print(json.dumps({name: found}), file=sys.stderr, flush=True)
        for name, pairs in outcomes.items():
            rate = win_rate([key for key, _ in pairs], [value for _, value in pairs])
            results[f"{name}: gold win rate over the start, all seeds"] = rate.figures()
        print(json.dumps(results, indent=1))
        self._sampler.close()

    def _variant(
        self,
        changes: dict[str, Any],
        *,
        seed: int,
        side: Side,
        unseen: Sequence[Comparison],
        before: list[list[Sample]],
        texts: PretrainingTexts,
        work: Path,
    ) -> dict[str, Any]:
        settings = SETTINGS.model_copy(update={"seed": seed, **changes})
        reward_model = self._reward_model(side, settings)
        accuracy = accuracy_by_source(reward_model, unseen)["gold"]
        start = time.process_time()
        figures: list[dict[str, float]] = []
        ppo = PPO(
            policy=load_policy(self._start),
            tokenizer=self._tokenizer,
            reward_model=reward_model,
            prompts=self._train,
            rollouts=Rollouts(
                self._sampler, self._tokenizer, work / "rollout", max_tokens=TOKENS, temperature=1.0
            ),
            settings=settings,
            work=work,
            report=lambda step, steps, values: figures.append(dict(values)),
            texts=texts if "ppo_ptx_coefficient" in changes else None,
        )
        ppo.train()
        cost = time.process_time() - start
        policy = ppo.trained_policy()
        write_checkpoint(policy, self._tokenizer, work / "candidate")
        after = self._answers(work / "candidate", seed)
        pairs = [
            (f"{seed}:{prompt.key}", outcome(_gold(a.text), _gold(b.text)))
            for prompt, ours, theirs in zip(self._held_out, after, before, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        ]
        rate = win_rate([key for key, _ in pairs], [value for _, value in pairs])
        return {
            "seed": seed,
            "reward_model_accuracy": {key: interval.figures() for key, interval in accuracy.items()},
            "gold_win_rate": rate.figures(),
            "gold_before": _mean_gold(before),
            "gold_after": _mean_gold(after),
            "proxy": [f["objective/scores"] for f in figures],
            "kl": [f["objective/kl"] for f in figures],
            "hellaswag": self._hellaswag(policy).figures(),
            "ppo_cpu_seconds": cost,
            "outcomes": pairs,
        }

    def _reward_model(self, side: Side, settings: TrainingSettings) -> RewardModel:
        """Fit to the rankings, once for all variants of a seed that have so many heads."""
        key = (settings.seed, settings.reward_heads)
        if key not in self._reward_models:
            torch.manual_seed(settings.seed)
            fitted = RewardModel.from_decoder(self._start, heads=settings.reward_heads)
            with Progress("reward_model", lambda step, figures: None) as report:
                fit(fitted, side, settings, report)
            self._reward_models = {key: fitted}
        return self._reward_models[key]

    def _prompts(self, instructions: Sequence[Any]) -> list[Prompt]:
        prompts = []
        for i, instruction in enumerate(instructions):
            messages = [{"role": "user", "content": instruction.text}]
            ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            prompts.append(Prompt(f"{instruction.kind}:{i}", list(ids)))
        return prompts

    def _rankings(self, seed: int) -> tuple[Side, list[Comparison]]:
        """Rankings of sampled answers by the gold preference, and some of prompts that are not trained on."""
        self._sampler.load(self._start)
        items = []
        for prompts in (self._train, self._held_out):
            groups = self._sampler.sample(
                [prompt.token_ids for prompt in prompts],
                n=RANKED,
                max_tokens=TOKENS,
                temperature=1.0,
                seed=1000 * seed + 1,
            )
            found = []
            for prompt, samples in zip(prompts, groups, strict=True):
                golds = [_gold(sample.text) for sample in samples]
                ranks = [sorted(set(golds), reverse=True).index(gold) for gold in golds]
                if len(set(ranks)) > 1:
                    found.append(Comparison(prompt, [s.token_ids for s in samples], ranks, "gold"))
            items.append(found)
        return Side(comparisons=items[0]), items[1]

    def _answers(self, model_dir: Path, seed: int) -> list[list[Sample]]:
        self._sampler.load(model_dir)
        return self._sampler.sample(
            [prompt.token_ids for prompt in self._held_out],
            n=MEASURED,
            max_tokens=TOKENS,
            temperature=0.7,
            seed=7 + 10_000 * seed,
        )

    def _texts(self, directory: Path) -> PretrainingTexts:
        """Wikipedia passages, as pretraining text."""
        file = directory / "texts.jsonl"
        with file.open("w") as out:
            for row in self._text_rows:
                for title, *sentences in row["passages"]:
                    out.write(json.dumps({"text": f"{title}\n{' '.join(sentences)}"}) + "\n")
        return PretrainingTexts(file, self._tokenizer, SETTINGS.ppo_ptx_tokens)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _hellaswag(self, policy: Policy) -> Any:
        """Accuracy of the likeliest ending by logprob a byte (acc_norm), with its interval."""
        encoded = []
        for item in self._items:
            context = self._tokenizer(item["ctx"], add_special_tokens=False).input_ids
            endings = [self._tokenizer(" " + e, add_special_tokens=False).input_ids for e in item["endings"]]
            encoded.append((context, endings))
        right = [0.0] * len(encoded)
        sizes = [len(context) + sum(map(len, endings)) for context, endings in encoded]
        for group in rows_by_tokens(sizes, 4096):
            logprobs, _ = response_logprobs(policy, [encoded[i] for i in group], 1.0)
            parts = iter(logprobs.split([len(ending) for i in group for ending in encoded[i][1]]))
            for i in group:
                item = self._items[i]
                scores = [float(next(parts).sum()) / len(ending.encode()) for ending in item["endings"]]
                right[i] = float(scores.index(max(scores)) == item["label"])
        return clustered_mean([str(i) for i in range(len(right))], right)


def _gold(text: str) -> float:
    return share_satisfied(STYLE, text)


def _mean_gold(groups: Sequence[Sequence[Sample]]) -> float:
    values = [_gold(sample.text) for group in groups for sample in group]
    return sum(values) / len(values)


def _rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    return rows


if __name__ == "__main__":
    main()
