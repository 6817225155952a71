"""The alignment tax: what a policy loses on public benchmarks, by lm-evaluation-harness.

Owns which model answers a benchmark (a version through our sampler, or a served API) and what is kept of the
answers. Tasks, prompts, scoring and metrics are lm-evaluation-harness's own (`lm_eval`), which is imported
when something is measured.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.comparison import Interval, paired_difference, wilson

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from transformers import PreTrainedTokenizerBase

    from evaluation.sampler import Sampler
    from evaluation.settings import EvaluationSettings
    from registry.registry import Registry, Version

METRICS = ("acc_norm", "acc", "exact_match")
"""What a task is measured by: the first of these that it has. Each item is right or wrong by all of them."""

KEPT = "tax"
"""The key among a version's metrics under which its results are kept."""


class TaxProblem(ValueError):  # noqa: N818
    """A benchmark can't be measured; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Result:
    """One task's items: whether each was answered right by `metric`.

    `digest` is that of the items and their prompts: results with the same can be compared item by item.
    """

    task: str
    metric: str
    digest: str
    right: tuple[bool, ...]

    def score(self, confidence: float = 0.95) -> Interval:
        """Return the share of right answers."""
        return wilson(sum(self.right), len(self.right), confidence=confidence)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON, with an item's outcome as one character."""
        outcomes = "".join("1" if right else "0" for right in self.right)
        return {
            "metric": self.metric,
            "digest": self.digest,
            "score": self.score().figures(),
            "right": outcomes,
        }

    @classmethod
    def of(cls, task: str, kept: Mapping[str, Any]) -> "Result":
        """Read what `as_dict` wrote."""
        right = tuple(outcome == "1" for outcome in kept["right"])
        return cls(task, str(kept["metric"]), str(kept["digest"]), right)


@dataclass(frozen=True, slots=True)
class Change:
    """One task before and after: the two shares, and their difference, paired item by item."""

    task: str
    metric: str
    before: float
    after: float
    difference: Interval

    def as_dict(self) -> dict[str, Any]:
        """Return the change as plain JSON."""
        return asdict(self)


def change(before: Result, after: Result, *, confidence: float = 0.95, resamples: int = 2000) -> Change:
    """Compare two results of one task; raises TaxProblem where they are not of the same items."""
    if (before.metric, before.digest) != (after.metric, after.digest):
        raise TaxProblem(f"{after.task}: the results are not of the same items, so they can't be compared")
    if len(after.right) < 2:
        raise TaxProblem(f"{after.task}: no interval of a change can be told from fewer than two items")
    difference = paired_difference(
        [str(item) for item in range(len(after.right))],
        before.right,
        after.right,
        confidence=confidence,
        resamples=resamples,
    )
    return Change(after.task, after.metric, before.score().estimate, after.score().estimate, difference)


def find(tasks: Sequence[str]) -> list[tuple[str, Any]]:
    """Return the name of each of `tasks` beside the lm_eval `TaskManager` that knows it.

    An entry is a name that lm_eval knows (of a group all tasks, as one result), or a directory of task
    definitions, of which each is a result. Raises TaxProblem.
    """
    found: list[tuple[str, Any]] = []
    for entry in tasks:
        if Path(entry).is_dir():
            manager = _tasks_in(entry)
            if not manager.all_subtasks:
                raise TaxProblem(f"{entry}: there is no task definition in this directory")
            found += [(name, manager) for name in manager.all_subtasks]
        elif entry in _known_tasks().all_tasks:
            found.append((entry, _known_tasks()))
        else:
            raise TaxProblem(f"{entry!r} is neither a task of lm-evaluation-harness nor a directory")
    return found


def measure(model: "LM", tasks: Sequence[str], limit: int | None) -> list[Result]:
    """Let `model` answer the first `limit` items (None: all) of each of `tasks`, which `find` understands.

    Raises TaxProblem.
    """
    return [_measure(model, name, manager, limit) for name, manager in find(tasks)]


def _tasks_in(directory: str) -> Any:
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 - takes seconds to import

    return TaskManager(include_path=directory, include_defaults=False)


