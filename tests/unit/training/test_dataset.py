"""What events become in training: tokens, ranks, targets, checks and sides."""

import itertools
from typing import Any

import pytest
from unit.training.tiny import END, WORDS, tiny_tokenizer

from evaluation.prompts import is_held_out
from feedback.events import FEEDBACK, Event
from feedback.records import Choice, Completion, prompt_hash
from feedback.store import Slice
from training.dataset import Dataset, build, rater_group, responses_of, with_older
from training.settings import TrainingSettings

_numbers = itertools.count()


def _completion(name: str, *, tokens: bool = True, prompt: str = "w1 w2", n: int = 3) -> Completion:
    messages = [{"role": "user", "content": prompt}]
    choices = [
        Choice(index=i, text=f"w{10 + i}", token_ids=[WORDS.index(f"w{10 + i}"), END] if tokens else [])
        for i in range(n)
    ]
    rendered = tiny_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return Completion(
        id=name,
        key_id="k",
        endpoint="chat",
        created_at=0.0,
        messages=messages,
        prompt_token_ids=rendered if tokens else [],
        choices=choices,
    )


def _event(source: str = "serving", rater_id: str = "k/", **feedback: Any) -> Event:
    return Event(
        event_id=str(next(_numbers)),
        key_id="k",
        rater=rater_id,
        source=source,
        received_at=0.0,
        feedback=FEEDBACK.validate_python(feedback),
    )


def _build(events: list[Event], *completions: Completion, **settings: Any) -> Dataset:
    by_id = {completion.id: [completion] for completion in completions}
    return build(Slice(events, by_id), tiny_tokenizer(), TrainingSettings(**settings))


def _ref(choice: int, name: str = "c") -> dict[str, Any]:
    return {"completion_id": name, "choice": choice}


def _all(dataset: Dataset, kind: str) -> list[Any]:
    return [*getattr(dataset.train, kind), *getattr(dataset.held_out, kind)]


def test_a_ranking_keeps_its_ties_and_its_source() -> None:
    event = _event("elsewhere", type="ranking", groups=[[_ref(2)], [_ref(0), _ref(1)]])
    (comparison,) = _all(_build([event], _completion("c")), "comparisons")
    assert comparison.responses == [[WORDS.index(f"w{w}"), END] for w in (12, 10, 11)]
    assert comparison.ranks == [0, 1, 1]
    assert comparison.source == "elsewhere"
    assert comparison.prompt.token_ids == _completion("c").prompt_token_ids


def test_imported_text_is_tokenised_as_served_text_would_be() -> None:
    event = _event(type="ranking", groups=[[_ref(0)], [_ref(1)]])
    (served,) = _all(_build([event], _completion("c")), "comparisons")
    (imported,) = _all(_build([event], _completion("c", tokens=False)), "comparisons")
    assert imported.prompt.token_ids == served.prompt.token_ids
    assert imported.responses == served.responses


@pytest.mark.parametrize(
    ("feedback", "target"),
    [
        ({"type": "thumb", "value": "up"}, 1.0),
        ({"type": "thumb", "value": "down"}, 0.0),
        ({"type": "rating", "score": 7}, 1.0),
        ({"type": "rating", "score": 4}, 0.5),
        ({"type": "rating", "score": 1}, 0.0),
    ],
)
def test_thumbs_and_ratings_become_targets(feedback: dict[str, Any], target: float) -> None:
    (judgement,) = _all(_build([_event(**feedback, **_ref(1))], _completion("c")), "judgements")
    assert judgement.target == target
    assert judgement.kind == feedback["type"]
    assert judgement.response == [WORDS.index("w11"), END]


def test_a_demonstration_ends_where_its_author_ended_it() -> None:
    on_completion = _event(type="demonstration", completion_id="c", text="w5 w6")
    alone = _event(type="demonstration", messages=[{"role": "user", "content": "w3"}], text="w7")
    first, second = _all(_build([on_completion, alone], _completion("c")), "demonstrations")
    by_length = sorted((first, second), key=lambda item: len(item.response))
    assert by_length[0].response == [WORDS.index("w7"), END]
    assert by_length[1].response == [WORDS.index("w5"), WORDS.index("w6"), END]
    assert by_length[1].prompt.token_ids == _completion("c").prompt_token_ids


