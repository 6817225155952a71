"""A round's dataset: the slice of the store as token ids, split by prompt.

Owns what an event becomes in training, on which side of the split a prompt falls, and that nothing personal
which `feedback.privacy` finds gets in. It is a pure function of the slice, the tokenizer and the settings,
whose seed draws what older data is mixed in.
"""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from evaluation.contest import Prompt
from evaluation.prompts import is_held_out
from feedback.cases import SOURCE as CASES
from feedback.events import Demonstration as DemonstrationEvent
from feedback.events import Event, Ranking, Rating, Thumb
from feedback.privacy import PrivacyFilter
from feedback.records import Choice, Completion, prompt_hash
from feedback.settings import RaterSettings
from feedback.store import Slice
from feedback.votes import key_of
from registry.rounds import EventUse, Use
from training.settings import TrainingSettings


@dataclass(frozen=True, slots=True)
class Comparison:
    """K responses to a prompt with their `ranks`, 0 best; equal ranks are ties.

    `weight` is how much it counts, `rater_group` the group that accuracy is told for; `event_id` and `rater`
    say which event it was and whose.
    """

    prompt: Prompt
    responses: list[list[int]]
    ranks: list[int]
    source: str
    weight: float = 1.0
    rater_group: str = ""
    event_id: str = ""
    rater: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """One response with a `target` in [0, 1] by a thumb or a rating (`kind`), weighing as a comparison."""

    prompt: Prompt
    response: list[int]
    target: float
    kind: str
    weight: float = 1.0
    rater_group: str = ""
    event_id: str = ""
    rater: str = ""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A response that a person wrote; `source` is its event's."""

    prompt: Prompt
    response: list[int]
    event_id: str = ""
    rater: str = ""
    source: str = ""


@dataclass(slots=True)
class Side:
    """All that was said on one side's prompts; what held-out raters compared is apart, only to measure by."""

    comparisons: list[Comparison] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)
    demonstrations: list[Demonstration] = field(default_factory=list)
    prompts: dict[str, Prompt] = field(default_factory=dict)
    by_held_out_raters: list[Comparison] = field(default_factory=list)

    @property
    def judged(self) -> list[Comparison | Judgement]:
        """All that reward models are fitted to."""
        return [*self.comparisons, *self.judgements]

    def written(self, settings: TrainingSettings) -> list[Demonstration]:
        """Return the demonstrations as SFT sees them: those of cases several times."""
        return [
            item
            for item in self.demonstrations
            for _ in range(settings.sft_case_repeats if item.source == CASES else 1)
        ]

    def items(self) -> list[Comparison | Judgement | Demonstration]:
        """Everything, each item of one event."""
        return [*self.judged, *self.demonstrations]

    def sorted_prompts(self) -> list[Prompt]:
        """Return the prompts in the order of their hashes: the same whatever else is asked."""
        return sorted(self.prompts.values(), key=lambda prompt: prompt.key)

    def counts(self) -> dict[str, int]:
        """How many of each kind there are."""
        return {
            "comparisons": len(self.comparisons),
            "judgements": len(self.judgements),
            "demonstrations": len(self.demonstrations),
            "prompts": len(self.prompts),
        }


@dataclass(slots=True)
class Dataset:
    """A round's data; `reasons` says of each event that is not used why not, by its id.

    `replaced` counts what the privacy filter replaced, by kind, in each text once.
    """

    train: Side = field(default_factory=Side)
    held_out: Side = field(default_factory=Side)
    reasons: dict[str, str] = field(default_factory=dict)
    replaced: Counter[str] = field(default_factory=Counter)

    @property
    def left_out(self) -> Mapping[str, int]:
        """Count the events that are not used, by reason."""
        return MappingProxyType(Counter(self.reasons.values()))

    def uses(self, settings: TrainingSettings) -> list[EventUse]:
        """Say of every event of the slice what a round with these settings does with it."""
        uses = [EventUse(event_id, "left_out", reason) for event_id, reason in self.reasons.items()]
        held_out = [*self.held_out.items(), *self.train.by_held_out_raters, *self.held_out.by_held_out_raters]
        uses += [EventUse(item.event_id, "held_out") for item in held_out]
        uses += [EventUse(item.event_id, "trained") for item in self.train.judged]
        use: Use = "trained"
        reason = None
        if len(self.train.written(settings)) < settings.sft_minimum:
            reason = "SFT is skipped for want of demonstrations"
            if settings.algorithm in ("ppo", "rloo"):
                reason = f"{reason}: only its prompt is used"
            else:
                use = "left_out"
        return uses + [EventUse(item.event_id, use, reason) for item in self.train.demonstrations]