@cache
def _known_tasks() -> Any:
    """Return lm_eval's own tasks; reading all their definitions takes many seconds."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    return TaskManager()


def _measure(model: "LM", name: str, manager: Any, limit: int | None) -> Result:
    from lm_eval import simple_evaluate  # noqa: PLC0415

    try:
        found = simple_evaluate(model, tasks=[name], task_manager=manager, limit=limit, bootstrap_iters=0)
    except (FileNotFoundError, ConnectionError) as problem:
        raise TaxProblem(f"{name}: its data can't be read: {problem}") from problem
    samples = [sample for of_task in found["samples"].values() for sample in _first_filter(of_task)]
    metric = next((one for one in METRICS if samples and all(one in sample for sample in samples)), None)
    if metric is None:
        raise TaxProblem(f"{name}: it has no items with any of the metrics {', '.join(METRICS)}")
    digest = hashlib.sha256()
    for sample in samples:
        digest.update("".join(sample[part] for part in ("doc_hash", "prompt_hash", "target_hash")).encode())
    return Result(name, metric, digest.hexdigest(), tuple(sample[metric] > 0.5 for sample in samples))


def _first_filter(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of answers that several filters read, those as the task's first filter read them, in order."""
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]


def served(url: str, model: str, tokenizer: str, max_length: int, concurrency: int) -> "LM":
    """Return the model behind an OpenAI-compatible API, by lm_eval's own client.

    `url` ends in `/v1`. The key comes from OPENAI_API_KEY. Contexts are cut with `tokenizer`, a directory or
    a Hugging Face name, which has to be the model's. `max_length` is the model's, in tokens.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: PLC0415

    return LocalCompletionsAPI(
        base_url=f"{url.rstrip('/')}/completions",
        model=model,
        tokenizer=tokenizer,
        tokenizer_backend="huggingface",
        max_length=max_length,
        num_concurrent=concurrency,
    )


def sampled(sampler: "Sampler", tokenizer: "PreTrainedTokenizerBase") -> "LM":
    """Return the version that `sampler` has loaded, as a model of lm_eval."""
    from lm_eval.api.model import TemplateLM  # noqa: PLC0415

    class SampledLM(TemplateLM):  # type: ignore[misc]  # lm_eval is not type-checked
        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return list(tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            return sampler.loglikelihoods([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
            raise TaxProblem("a task that measures perplexity has no items that are right or wrong")

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            return [_answer(sampler, tokenizer, *request.args) for request in requests]

    return SampledLM()


def _answer(
    sampler: "Sampler", tokenizer: "PreTrainedTokenizerBase", context: str, wanted: Mapping[str, Any]
) -> str:
    """Return the greedy answer up to the first of the texts that end it."""
    ids = tokenizer.encode(context, add_special_tokens=False)
    most = int(wanted.get("max_gen_toks", wanted.get("max_tokens", 256)))
    ((sample,),) = sampler.sample([ids], n=1, max_tokens=most, temperature=0.0, seed=0)
    text = sample.text
    until = wanted.get("until") or []
    for end in [until] if isinstance(until, str) else until:
        text = text.split(end)[0] if end else text
    return text


def changes(
    sampler: "Sampler",
    tokenizer: "PreTrainedTokenizerBase",
    registry: "Registry",
    *,
    candidate: "Version",
    incumbent: "Version",
    settings: "EvaluationSettings",
) -> tuple[Change, ...]:
    """Measure the candidate on all of `tax_tasks` and compare it with the version in service.

    Results are kept among a version's metrics, so one that was a candidate before is not measured again,
    unless the items or the prompts have changed since. Raises TaxProblem.
    """
    model = sampled(sampler, tokenizer)
    after = measured(sampler, model, registry, candidate, settings)
    kept = registry.version(incumbent.name).manifest.metrics.get(KEPT, {})
    before = [Result.of(item.task, kept[item.task]) for item in after if item.task in kept]
    if [(item.task, item.digest) for item in before] != [(item.task, item.digest) for item in after]:
        before = measured(sampler, model, registry, incumbent, settings)
    return tuple(
        change(old, new, confidence=settings.confidence, resamples=settings.resamples)
        for old, new in zip(before, after, strict=True)
    )


def measured(
    sampler: "Sampler", model: "LM", registry: "Registry", version: "Version", settings: "EvaluationSettings"
) -> list[Result]:
    """Measure one version through `sampler`, whose `model` is, and keep the results among its metrics."""
    sampler.load(version.path)
    found = measure(model, settings.tax_tasks, settings.tax_limit or None)
    kept = registry.version(version.name).manifest.metrics.get(KEPT, {})
    registry.annotate(version.name, metrics={KEPT: {**kept, **{item.task: item.as_dict() for item in found}}})
    return found