def test_checks_ride_on_any_event_of_the_prompt() -> None:
    checks = [{"kind": "no_commas"}]
    events = [
        _event(type="thumb", value="up", **_ref(0)),
        _event(type="rating", score=3, **_ref(1), context={"checks": checks}),
    ]
    dataset = _build(events, _completion("c"))
    assert [item.prompt.checks for item in _all(dataset, "judgements")] == [tuple(checks)] * 2


def test_what_cannot_be_used_is_counted() -> None:
    events = [
        _event(type="ranking", groups=[[_ref(0), _ref(1)]]),
        _event(type="thumb", value="up", **_ref(0, "gone")),
        _event(type="thumb", value="up", **_ref(0, "empty")),
    ]
    empty = Completion(
        id="empty",
        key_id="k",
        endpoint="chat",
        created_at=0.0,
        prompt_token_ids=[5],
        choices=[Choice(index=0, text="", token_ids=[])],
    )
    dataset = _build(events, _completion("c"), empty)
    assert dataset.left_out["all responses are tied"] == 1
    assert dataset.left_out["the completion is no longer stored"] == 1
    # An empty written response still says "end here".
    assert [item.response for item in _all(dataset, "judgements")] == [[END]]


def test_long_prompts_lose_their_beginning_and_long_responses_their_end() -> None:
    prompt = " ".join(f"w{i}" for i in range(20))
    event = _event(type="demonstration", completion_id="c", text=" ".join(f"w{i}" for i in range(20)))
    dataset = _build([event], _completion("c", prompt=prompt), prompt_tokens=8, response_tokens=8)
    (item,) = _all(dataset, "demonstrations")
    assert item.prompt.token_ids == _completion("c", prompt=prompt).prompt_token_ids[-8:]
    assert item.response == [WORDS.index(f"w{i}") for i in range(8)]


def test_a_prompt_is_on_one_side_whatever_is_said_of_it() -> None:
    events, completions = [], []
    for i in range(40):
        completions.append(_completion(f"c{i}", prompt=f"w{i} w{(7 * i) % 59}"))
        events.append(_event(type="ranking", groups=[[_ref(0, f"c{i}")], [_ref(1, f"c{i}")]]))
        events.append(_event(type="thumb", value="up", **_ref(0, f"c{i}")))
    dataset = _build(events, *completions)
    assert not set(dataset.train.prompts) & set(dataset.held_out.prompts)
    for side in (dataset.train, dataset.held_out):
        assert side.prompts
        assert {item.prompt.key for item in side.comparisons} == set(side.prompts)
        assert {item.prompt.key for item in side.judgements} == set(side.prompts)


def test_the_held_out_share_is_kept() -> None:
    share = sum(is_held_out(str(i), 0.3) for i in range(4000)) / 4000
    assert share == pytest.approx(0.3, abs=0.03)


def test_raters_weigh_as_the_settings_say_and_belong_to_a_group() -> None:
    said = {"type": "ranking", "groups": [[_ref(0)], [_ref(1)]]}
    events = [
        _event(rater_id="k/ann", **said),
        _event(rater_id="k/bob", **said, context={"group": "experts"}),
        _event(rater_id="j/eve", **said),
        _event(rater_id="k/ann", type="thumb", value="up", **_ref(0)),
    ]
    weights = {"k/ann": 0.5, "k/bob": 2.0, "j/eve": 0.0}
    dataset = _build(events, _completion("c"), reward_rater_weights=weights)
    found = [(item.weight, item.rater_group) for item in _all(dataset, "comparisons")]
    assert found == [(0.5, "k"), (2.0, "experts")]
    assert [(item.weight, item.rater_group) for item in _all(dataset, "judgements")] == [(0.5, "k")]
    assert dataset.left_out["the rater's weight is 0"] == 1
    assert rater_group(events[2]) == "j"


