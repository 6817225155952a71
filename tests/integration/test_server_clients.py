"""The official clients against the real engine: what they see is what is recorded, token by token."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anthropic
import httpx
import openai
import pytest
import sqlalchemy as sa
from server_fixture import Installation, served, wait_for_record
from transformers import AutoTokenizer

from evaluation.sampler import TransformersSampler
from evaluation.tax import measure, sampled
from feedback import tables
from feedback.records import Choice, Completion
from instructloop import cli

__all__ = ["served"]

TAX_TASKS = Path(__file__).with_name("tax_tasks")
ASK = [{"role": "user", "content": "Write two sentences about frogs."}]


@pytest.fixture
def client(served: Installation) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.client_key, max_retries=0) as client:
        yield client


def check_choice(choice: Choice, served: Installation) -> None:
    """Every sampled token has an id, a logprob and a version."""
    assert choice.token_ids
    assert len(choice.logprobs) == len(choice.token_ids)
    assert all(logprob <= 0 for logprob in choice.logprobs)
    desired = served.registry.desired()
    assert desired is not None
    assert [(span.version, span.start, span.end) for span in choice.weight_spans] == [
        (desired.name, 0, len(choice.token_ids))
    ]


def check_record(record: Completion, served: Installation) -> None:
    assert record.key_id == served.client_key.split("_")[2]
    assert record.prompt_token_ids
    assert record.latency_seconds > 0
    for choice in record.choices:
        check_choice(choice, served)


def test_several_choices_of_a_chat(served: Installation, client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="policy", messages=ASK, n=3, max_tokens=24, temperature=1.0, user="zoe", seed=3
    )
    answer = raw.parse()
    assert answer.id == raw.headers["x-completion-id"]
    (record,) = wait_for_record(served, answer.id)
    check_record(record, served)
    assert (record.endpoint, record.user, record.messages) == ("/v1/chat/completions", "zoe", ASK)
    assert (record.sampling["n"], record.sampling["temperature"], record.sampling["max_tokens"]) == (
        3,
        1.0,
        24,
    )
    seen = [(choice.index, choice.message.content, choice.finish_reason) for choice in answer.choices]
    assert [(choice.index, choice.text, choice.finish_reason) for choice in record.choices] == seen
    assert len({choice.text for choice in record.choices}) > 1
    assert all(choice.logprobs is None for choice in answer.choices)
    assert answer.usage is not None
    assert sum(len(choice.token_ids) for choice in record.choices) == answer.usage.completion_tokens
    assert len(record.prompt_token_ids) == answer.usage.prompt_tokens


def test_a_stream_adds_up(served: Installation, client: openai.OpenAI) -> None:
    texts = {0: "", 1: ""}
    reasons = {}
    ids = set()
    with client.chat.completions.create(
        model="policy", messages=ASK, n=2, max_tokens=40, stream=True, stream_options={"include_usage": True}
    ) as stream:
        header = stream.response.headers["x-completion-id"]
        for chunk in stream:
            ids.add(chunk.id)
            for choice in chunk.choices:
                assert choice.logprobs is None
                texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
            usage = chunk.usage
    assert ids == {header}
    (record,) = wait_for_record(served, header)
    check_record(record, served)
    assert {choice.index: choice.text for choice in record.choices} == texts
    assert {choice.index: choice.finish_reason for choice in record.choices} == reasons
    assert usage is not None
    assert sum(len(choice.token_ids) for choice in record.choices) == usage.completion_tokens


def test_logprobs_that_were_asked_for_are_those_recorded(served: Installation, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="policy", messages=ASK, max_tokens=12, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    (record,) = wait_for_record(served, answer.id)
    assert record.choices[0].logprobs == pytest.approx([token.logprob for token in content], abs=1e-6)
    assert all(len(token.top_logprobs) == 2 for token in content)


def test_greedy_answers_do_not_change_because_they_are_recorded(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(model="policy", messages=ASK, max_tokens=24, temperature=0)
    asked = client.chat.completions.create(
        model="policy", messages=ASK, max_tokens=24, temperature=0, logprobs=True
    )
    assert plain.choices[0].message.content == asked.choices[0].message.content


def test_several_prompts_are_parts_of_one_completion(served: Installation, client: openai.OpenAI) -> None:
    prompts = ["The capital of France is", "Two plus two is"]
    answer = client.completions.create(model="policy", prompt=prompts, n=2, max_tokens=8, temperature=1)
    parts = wait_for_record(served, answer.id, parts=2)
    assert [(part.part, part.parts, part.prompt) for part in parts] == [
        (0, 2, prompts[0]),
        (1, 2, prompts[1]),
    ]
    recorded = [choice for part in parts for choice in part.choices]
    assert [(choice.index, choice.text) for choice in recorded] == [
        (choice.index, choice.text) for choice in answer.choices
    ]
    for part in parts:
        check_record(part, served)


def test_several_prompts_in_a_stream(served: Installation, client: openai.OpenAI) -> None:
    texts: dict[int, str] = {}
    for chunk in client.completions.create(model="policy", prompt=["One", "Two"], max_tokens=8, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
        id_ = chunk.id
    parts = wait_for_record(served, id_, parts=2)
    assert {choice.index: choice.text for part in parts for choice in part.choices} == texts


def test_echo_and_prompt_logprobs_stay_the_client_s_affair(
    served: Installation, client: openai.OpenAI
) -> None:
    answer = client.completions.create(
        model="policy", prompt="The sky is", max_tokens=5, echo=True, extra_body={"prompt_logprobs": 1}
    )
    (choice,) = answer.choices
    assert choice.text.startswith("The sky is")
    assert choice.logprobs is None
    assert choice.model_extra is not None
    assert len(choice.model_extra["prompt_logprobs"]) == 3
    (record,) = wait_for_record(served, answer.id)
    assert "The sky is" + record.choices[0].text == choice.text
    check_record(record, served)


def test_benchmarks_score_prompts_and_leave_no_records(
    served: Installation,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    desired = served.registry.desired()
    assert desired is not None
    version = served.registry.version(desired.name).path
    command = ["tax", "--url", f"{served.url}/v1", "--tasks", str(TAX_TASKS), "--tokenizer", str(version)]
    monkeypatch.setenv("OPENAI_API_KEY", served.client_key)
    monkeypatch.delenv("INSTRUCTLOOP_DATA_DIR", raising=False)
    with served.database.connect() as connection:
        before = connection.execute(sa.select(sa.func.count()).select_from(tables.completions)).scalar_one()
    assert cli.run([*command, "--output", str(tmp_path / "before.json")]) == 0
    # The same model by Transformers, through the other way in.
    tokenizer = AutoTokenizer.from_pretrained(str(version))
    (expected,) = measure(sampled(TransformersSampler(version), tokenizer), [str(TAX_TASKS)], None)
    kept = json.loads((tmp_path / "before.json").read_text())["facts"]
    assert kept == expected.as_dict()
    assert sum(expected.right) >= 6
    assert cli.run([*command, "--limit", "8", "--before", str(tmp_path / "before.json")]) == 0
    assert "0.000 [0.000, 0.000]" in capsys.readouterr().out.splitlines()[-1]
    # A record that comes after all the others would have brought theirs, too.
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.client_key) as client:
        answer = client.completions.create(model="policy", prompt="Hello", max_tokens=2)
    wait_for_record(served, answer.id)
    with served.database.connect() as connection:
        after = connection.execute(sa.select(sa.func.count()).select_from(tables.completions)).scalar_one()
    assert after == before + 1
    monkeypatch.setenv("OPENAI_API_KEY", "il_client_wrong")
    assert cli.run(command) == 2
    assert "401" in capsys.readouterr().err


def test_beam_search_works_and_is_not_recorded(served: Installation, client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model="policy",
        prompt="The sky is",
        max_tokens=4,
        n=2,
        temperature=0,
        extra_body={"use_beam_search": True},
    )
    assert len(raw.parse().choices) == 2
    assert "x-completion-id" not in raw.headers
    assert served.store.completion(raw.parse().id) == []


@pytest.mark.parametrize("stream", [False, True])
def test_responses(served: Installation, client: openai.OpenAI, stream: bool) -> None:
    asked = {
        "model": "policy",
        "instructions": "Be brief.",
        "input": "Name a colour.",
        "max_output_tokens": 16,
        "extra_body": {"request_id": "resp_of_my_own"},
    }
    if stream:
        text = ""
        for event in client.responses.create(stream=True, **asked):  # type: ignore[call-overload]
            if event.type == "response.created":
                id_ = event.response.id
            if event.type == "response.output_text.delta":
                text += event.delta
    else:
        answer = client.responses.create(**asked)  # type: ignore[call-overload]
        id_, text = answer.id, answer.output_text
    assert id_.startswith("resp_")
    assert id_ != "resp_of_my_own"
    (record,) = wait_for_record(served, id_)
    check_record(record, served)
    assert record.choices[0].text == text
    assert record.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a colour."},
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_messages_of_the_anthropic_client(served: Installation, stream: bool) -> None:
    client = anthropic.Anthropic(base_url=served.url, api_key=served.client_key, max_retries=0)
    asked = {
        "model": "policy",
        "system": "Be brief.",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Name an animal."}]}],
        "max_tokens": 16,
        "metadata": {"user_id": "zoe"},
    }
    if stream:
        with client.messages.stream(**asked) as events:  # type: ignore[arg-type]
            text = "".join(events.text_stream)
            id_ = events.get_final_message().id
            assert events.response.headers["x-completion-id"] == id_
    else:
        answer = client.messages.create(**asked)  # type: ignore[call-overload]
        id_, text = answer.id, answer.content[0].text
    client.close()
    (record,) = wait_for_record(served, id_)
    check_record(record, served)
    assert (record.endpoint, record.user, record.choices[0].text) == ("/v1/messages", "zoe", text)
    assert record.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name an animal."},
    ]


def test_stop_strings(served: Installation, client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="policy", prompt="1, 2, 3, 4, 5, 6,", max_tokens=30, temperature=0, stop=[" 9"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert " 9" not in answer.choices[0].text
    (record,) = wait_for_record(served, answer.id)
    check_record(record, served)
    assert record.choices[0].text == answer.choices[0].text
    assert record.sampling["stop"] == [" 9"]


def test_structured_output(served: Installation, client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="policy",
        messages=[{"role": "user", "content": "Invent a person."}],
        max_tokens=100,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
    )
    content = answer.choices[0].message.content
    assert content is not None
    assert set(json.loads(content)) == {"name", "age"}
    (record,) = wait_for_record(served, answer.id)
    check_record(record, served)
    assert record.choices[0].text == content


def test_a_stream_that_the_client_leaves_is_recorded_as_far_as_it_came(
    served: Installation, client: openai.OpenAI
) -> None:
    seen = ""
    with client.completions.create(
        model="policy", prompt="Once", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        for chunk in stream:
            seen += chunk.choices[0].text
            if len(seen) > 40:
                break
    (record,) = wait_for_record(served, chunk.id)
    (choice,) = record.choices
    assert choice.finish_reason == "abort"
    assert choice.text.startswith(seen)
    assert len(choice.token_ids) < 900
    check_record(record, served)


def test_a_plain_request_that_the_client_leaves_is_recorded_as_far_as_it_came(served: Installation) -> None:
    body = {
        "model": "policy",
        "prompt": "Once",
        "max_tokens": 900,
        "n": 2,
        "ignore_eos": True,
        "user": "leaver",
    }
    with served.http(served.client_key) as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body, timeout=2)
    table = tables.completions
    deadline = time.monotonic() + 20
    while True:
        with served.database.connect() as connection:
            id_ = connection.execute(sa.select(table.c.id).where(table.c.user == "leaver")).scalar()
        if id_ is not None:
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (record,) = wait_for_record(served, id_)
    check_record(record, served)
    assert [choice.finish_reason for choice in record.choices] == ["abort", "abort"]
    assert all(0 < len(choice.token_ids) < 900 for choice in record.choices)


def test_the_engine_s_own_errors_and_routes(served: Installation, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["policy"]
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=ASK)
    assert "x-completion-id" not in unknown.value.response.headers
    assert unknown.value.body["message"]  # type: ignore[index]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="policy", messages=ASK, max_tokens=100_000)
    with served.http(served.client_key) as http:
        tokens = http.post("/tokenize", json={"model": "policy", "prompt": "hello there"}).json()["tokens"]
        back = http.post("/detokenize", json={"model": "policy", "tokens": tokens}).json()["prompt"]
        assert back == "hello there"
        for path in ("/invocations", "/inference/v1/generate", "/pause", "/load", "/version", "/ping"):
            assert http.post(path, json={}).status_code == 404
            assert http.get(path).status_code == 404


def test_a_crowd_of_seeded_requests_leaves_the_engine_alive(client: openai.OpenAI) -> None:
    """More prompt tokens at once than the engine takes in a step: a CPU's must not split a seeded one."""

    def ask(number: int) -> str:
        found = client.completions.create(
            model="policy", prompt=f"{number} " + "frog " * 250, max_tokens=2, seed=number, temperature=1.0
        )
        return found.choices[0].text

    with ThreadPoolExecutor(40) as pool:
        first = list(pool.map(ask, range(40)))
    assert len(first) == 40
    assert ask(7) == ask(7)
