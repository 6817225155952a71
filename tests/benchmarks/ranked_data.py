"""Public rankings as the records of the feedback system, read from the folder INSTRUCTLOOP_DATA.

Owns how each data set becomes completions and ranking events; they turn into token ids by the round's own
`training.dataset.build`. Fields, sources and licences of the sets are in that folder's README.
"""

import gzip
import hashlib
import itertools
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from feedback.events import ChoiceRef, Event, Ranking
from feedback.preferences import read_preferences
from feedback.records import Choice, Completion
from feedback.store import Slice
from training.dataset import Comparison, Dataset, build
from training.settings import TrainingSettings

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("INSTRUCTLOOP_DATA", ROOT.parent / "shared" / "data"))

Record = tuple[Completion, Event]
RESPONSES = 7


def hh_rlhf() -> list[Record]:
    """HH-RLHF, helpful-base: pairs."""
    return list(read_preferences(_file("hh-rlhf/helpful-base.jsonl.gz"), "hh-rlhf"))


def qa_feedback() -> list[Record]:
    """QA-Feedback: four answers to a question, ranked by how many of the other three each one beats.

    The question alone is the prompt: with its passages too, packing would save still more.
    """
    records = []
    for row in _rows("qa-feedback/dev_feedback.jsonl.gz"):
        wins = [0.0] * 4
        for (i, j), verdict in zip(itertools.combinations(range(4), 2), row["preference"], strict=True):
            wins[i] += {0: 0.5, 1: 1.0, 2: 0.0}[verdict]
            wins[j] += {0: 0.5, 1: 0.0, 2: 1.0}[verdict]
        groups = [
            [row[f"prediction {i + 1}"] for i in range(4) if wins[i] == number]
            for number in sorted(set(wins), reverse=True)
        ]
        if len(groups) > 1:
            records.append(_ranking("qa-feedback", row["question"], groups))
    return records


def ukp_convincing() -> dict[str, list[Record]]:
    """UKPConvArg1, ranking: the arguments of each side of a debate, by how convincing people found them.

    Human rankings of about 33 texts each, cut at random (seeded) into rankings of seven; by debate side.
    """
    sides: dict[str, list[tuple[float, str]]] = {}
    for row in _rows("ukpconvarg1/ranking.jsonl.gz"):
        sides.setdefault(row["file"], []).append((float(row["rank"]), row["argument"]))
    found = {}
    for name, arguments in sides.items():
        debate, _, side = name.removesuffix(".csv").replace("-", " ").partition("_")
        prompt = f"Debate: {debate.strip()}? Give a convincing argument for this side: {side.strip()}."
        random.Random(name).shuffle(arguments)
        found[name] = [
            # A lower figure is more convincing.
            _ranking("ukpconvarg1", prompt, [[text] for _, text in sorted(arguments[at : at + RESPONSES])])
            for at in range(0, len(arguments) - RESPONSES + 1, RESPONSES)
        ]
    return found


def llmbar() -> list[Record]:
    """MT-Bench and LLMEval² pairs as LLMBar prepared them."""
    records = []
    for name in ("mt_bench", "llmeval2"):
        for row in _rows(f"llmbar-processed/{name}.jsonl.gz"):
            better, worse = row[f"output_{row['label']}"], row[f"output_{3 - row['label']}"]
            records.append(_ranking(name, row["input"], [[better], [worse]], "llmbar"))
    return records


def hhh_alignment() -> list[Record]:
    """HHH alignment: pairs about helpfulness, honesty, harmlessness and other things."""

    def between(text: str, start: str, end: str) -> str:
        return text.split(start, 1)[1].split(end, 1)[0].strip()

    records = []
    for row in _rows("hhh-alignment/hhh_alignment_eval.jsonl.gz"):
        prompt = between(
            row["chosen_instruction"], "###The instruction to evaluate:", "###Response to evaluate:"
        )
        groups = [
            [between(row[f"{which}_instruction"], "###Response to evaluate:", "###Score Rubrics:")]
            for which in ("chosen", "rejected")
        ]
        records.append(_ranking(f"hhh {row['source']}", prompt, groups, "hhh"))
    return records


def dataset(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, settings: TrainingSettings
) -> Dataset:
    """Make of the records what a round would."""
    records = list(records)
    completions = {completion.id: [completion] for completion, _ in records}
    return build(Slice([event for _, event in records], completions), tokenizer, settings)


def all_comparisons(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, settings: TrainingSettings
) -> list[Comparison]:
    """Return the comparisons in the order of the records, of a set that need not be split."""
    return [
        item
        for record in records
        for data in [dataset([record], tokenizer, settings)]
        for item in (*data.train.comparisons, *data.held_out.comparisons)
    ]


def _file(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        sys.exit(f"{path} is absent: set INSTRUCTLOOP_DATA to the folder that holds {name}")
    return path


def _rows(name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(_file(name), "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _ranking(
    source: str, prompt: str, groups: Sequence[Sequence[str]], rater_group: str | None = None
) -> Record:
    """Make a completion with the responses as choices, and a ranking of them: groups, best first."""
    texts = [text for group in groups for text in group]
    digest = hashlib.sha256(json.dumps([source, prompt, texts]).encode()).hexdigest()
    id = f"benchmark-{digest[:32]}"
    completion = Completion(
        id=id,
        parts=1,
        key_id="benchmark",
        source=source,
        endpoint="import",
        created_at=0.0,
        messages=[{"role": "user", "content": prompt}],
        choices=[Choice(index=i, text=text) for i, text in enumerate(texts)],
    )
    index = iter(range(len(texts)))
    event = Event(
        event_id=id,
        key_id="benchmark",
        rater=f"benchmark/{source}",
        source=source,
        received_at=0.0,
        feedback=Ranking(
            type="ranking",
            groups=[[ChoiceRef(completion_id=id, choice=next(index)) for _ in group] for group in groups],
            context={"group": rater_group} if rater_group else None,
        ),
    )
    return completion, event
