"""How often judges agree with people: on MT-Bench and LLMEval² pairs, on HHH alignment by axis.

The judges are answer length and a reward model, fitted here to HH-RLHF (`--train` pairs of helpful-base) or
read from `--reward-model DIR`; with `--url` and `--model` instead a language model at an OpenAI-compatible
endpoint (its key in OPENAI_API_KEY). Beside them stand GPT-4's votes on MT-Bench with people's. A reward
model's figures are kept beside it. Prints JSON.
"""

import argparse
import gzip
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from evaluation.agreement import Agreement, Labelled, LengthJudge, agreement, keep, kept, measure
from evaluation.endpoint_judge import AXES, EndpointJudge
from evaluation.judges import ChatPrompt, Judge, Pair, RewardModelJudge
from evaluation.reward_model import RewardModel
from feedback.events import Ranking
from instructloop import model
from tests.benchmarks import ranked_data
from training.dataset import Side
from training.progress import Progress
from training.reward_model import fit
from training.settings import TrainingSettings

SETTINGS = TrainingSettings(
    reward_epochs=1, reward_learning_rate=2e-5, reward_batch=16, prompt_tokens=256, response_tokens=256
)
# Zheng et al. 2023 (arXiv 2306.05685), table 5: GPT-4 with people, first turn, ties counted and both decided.
PUBLISHED = {"gpt-4 on mt-bench": {"same": 0.66, "decided": 0.85}}
AXIS_OF = {"hhh helpful": "helpful", "hhh honest": "honest", "hhh harmless": "harmless"}
OUTCOMES = {"model_a": 1.0, "model_b": 0.0}


def main() -> None:
    """Run the benchmark once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=1200, help="pairs to fit the reward model to, at most")
    parser.add_argument("--heads", type=int, default=SETTINGS.reward_heads)
    parser.add_argument("--reward-model", type=Path, help="a fitted reward model, or where to put this one")
    parser.add_argument("--url", help="an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="the judging model's name there")
    options = parser.parse_args()
    found: dict[str, Any] = {"published": PUBLISHED, "gpt-4 on mt-bench": gpt4_with_people()}
    sets = labelled_sets()
    found["length"] = _measured(LengthJudge(), sets)
    if options.url:
        found[options.model] = _endpoint(options, sets)
    else:
        found["reward model"] = _reward_model(options, sets)
    print(json.dumps(found, indent=1))


def labelled_sets() -> dict[str, list[Labelled]]:
    """Pairs with people's verdicts by data set; the better answer stands first in every other pair."""
    sets: dict[str, list[Labelled]] = {}
    for completion, event in [*ranked_data.llmbar(), *ranked_data.hhh_alignment()]:
        assert isinstance(event.feedback, Ranking)
        better, worse = (completion.choices[ref.choice].text for (ref,) in event.feedback.groups)
        content = (completion.messages or [])[0]["content"]
        prompt = ChatPrompt(content, ({"role": "user", "content": content},))
        items = sets.setdefault(event.source, [])
        swapped = len(items) % 2 == 1
        pair = Pair(prompt, better, worse)
        items.append(Labelled(pair.swapped if swapped else pair, 0.0 if swapped else 1.0))
    return sets


def gpt4_with_people() -> dict[str, Any]:
    """GPT-4's votes on MT-Bench's first turns beside each person's vote on the same pair."""
    machine = {_key(row): row["winner"] for row in _votes("gpt4_pair_votes") if row["turn"] == 1}
    both = [
        (str(row["question_id"]), OUTCOMES.get(row["winner"], 0.5), OUTCOMES.get(machine[_key(row)], 0.5))
        for row in _votes("human_votes")
        if row["turn"] == 1 and _key(row) in machine
    ]
    prompts, human, judged = zip(*both, strict=True)
    return agreement(prompts, human, judged).figures()


def _votes(name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(ranked_data.DATA / "mt-bench" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["model_a"] > row["model_b"]:
                row["model_a"], row["model_b"] = row["model_b"], row["model_a"]
                row["winner"] = {"model_a": "model_b", "model_b": "model_a"}.get(row["winner"], "tie")
            yield row


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["question_id"], row["turn"], row["model_a"], row["model_b"]


def _reward_model(options: argparse.Namespace, sets: dict[str, list[Labelled]]) -> dict[str, Any]:
    base = model.ensure_default_model(ranked_data.ROOT / ".instructloop" / "test-model")
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    directory: Path | None = options.reward_model
    if directory is not None and (directory / "head.safetensors").exists():
        fitted = RewardModel.load(directory)
    else:
        fitted = _fitted(base, tokenizer, options)
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            fitted.save(directory)
    judge = RewardModelJudge("reward model", fitted, tokenizer, prompt_tokens=512, response_tokens=512)
    measured = {name: measure(judge, labelled) for name, labelled in sets.items()}
    if directory is not None:
        keep(directory, measured)
        print(f"kept beside the reward model: {sorted(kept(directory) or {})}", file=sys.stderr)
    return {name: one.figures() for name, one in measured.items()}


def _fitted(base: Path, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> RewardModel:
    settings = SETTINGS.model_copy(update={"reward_heads": options.heads})
    data = ranked_data.dataset(ranked_data.hh_rlhf(), tokenizer, settings)
    torch.manual_seed(settings.seed)
    fitted = RewardModel.from_decoder(base, settings.reward_heads)
    with Progress("reward_model", lambda step, figures: None) as report:
        fit(fitted, Side(comparisons=data.train.comparisons[: options.train]), settings, report)
    return fitted


def _endpoint(options: argparse.Namespace, sets: dict[str, list[Labelled]]) -> dict[str, Any]:
    """Ask by the axis that a set is about; where it is about none, overall."""
    found: dict[str, Any] = {}
    for name, labelled in sets.items():
        axis = AXIS_OF.get(name, "overall")
        assert axis in AXES
        key = os.environ.get("OPENAI_API_KEY")
        with EndpointJudge(options.url, options.model, axis=axis, api_key=key) as judge:
            found[name] = measure(judge, labelled).figures() | {"orders": judge.orders.figures()}
    return found


def _measured(judge: Judge, sets: dict[str, list[Labelled]]) -> dict[str, Any]:
    measured: dict[str, Agreement] = {name: measure(judge, labelled) for name, labelled in sets.items()}
    return {name: one.figures() for name, one in measured.items()}


if __name__ == "__main__":
    main()
