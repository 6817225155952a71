"""All that is recorded of a round, and how two rounds differ.

Owns the reading and the comparison only; rows are written by `registry.rounds`, manifests by
`registry.registry`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from registry.registry import Registry, UnknownVersion
from registry.rounds import Metric, Round, Rounds, Stage


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """A round with its stages, its figures and the SHA-256 of the files that it published, by name."""

    round: Round
    stages: Sequence[Stage]
    metrics: Sequence[Metric]
    files: Mapping[str, str]

    @property
    def weights(self) -> Mapping[str, str] | None:
        """The SHA-256 of the published weights by file; None when nothing was published."""
        found = {name: digest for name, digest in self.files.items() if name.endswith(".safetensors")}
        return found or None

    @property
    def seconds(self) -> float | None:
        """From its start to its end, with whatever interrupted it; None before."""
        if self.round.started_at is None or self.round.ended_at is None:
            return None
        return self.round.ended_at - self.round.started_at

    def final_figures(self) -> dict[str, float | None]:
        """Each figure as `stage/name` at its last step."""
        last: dict[str, Metric] = {}
        for metric in self.metrics:
            name = f"{metric.stage}/{metric.name}"
            if name not in last or metric.step >= last[name].step:
                last[name] = metric
        return {name: metric.value for name, metric in last.items()}


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which two rounds differ; `old` or `new` is None where a round does not have it."""

    section: str
    name: str
    old: Any
    new: Any


def read_record(rounds: Rounds, registry: Registry, round_id: int) -> RoundRecord:
    """Everything on one round; raises UnknownRound."""
    round_ = rounds.get(round_id)
    files: Mapping[str, str] = {}
    if round_.version is not None:
        with contextlib.suppress(UnknownVersion):
            files = registry.version(round_.version).manifest.files
    return RoundRecord(round_, rounds.stages(round_id), rounds.metrics(round_id), files)


def same_weights(one: RoundRecord, other: RoundRecord) -> bool | None:
    """Whether both published the same weights, bit for bit; None unless both published some."""
    if one.weights is None or other.weights is None:
        return None
    return one.weights == other.weights


def differences(old: RoundRecord, new: RoundRecord) -> list[Difference]:
    """Return what differs between two rounds, in the order in which one asks for it.

    Sections are `round`, `config`, `results` (what stages left behind), `figures` (at their last step),
    `verdict`, `weights` and `seconds`.
    """
    before, after = _sections(old), _sections(new)
    return [
        Difference(section, name, mine.get(name), theirs.get(name))
        for (section, mine), theirs in zip(before.items(), after.values(), strict=True)
        for name in [*mine, *(name for name in theirs if name not in mine)]
        if mine.get(name) != theirs.get(name)
    ]


def _sections(record: RoundRecord) -> dict[str, dict[str, Any]]:
    round_ = record.round
    results = {stage.name: stage.result for stage in record.stages if stage.result is not None}
    return {
        "round": {
            name: getattr(round_, name)
            for name in ("state", "stage", "cursor", "cutoff", "seed", "repeat_of", "error")
        },
        "config": dict(_leaves(round_.config)),
        # The gate's result is the verdict, which has a section of its own.
        "results": dict(_leaves({name: found for name, found in results.items() if name != "gate"})),
        "figures": dict(record.final_figures()),
        "verdict": dict(_leaves(round_.verdict or {})),
        "weights": dict(record.weights or {}),
        "seconds": {"all": record.seconds} | {stage.name: stage.seconds for stage in record.stages},
    }


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value that is not a table, under its dotted name."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