@pytest.mark.parametrize(
    ("settings", "use", "words"),
    [
        ({"sft_minimum": 2}, "trained", None),
        ({"sft_minimum": 3}, "trained", "only its prompt is used"),
        ({"sft_minimum": 3, "algorithm": "rloo"}, "trained", "only its prompt is used"),
        ({"sft_minimum": 3, "algorithm": "dpo"}, "left_out", "SFT is skipped"),
    ],
)
def test_the_use_of_every_event_is_told_once(settings: dict[str, Any], use: str, words: str | None) -> None:
    prompts = [f"w{i}" for i in range(40)]
    completions = {prompt: _completion(f"c{prompt}", prompt=prompt) for prompt in prompts}
    said = {
        name: [
            _event(type="ranking", groups=[[_ref(0, name)], [_ref(1, name)]]),
            _event(type="ranking", groups=[[_ref(0, name), _ref(1, name)]]),
            _event(type="thumb", value="up", **_ref(0, name)),
        ]
        for name in (completion.id for completion in completions.values())
    }
    dataset = _build([event for events in said.values() for event in events], *completions.values())
    train, held_out = (
        {f"c{prompt}" for prompt in prompts if is_held_out(prompt_hash(completions[prompt]), 0.3) is side}
        for side in (False, True)
    )
    written = [_event(type="demonstration", completion_id=name, text="w5") for name in sorted(train)[:2]]
    written += [_event(type="demonstration", completion_id=name, text="w5") for name in sorted(held_out)[:1]]
    everything = [event for events in said.values() for event in events] + written
    dataset = _build(everything, *completions.values(), **settings)
    found = {item.event_id: (item.use, item.reason) for item in dataset.uses(TrainingSettings(**settings))}
    assert len(dataset.uses(TrainingSettings(**settings))) == len(everything) == len(found)
    for side, expected in ((train, "trained"), (held_out, "held_out")):
        for name in side:
            ranked, tied, thumb = (found[event.event_id] for event in said[name])
            assert ranked == thumb == (expected, None)
            assert tied == ("left_out", "all responses are tied")
    for event in written[:2]:
        assert found[event.event_id][0] == use
        assert (words is None) == (found[event.event_id][1] is None)
        assert (words or "") in (found[event.event_id][1] or "")
    assert found[written[2].event_id] == ("held_out", None)


def _many(first: int, count: int) -> Slice:
    completions = [_completion(f"c{i}", prompt=f"w{i % 59} w{i // 59}") for i in range(first, first + count)]
    events = [
        _event(type="ranking", groups=[[_ref(0, completion.id)], [_ref(1, completion.id)]])
        for completion in completions
    ]
    events.append(_event(type="demonstration", completion_id=completions[0].id, text="w5"))
    return Slice(events, {completion.id: [completion] for completion in completions})


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_older_data_makes_up_its_share_and_no_more(share: float) -> None:
    settings = TrainingSettings(reward_older_share=share)
    new = build(_many(0, 90), tiny_tokenizer(), settings).train
    older = _many(200, 300)
    side = with_older(new, older, tiny_tokenizer(), settings)
    added = side.comparisons[len(new.comparisons) :]
    assert side.comparisons[: len(new.comparisons)] == new.comparisons
    assert len(added) <= share * len(side.comparisons)
    assert len(added) >= 0.8 * share * len(side.comparisons)
    assert not any(is_held_out(item.prompt.key, settings.held_out_share) for item in added)
    assert len({item.prompt.key for item in added}) == len(added)
    assert side.demonstrations == new.demonstrations
    assert with_older(new, older, tiny_tokenizer(), settings) == side
    if share:
        other = settings.model_copy(update={"seed": 1})
        assert with_older(new, older, tiny_tokenizer(), other).comparisons != side.comparisons


def test_few_older_data_are_all_taken_from_the_training_side() -> None:
    settings = TrainingSettings(reward_older_share=0.5)
    new, older = build(_many(0, 90), tiny_tokenizer(), settings).train, _many(200, 10)
    side = with_older(new, older, tiny_tokenizer(), settings)
    expected = build(older, tiny_tokenizer(), settings).train.comparisons
    assert sorted(i.prompt.key for i in side.comparisons[len(new.comparisons) :]) == sorted(
        i.prompt.key for i in expected
    )


def test_responses_of_recorded_completions_keep_their_index() -> None:
    record = Completion(
        id="c",
        key_id="k",
        endpoint="chat",
        created_at=0.0,
        prompt_token_ids=[5],
        choices=[Choice(index=i, text="", token_ids=ids) for i, ids in ((2, [7, END]), (3, []), (4, [8]))],
    )
    settings = TrainingSettings()
    ((prompt, responses),) = responses_of([record], tiny_tokenizer(), settings)
    assert prompt.token_ids == [5]
    assert responses == [(2, [7, END]), (3, [END]), (4, [8])]
