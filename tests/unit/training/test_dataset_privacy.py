"""Nothing personal gets into a data set, whatever form it is stored in; the rest stays token for token."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from feedback.events import FEEDBACK, Event
from feedback.records import Choice, Completion, prompt_hash
from feedback.store import Slice
from training.dataset import Dataset, build, responses_of, with_older
from training.settings import TrainingSettings

SECRET = "ann@example.org"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A token to each byte, and special ones for the turns."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=TEMPLATE)
    found.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    return found


TOKENIZER = bytes_tokenizer()


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False).input_ids
    return ids


def completion(name: str, prompt: str, *replies: str, form: str = "tokens") -> Completion:
    """As the engine records one (`tokens`), as it is imported (`text`), or on a plain prompt (`plain`)."""
    messages = [{"role": "user", "content": prompt}]
    tokens = form == "tokens"
    return Completion(
        id=name,
        key_id="k",
        endpoint="e",
        created_at=0.0,
        messages=None if form == "plain" else messages,
        prompt=prompt if form == "plain" else None,
        prompt_token_ids=encode(f"<|user|>{prompt}<end><|assistant|>") if tokens else [],
        choices=[
            Choice(index=i, text=reply, token_ids=encode(f"{reply}<end>") if tokens else [])
            for i, reply in enumerate(replies)
        ],
    )


def ranking(of: str, number: int = 0) -> Event:
    groups = [[{"completion_id": of, "choice": 0}], [{"completion_id": of, "choice": 1}]]
    return said(number, {"type": "ranking", "groups": groups})


def said(number: int, feedback: dict[str, Any]) -> Event:
    found = FEEDBACK.validate_python(feedback)
    return Event(event_id=f"e{number}", key_id="k", rater="k/", received_at=0.0, feedback=found)


def built(events: list[Event], *completions: Completion, **settings: Any) -> Dataset:
    by_id = {one.id: [one] for one in completions}
    return build(Slice(events, by_id), TOKENIZER, TrainingSettings(held_out_share=0.001, **settings))


def texts(dataset: Dataset) -> list[str]:
    items = [*dataset.train.comparisons, *dataset.train.judgements, *dataset.train.demonstrations]
    found = [item.prompt.token_ids for item in items]
    found += [ids for item in dataset.train.comparisons for ids in item.responses]
    found += [item.response for item in [*dataset.train.judgements, *dataset.train.demonstrations]]
    return [TOKENIZER.decode(ids) for ids in found]


@pytest.mark.parametrize("form", ["tokens", "text", "plain"])
def test_prompts_and_responses_are_cleaned_in_every_form(form: str) -> None:
    one = completion("a", f"I am {SECRET}", f"Hi {SECRET}!", "Call +44 20 7946 0958", form=form)
    written = {"type": "demonstration", "completion_id": "a", "text": f"Dear {SECRET}"}
    own = [{"role": "user", "content": f"mail {SECRET}"}]
    events = [
        ranking("a"),
        said(1, written),
        said(2, {"type": "demonstration", "messages": own, "text": "ok"}),
    ]
    dataset = built(events, one)
    prompt = "I am <EMAIL>" if form == "plain" else "<|user|>I am <EMAIL><end><|assistant|>"
    assert texts(dataset) == [
        prompt,
        prompt,
        "<|user|>mail <EMAIL><end><|assistant|>",
        "Hi <EMAIL>!<end>",
        "Call <PHONE><end>",
        "Dear <EMAIL><end>",
        "ok<end>",
    ]
    # Each text once, however many events speak of it.
    assert dataset.replaced == {"email": 4, "phone": 1}
    assert all(SECRET not in prompt.key for prompt in dataset.train.prompts.values())


def test_where_nothing_is_found_the_tokens_are_those_that_were_sampled() -> None:
    # These bytes are no text, and would not come back from one.
    odd = completion("a", "hi", "x", "y").model_copy(
        update={
            "prompt_token_ids": [3, 200, 201, 3],
            "choices": [Choice(index=0, text="?", token_ids=[190, 7])],
        }
    )
    thumb = said(0, {"type": "thumb", "completion_id": "a", "value": "up"})
    (judged,) = built([thumb], odd).train.judgements
    assert (judged.prompt.token_ids, judged.response) == ([3, 200, 201, 3], [190, 7])


def test_a_prompt_keeps_its_side_and_its_identity() -> None:
    one = completion("a", SECRET, "x", "y")
    keys = [list(built([ranking("a")], one, privacy_filter=on).train.prompts) for on in (True, False)]
    assert keys == [[prompt_hash(one)], [prompt_hash(one)]]


def test_what_is_cleaned_is_cut_to_length_afterwards() -> None:
    one = completion("a", f"0123456789 {SECRET}", f"{SECRET} 123456789", "y")
    (item,) = built([ranking("a")], one, prompt_tokens=12, response_tokens=10).train.comparisons
    assert TOKENIZER.decode(item.prompt.token_ids) == "89 <EMAIL><end><|assistant|>"
    assert TOKENIZER.decode(item.responses[0]) == "<EMAIL> 12"


def test_older_feedback_and_what_is_scored_are_cleaned_too() -> None:
    settings = TrainingSettings(held_out_share=0.001, reward_older_share=0.5)
    old, new = completion("old", SECRET, SECRET, "y"), completion("new", "hi", "x", "y")
    dataset = built([ranking("new")], new)
    side = with_older(dataset.train, Slice([ranking("old", 1)], {"old": [old]}), TOKENIZER, settings)
    assert TOKENIZER.decode(side.comparisons[1].responses[0]) == "<EMAIL><end>"
    ((prompt, responses),) = responses_of([old], TOKENIZER, settings)
    assert TOKENIZER.decode(prompt.token_ids) == "<|user|><EMAIL><end><|assistant|>"
    assert [TOKENIZER.decode(ids) for _, ids in responses] == ["<EMAIL><end>", "y<end>"]


def test_the_filter_can_be_turned_off_and_told_other_countries() -> None:
    one = completion("a", "020 7946 0958", SECRET, "y")
    raw = built([ranking("a")], one, privacy_filter=False)
    assert (texts(raw)[1], raw.replaced) == (f"{SECRET}<end>", {})
    british = built([ranking("a")], one, privacy_phone_regions=["GB"])
    assert british.replaced == {"email": 1, "phone": 1}
    assert built([ranking("a")], one).replaced == {"email": 1}
