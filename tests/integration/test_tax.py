"""The alignment tax on a tiny model: lm_eval's items scored through our samplers, changes paired by item."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from databases import migrated
from lm_eval.tasks import TaskManager
from unit.training.tiny import TransformersSampler as SlowSampler
from unit.training.tiny import tiny_model, tiny_tokenizer

from evaluation.sampler import TransformersSampler
from evaluation.settings import EvaluationSettings
from evaluation.tax import KEPT, Result, TaxProblem, change, changes, find, measure, sampled
from registry.registry import Registry, Version
from training.policy import load_policy

ITEMS = [
    {
        "text": f"w{i} w{(7 * i) % 50}",
        "options": [f"w{(i + k) % 59} w{(i * k) % 59}" for k in range(4)],
        "gold": i % 4,
    }
    for i in range(24)
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {file}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{text}}}}"
doc_to_target: gold
doc_to_choice: options
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
GENERATED = """
task: tiny_generated
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {file}}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["w7"], max_gen_toks: 4}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies, and one directory of task definitions."""
    root = tmp_path_factory.mktemp("tax")
    for seed in (0, 1):
        tiny_model(root / str(seed), seed=seed)
    tasks = root / "tasks"
    tasks.mkdir()
    items = [
        {**item, "answer": greedy(root / "0", str(item["text"])) if i % 2 else "no"}
        for i, item in enumerate(ITEMS)
    ]
    (root / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    for name, text in (("choice", CHOICE), ("generated", GENERATED)):
        (tasks / f"{name}.yaml").write_text(text.format(file=root / "items.jsonl"))
    return root


def greedy(model_dir: Path, text: str) -> str:
    """The likeliest four words after a text, up to `w7`."""
    model, tokenizer = load_policy(model_dir), tiny_tokenizer()
    ids = tokenizer.encode(text)
    for _ in range(4):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    answer = tokenizer.decode(ids[len(tokenizer.encode(text)) :], skip_special_tokens=True)
    return str(answer).split("w7")[0]


def test_batched_likelihoods_are_those_of_the_obvious_way(directory: Path) -> None:
    items: list[tuple[Sequence[int], Sequence[int]]] = [
        ([3 + i, 5, *range(10, 10 + i)], [7 + i, *range(20, 20 + i % 3)]) for i in range(21)
    ]
    fast = TransformersSampler(directory / "0", batch=8).loglikelihoods(items)
    slow = SlowSampler(directory / "0").loglikelihoods(items)
    assert [value for value, _ in fast] == pytest.approx([value for value, _ in slow], abs=0.1)
    likeliest = [([5, 6], [int(load_policy(directory / "0")(torch.tensor([[5, 6]])).logits[0, -1].argmax())])]
    assert TransformersSampler(directory / "0").loglikelihoods(likeliest)[0][1]


def test_right_is_what_the_policy_finds_likeliest(directory: Path) -> None:
    slow = SlowSampler(directory / "0")
    tokenizer = tiny_tokenizer()
    expected = []
    for item in ITEMS:
        context = tokenizer.encode(str(item["text"]))
        options = [str(option) for option in item["options"]]  # type: ignore[attr-defined]
        scores = slow.loglikelihoods([(context, tokenizer.encode(option)) for option in options])
        by_length = [score / len(option) for (score, _), option in zip(scores, options, strict=True)]
        expected.append(by_length.index(max(by_length)) == item["gold"])
    found = {item.task: item for item in measure(sampled(slow, tokenizer), [str(directory / "tasks")], None)}
    assert (found["tiny_choice"].metric, found["tiny_choice"].right) == ("acc_norm", tuple(expected))
    assert 0 < sum(expected) < len(expected)
    # Every second item asks for what the policy says by itself.
    assert found["tiny_generated"].metric == "exact_match"
    assert found["tiny_generated"].right == tuple(i % 2 == 1 for i in range(len(ITEMS)))
    assert (
        Result.of("tiny_choice", json.loads(json.dumps(found["tiny_choice"].as_dict())))
        == found["tiny_choice"]
    )


class CountingSampler(TransformersSampler):
    loads: list[str]

    def load(self, model_dir: Path) -> None:
        self.loads = [*getattr(self, "loads", []), model_dir.name]
        super().load(model_dir)


@pytest.fixture
def versions(directory: Path, tmp_path: Path) -> tuple[Registry, list[Version]]:
    registry = Registry(migrated(tmp_path / "store.db"), tmp_path / "versions")
    staged = [tiny_model(tmp_path / f"staging{number}", seed) for number, seed in enumerate((0, 1, 0))]
    return registry, [
        registry.publish(path, parent=None, round_id=number, kind="ppo", details={})
        for number, path in enumerate(staged)
    ]


def test_a_version_is_measured_once_as_long_as_the_items_are_the_same(
    directory: Path, versions: tuple[Registry, list[Version]]
) -> None:
    registry, (first, second, third) = versions
    sampler = CountingSampler(directory / "0")
    sampler.loads = []

    def compare(candidate: Version, incumbent: Version, limit: int) -> dict[str, float]:
        settings = EvaluationSettings(tax_tasks=[str(directory / "tasks")], tax_limit=limit)
        found = changes(
            sampler, tiny_tokenizer(), registry, candidate=candidate, incumbent=incumbent, settings=settings
        )
        return {item.task: item.difference.estimate for item in found}

    to_second = compare(second, first, 0)
    assert sampler.loads == [second.name, first.name]
    kept = registry.version(second.name).manifest.metrics[KEPT]["tiny_choice"]
    assert len(kept["right"]) == len(ITEMS)
    back = compare(third, second, 0)  # the third is the first again
    assert sampler.loads == [second.name, first.name, third.name]
    assert back == {task: -difference for task, difference in to_second.items()}
    assert back["tiny_generated"] > 0
    compare(third, second, 10)  # other items: what is kept of the second is of no use
    assert sampler.loads[3:] == [third.name, second.name]


def test_changes_are_told_of_the_same_items_only() -> None:
    before = Result("t", "acc", "d", (True, True, False, False))
    found = change(before, Result("t", "acc", "d", (True, False, False, False)))
    assert (found.before, found.after, found.difference.estimate) == (0.5, 0.25, -0.25)
    with pytest.raises(TaxProblem, match="t: the results are not of the same items"):
        change(before, Result("t", "acc", "other", before.right))


@pytest.mark.parametrize(("task", "says"), [("no_such_task", "neither a task"), (".", "no task definition")])
def test_what_can_t_be_measured_is_named(
    task: str, says: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Reading all definitions of lm_eval takes a quarter of a minute; these stand for them.
    known = TaskManager(include_path=str(directory / "tasks"), include_defaults=False)
    monkeypatch.setattr("evaluation.tax._known_tasks", lambda: known)
    assert [name for name, _ in find(["tiny_choice"])] == ["tiny_choice"]
    with pytest.raises(TaxProblem, match=says):
        find([task])