def is_held_out_rater(rater: str, settings: RaterSettings) -> bool:
    """Whether nothing is trained on what a rater says: the same in every round, like a held-out prompt."""
    if rater in settings.held_out or key_of(rater) in settings.held_out:
        return True
    digest = hashlib.sha256(f"held-out rater:{rater}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < settings.held_out_share * 2**64


def build(
    data: Slice,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainingSettings,
    *,
    raters: RaterSettings | None = None,
    quarantined: Collection[str] = (),
) -> Dataset:
    """Turn the events of a slice into training data; what can't be used is counted, never guessed.

    What `quarantined` raters say is left out, what raters say whom `raters` holds out is kept apart.
    """
    dataset = Dataset()
    events = [event for event in data.events if event.rater not in quarantined]
    dataset.reasons |= {
        event.event_id: "the rater is quarantined" for event in data.events if event.rater in quarantined
    }
    builder = _Builder(data, tokenizer, settings)
    for event in events:
        builder.note_checks(event)
    items = [(event, builder.item(event)) for event in events]
    # Cases are there to be learned from, so their prompts are never held out, whoever else speaks of them.
    cases = {item.prompt.key for event, item in items if event.key_id == CASES and not isinstance(item, str)}
    for event, item in items:
        if isinstance(item, str):
            dataset.reasons[event.event_id] = item
            continue
        key = item.prompt.key
        held_out = key not in cases and is_held_out(key, settings.held_out_share)
        side = dataset.held_out if held_out else dataset.train
        if raters is not None and event.key_id != CASES and is_held_out_rater(event.rater, raters):
            if isinstance(item, Comparison):
                side.by_held_out_raters.append(item)
            else:
                dataset.reasons[event.event_id] = "a held-out rater's, and no ranking"
            continue
        side.prompts.setdefault(item.prompt.key, item.prompt)
        match item:
            case Comparison():
                side.comparisons.append(item)
            case Judgement():
                side.judgements.append(item)
            case Demonstration():
                side.demonstrations.append(item)
    dataset.replaced = builder.replaced
    return dataset


def with_older(
    side: Side,
    older: Slice,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainingSettings,
    raters: RaterSettings | None = None,
) -> Side:
    """Return the training side's judgements with a seeded sample of older ones, for a reward model only.

    Training on the newest samples alone brings regressions back (Llama 2, arXiv 2307.09288), so older ones
    make up at most `reward_older_share` of the whole. Held-out prompts and raters stay out.
    """
    new = len(side.judged)
    wanted = int(new * settings.reward_older_share / (1 - settings.reward_older_share))
    events = [event for event in older.events if event.feedback.type != "demonstration"]
    # As many more as will fall on the held-out side: the rest need not be tokenised.
    drawn = min(len(events), math.ceil(wanted / (1 - settings.held_out_share)))
    events = random.Random(f"{settings.seed}:older").sample(events, drawn)
    judged = build(Slice(events, older.completions), tokenizer, settings, raters=raters).train.judged
    judged = random.Random(f"{settings.seed}:kept").sample(judged, min(len(judged), wanted))
    return Side(
        comparisons=[*side.comparisons, *(item for item in judged if isinstance(item, Comparison))],
        judgements=[*side.judgements, *(item for item in judged if isinstance(item, Judgement))],
        demonstrations=side.demonstrations,
        prompts=side.prompts,
        by_held_out_raters=side.by_held_out_raters,
    )


def responses_of(
    completions: Iterable[Completion], tokenizer: PreTrainedTokenizerBase, settings: TrainingSettings
) -> list[tuple[Prompt, list[tuple[int, list[int]]]]]:
    """Return each completion's prompt with its responses, (choice index, token ids), that aren't empty."""
    builder = _Builder(Slice([], {}), tokenizer, settings)
    return [builder.responses(completion) for completion in completions]


def rater_group(event: Event) -> str:
    """Return the group that the event's context names (`group`), else the key that vouches for the rater."""
    named = (event.feedback.context or {}).get("group")
    return named if isinstance(named, str) and named else event.rater.partition("/")[0]


class _Builder:
    """Looks up and tokenises what events refer to."""

    def __init__(self, data: Slice, tokenizer: PreTrainedTokenizerBase, settings: TrainingSettings) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._choices = {
            (completion.id, choice.index): (completion, choice)
            for parts in data.completions.values()
            for completion in parts
            for choice in completion.choices
        }
        self._first = {id: parts[0] for id, parts in data.completions.items() if parts}
        self._checks: dict[str, tuple[dict[str, Any], ...]] = {}
        self._filter = PrivacyFilter(settings.privacy_phone_regions) if settings.privacy_filter else None
        self._cleaned: dict[tuple[str, int, int | None], list[int]] = {}
        self.replaced: Counter[str] = Counter()

    def note_checks(self, event: Event) -> None:
        """Remember the program checks that an event brings for its prompt."""
        checks = (event.feedback.context or {}).get("checks")
        completion = self._completion(event)
        if isinstance(checks, list) and checks and completion is not None:
            self._checks[prompt_hash(completion)] = tuple(c for c in checks if isinstance(c, dict))

    def item(self, event: Event) -> Comparison | Judgement | Demonstration | str:
        """Return what an event is in training, or why it is nothing."""
        feedback = event.feedback
        if isinstance(feedback, DemonstrationEvent):
            return self._demonstration(feedback, event)
        weight = self._settings.reward_rater_weights.get(event.rater, 1.0)
        if weight <= 0:
            return "the rater's weight is 0"
        match feedback:
            case Ranking():
                return self._comparison(feedback, event, weight)
            case Thumb():
                return self._judgement(feedback, float(feedback.value == "up"), event, weight)
            case Rating():
                return self._judgement(feedback, (feedback.score - 1) / 6, event, weight)
        raise AssertionError(f"unknown feedback {event.feedback!r}")

    def _completion(self, event: Event) -> Completion | None:
        feedback = event.feedback
        if isinstance(feedback, Ranking):
            found = self._choices.get((feedback.groups[0][0].completion_id, feedback.groups[0][0].choice))
        elif isinstance(feedback, DemonstrationEvent):
            return self._first.get(feedback.completion_id or "")
        else:
            found = self._choices.get((feedback.completion_id, feedback.choice))
        return found[0] if found else None

    def _comparison(self, ranking: Ranking, event: Event, weight: float) -> Comparison | str:
        responses, ranks, prompt = [], [], None
        for rank, group in enumerate(ranking.groups):
            for ref in group:
                found = self._choices.get((ref.completion_id, ref.choice))
                if found is None:
                    return "the completion is no longer stored"
                prompt = prompt or self._prompt(found[0])
                responses.append(self._response(*found))
                ranks.append(rank)
        if len(ranking.groups) < 2:
            return "all responses are tied"
        if not all(responses):
            return "a response is empty"
        assert prompt is not None
        return Comparison(
            prompt, responses, ranks, event.source, weight, rater_group(event), event.event_id, event.rater
        )

    def _judgement(
        self, given: Thumb | Rating, target: float, event: Event, weight: float
    ) -> Judgement | str:
        found = self._choices.get((given.completion_id, given.choice))
        if found is None:
            return "the completion is no longer stored"
        response = self._response(*found)
        if not response:
            return "a response is empty"
        prompt = self._prompt(found[0])
        return Judgement(
            prompt, response, target, given.type, weight, rater_group(event), event.event_id, event.rater
        )

    def _demonstration(self, written: DemonstrationEvent, event: Event) -> Demonstration | str:
        if written.messages is not None:
            messages = [message.model_dump() for message in written.messages]
            digest = hashlib.sha256(repr(messages).encode("utf-8", "surrogatepass")).hexdigest()
            prompt = self._make_prompt(f"messages:{digest}", self._clean(self._render(messages)))
        else:
            completion = self._first.get(written.completion_id or "")
            if completion is None:
                return "the completion is no longer stored"
            prompt = self._prompt(completion)
        text = self._written(written.text)
        return Demonstration(prompt, text, event.event_id, event.rater, event.source)

    def responses(self, completion: Completion) -> tuple[Prompt, list[tuple[int, list[int]]]]:
        """Return a completion's prompt and its choices that aren't empty, each with its index."""
        responses = [(choice.index, self._response(completion, choice)) for choice in completion.choices]
        return self._prompt(completion), [(index, ids) for index, ids in responses if ids]

    def _prompt(self, completion: Completion) -> Prompt:
        key = (completion.id, completion.part, None)
        if key not in self._cleaned:
            self._cleaned[key] = self._clean(self._prompt_tokens(completion))
        return self._make_prompt(prompt_hash(completion), self._cleaned[key])

    def _prompt_tokens(self, completion: Completion) -> list[int]:
        if completion.prompt_token_ids:
            return completion.prompt_token_ids
        if completion.messages is not None:
            return self._render(completion.messages)
        ids: list[int] = self._tokenizer(completion.prompt or "").input_ids
        return ids

    def _make_prompt(self, key: str, token_ids: Iterable[int]) -> Prompt:
        return Prompt(key, list(token_ids)[-self._settings.prompt_tokens :], self._checks.get(key, ()))

    def _render(self, messages: list[dict[str, Any]]) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return ids

    def _response(self, completion: Completion, choice: Choice) -> list[int]:
        key = (completion.id, completion.part, choice.index)
        if key not in self._cleaned:
            ids = choice.token_ids
            self._cleaned[key] = self._clean(ids) if ids else self._written(choice.text)
        return self._cleaned[key][: self._settings.response_tokens]

    def _clean(self, ids: list[int]) -> list[int]:
        """Return the tokens, or where something personal stands in them those of the cleaned text.

        The tokens are read, not the client's messages: they are what the policy saw, template and all, and a
        prompt that was sent as tokens has nothing else.
        """
        if self._filter is None:
            return ids
        text, replaced = self._filter.clean(
            self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        self.replaced += replaced
        if not replaced:
            return ids
        cleaned: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return cleaned

    def _written(self, text: str) -> list[int]:
        if self._filter is not None:
            text, replaced = self._filter.clean(text)
            self.replaced += replaced
        # A written text ends where its author ended it, so it carries the end-of-turn token.
        ids = [*self._tokenizer(text, add_special_tokens=False).input_ids, self._tokenizer.eos_token_id]
        return ids[: self._settings.response_tokens]
