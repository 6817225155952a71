"""What a round makes of its raters: whose events it takes, and how much each of them counts.

Owns the round's part only: what is known of raters is `feedback/reliability.py`'s, how weights come about
`feedback/influence.py`'s. `Standing` is all that a round has to remember to come to the same result again.
"""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from feedback.influence import Influence, weigh
from feedback.reliability import Assessment, assess
from feedback.settings import RaterSettings
from feedback.store import Slice, Store
from feedback.votes import Vote, key_of
from registry.rounds import Round
from training.dataset import Comparison, Dataset, Demonstration, Judgement, Side

Spans = list[list[int]]
"""Positions as `[cursor, cutoff]`, the cursor's own left out, in order."""

SHOWN_RATERS = 20


@dataclass(frozen=True, slots=True)
class Standing:
    """Who was in quarantine as a round began, and what therefore is not learned from, or is only now.

    `held` gives the spans of events, this round's own last, that a rater in quarantine said and no round
    learned from; `returned` those of raters whose quarantine was lifted since the last round: this one learns
    from them as if they were new. `gold` are the gold questions.
    """

    held: Mapping[str, Spans] = field(default_factory=dict)
    returned: Mapping[str, Spans] = field(default_factory=dict)
    gold: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON, as it stands in the round's configuration."""
        return asdict(self)


def standing_of(config: Mapping[str, Any]) -> Standing:
    """Read the standing from a round's configuration; nobody is in quarantine where it knows none."""
    return Standing(**config.get("standing", {}))


def raters_of(config: Mapping[str, Any]) -> RaterSettings:
    """Read the settings from a round's configuration; one from before there were any is not defended."""
    return RaterSettings(**config["raters"]) if "raters" in config else RaterSettings(defend=False)


def next_standing(store: Store, last: Round | None, cursor: int, cutoff: int) -> Standing:
    """Return the standing for a round on `(cursor, cutoff]` after the round `last`."""
    quarantined = store.raters.quarantined()
    before = standing_of(last.config).held if last is not None else {}
    return Standing(
        held={rater: _joined([*before.get(rater, []), [cursor, cutoff]]) for rater in quarantined},
        returned={rater: spans for rater, spans in before.items() if rater not in quarantined},
        gold=[item.event.event_id for item in store.raters.gold()],
    )


def quarantine_suspects(store: Store, settings: RaterSettings, cutoff: int) -> list[str]:
    """Put into quarantine who is suspected on the evidence up to `cutoff`; returns them.

    Whose quarantine an operator has lifted stays out of it.
    """
    if not (settings.defend and settings.automatic_quarantine):
        return []
    states = store.raters.states()
    excluded = {rater for rater, last in states.items() if last.state != "lifted"}
    votes = store.raters.votes(cutoff, settings.evidence_events)
    gold = store.raters.votes_of_events([item.event.event_id for item in store.raters.gold()])
    suspects = assess(votes, settings, gold=gold, excluded=excluded).suspects()
    new = [rater for rater in suspects if rater not in states]
    for rater in new:
        store.raters.quarantine(rater, actor="trainer", reason=suspects[rater])
    return new


def slice_of(store: Store, cursor: int, cutoff: int, standing: Standing) -> Slice:
    """Return a round's slice with the events that a lifted quarantine gives back, before all others."""
    own, back = store.slice(cursor, cutoff), _returned(store, cutoff, standing)
    return Slice([*back.events, *own.events], back.completions | own.completions)


def older_than(store: Store, cursor: int, cutoff: int, standing: Standing) -> Slice:
    """Return what counts of the events up to `cursor`, without those that are held or only now returned."""
    older = store.slice(0, cursor, as_of=cutoff)
    back = {event.event_id for event in _returned(store, cutoff, standing).events}
    kept = [
        event for event in older.events if event.rater not in standing.held and event.event_id not in back
    ]
    return Slice(kept, older.completions)


def _returned(store: Store, cutoff: int, standing: Standing) -> Slice:
    found = Slice([], {})
    for rater in sorted(standing.returned):
        for start, end in standing.returned[rater]:
            earlier = store.slice(start, end, as_of=cutoff)
            found.events.extend(event for event in earlier.events if event.rater == rater)
            found.completions.update(earlier.completions)
    return found


class RaterWeights:
    """How much a round's items count, by what is known of raters on the evidence up to `cutoff`."""

    def __init__(self, store: Store, cutoff: int, standing: Standing, settings: RaterSettings) -> None:
        self._settings = settings
        self._standing = standing
        self.assessment = Assessment({}, frozenset(), 0.0)
        if settings.defend:
            self.assessment = assess(
                store.raters.votes(cutoff, settings.evidence_events),
                settings,
                gold=store.raters.votes_of_events(standing.gold),
                excluded=standing.held.keys(),
            )

    def weighed(self, side: Side) -> tuple[Side, dict[str, Any]]:
        """Return a side with the weights of its comparisons and judgements, and the figures on them."""
        items: list[Comparison | Judgement] = [*side.comparisons, *side.judgements]
        influence = weigh([_vote(item) for item in items], self.assessment, self._settings)
        new = [replace(item, weight=weight) for item, weight in zip(items, influence.weights(), strict=True)]
        found = replace(
            side,
            comparisons=[item for item in new if isinstance(item, Comparison)],
            judgements=[item for item in new if isinstance(item, Judgement)],
        )
        return found, influence.figures() | {"largest": _largest(items, influence)}

    def limit_demonstrations(self, dataset: Dataset) -> None:
        """Leave out demonstrations of raters and keys that gave more than their share, in place."""
        settings = self._settings.model_copy(update={"newcomer_weight": 1.0, "lone_weight": 1.0})
        nothing = Assessment({}, frozenset(), 0.0)
        for side in (dataset.train, dataset.held_out):
            influence = weigh([_vote(item) for item in side.demonstrations], nothing, settings)
            kept = _as_many(side.demonstrations, influence)
            stay = {item.event_id for item in kept}
            dataset.reasons |= {
                item.event_id: "beyond the rater's share of demonstrations"
                for item in side.demonstrations
                if item.event_id not in stay
            }
            side.demonstrations = kept

    def figures(self) -> dict[str, Any]:
        """Return what is known of the raters, for the manifest."""
        standings = self.assessment.standings.values()
        return {
            "assessed": len(standings),
            "usual_accuracy": self.assessment.usual_accuracy if standings else None,
            "vote_as_one": self.assessment.voices()[:SHOWN_RATERS],
            "quarantined": sorted(self._standing.held),
            "returned": sorted(self._standing.returned),
            "gold_questions": len(self._standing.gold),
        }


def thinned(side: Side, seed: int) -> Side:
    """Keep each comparison and judgement with a probability proportional to its weight, seeded.

    For what learns from rows that all count alike: in expectation it sees what the weights say.
    """
    items: list[Comparison | Judgement] = [*side.comparisons, *side.judgements]
    most = max((item.weight for item in items), default=1.0)
    generator = random.Random(f"{seed}:thinned")
    kept = [item for item in items if generator.random() * most < item.weight]
    return replace(
        side,
        comparisons=[item for item in kept if isinstance(item, Comparison)],
        judgements=[item for item in kept if isinstance(item, Judgement)],
    )


def _vote(item: Comparison | Judgement | Demonstration) -> Vote:
    weight = 1.0 if isinstance(item, Demonstration) else item.weight
    return Vote(item.event_id, item.rater, key_of(item.rater), item.prompt.key, weight=weight)


def _as_many(items: Sequence[Demonstration], influence: Influence) -> list[Demonstration]:
    """Keep as many of each rater's as they weigh, in their order; which ones, the events' ids decide."""
    weights: Counter[str] = Counter()
    own = defaultdict(list)
    for item, weight in zip(items, influence.weights(), strict=True):
        weights[item.rater] += weight  # type: ignore[assignment]
        own[item.rater].append(item.event_id)
    kept = set()
    for rater, ids in own.items():
        ids.sort(key=lambda id: hashlib.sha256(id.encode()).digest())
        kept |= set(ids[: max(1, round(weights[rater]))])
    return [item for item in items if item.event_id in kept]


def _largest(items: Sequence[Comparison | Judgement], influence: Influence) -> dict[str, float]:
    """Return the shares of the raters that count most."""
    totals: Counter[str] = Counter()
    for item, weight in zip(items, influence.weights(), strict=True):
        totals[item.rater] += weight  # type: ignore[assignment]
    whole = sum(totals.values()) or 1.0
    return {rater: total / whole for rater, total in totals.most_common(SHOWN_RATERS)}


def _joined(spans: Spans) -> Spans:
    """Join spans that touch."""
    found: Spans = []
    for start, end in spans:
        if found and found[-1][1] >= start:
            found[-1] = [found[-1][0], max(end, found[-1][1])]
        else:
            found.append([start, end])
    return found
