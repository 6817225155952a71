"""schemathesis on our own OpenAPI document over real HTTP, for each kind of caller: nothing may break, and
every answer must be as the document says. `make fuzz` runs more (INSTRUCTLOOP_FUZZ_EXAMPLES an operation).
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fuzz_server import FuzzServer, running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.settings import ServerSettings

if TYPE_CHECKING:
    from conftest import RedisServer

EXAMPLES = int(os.environ.get("INSTRUCTLOOP_FUZZ_EXAMPLES", "10"))
UNLIMITED = {"rate_per_key": "none", "rate_per_rater": "none", "rate_per_end_user": "none"}
HERE = Path(__file__).parent

CONFIG = """
hooks = "fuzz_hooks"
seed = {seed}
parameters = {parameters}
generation.max-examples = {examples}
generation.with-security-parameters = false
generation.database = "none"
cache.enabled = false
reports.json.path = {report}
warnings = false

[headers]
{header}

[checks]
not_a_server_error.expected-statuses = {not_faults}
# 410: what was forgotten while this runs.
positive_data_acceptance.expected-statuses = ["2xx", "401", "403", "404", "409", "410", "429", "5xx"]

# What a document can't say: two to nine responses, each once; a completion or messages; ids that were issued.
[[operations]]
include-path = "/v1/feedback"
checks.positive_data_acceptance.expected-statuses = ["2xx", "403", "404", "409", "410", "422", "429", "503"]

# What makes a case a document can't say either: one prompt, and checks that are some.
[[operations]]
include-path = "/v1/cases"
checks.positive_data_acceptance.expected-statuses = ["2xx", "403", "404", "422", "429", "503"]

# It answers line by line.
[[operations]]
include-path = "/v1/feedback/batch"
checks.positive_data_acceptance.enabled = false
checks.negative_data_rejection.enabled = false

"""


@pytest.fixture
def faults(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What the server logged as an error, which no request may cause."""
    found: list[str] = []
    yield found
    logged = caplog.get_records("call")
    found += [record.getMessage() for record in logged if record.levelno >= logging.ERROR]
    assert found == []


Tell = Callable[[str], None]


def schemathesis(
    server: FuzzServer, directory: Path, who: str, *, not_faults: list[str], examples: int, tell: Tell
) -> None:
    """Run it as `who`; fails with what it prints unless it found nothing."""
    with httpx.Client(base_url=server.url) as http:
        key = {"Authorization": f"Bearer {server.keys['client']}"}
        document: Any = http.get("/v1/openapi.json", headers=key).json()
    lines = document["paths"]["/v1/feedback/batch"]["post"]["requestBody"]["content"]["application/x-ndjson"]
    lines["schema"] = {"type": "array", "items": {"$ref": "#/components/schemas/Feedback"}}
    (directory / "openapi.json").write_text(json.dumps(document))
    # Known ids, and some that nothing has: random ones alone would be unknown each time.
    ids = {
        "completion_id": [*server.completions, "chatcmpl-unknown"],
        "event_id": [*server.events, "fb-unknown"],
        "name": [*server.versions, "policy-0099"],
        "round_id": [1, 99],
    }
    places = {f"path.{name}": name for name in ids} | {"body.completion_id": "completion_id"}
    parameters = (
        f'"{place}" = {{ dictionary = "{name}", probability = 0.5 }}' for place, name in places.items()
    )
    header = (
        f'X-Feedback-Token = "{server.token}"'
        if who == "token"
        else f'Authorization = "Bearer {server.keys[who]}"'
    )
    report = directory / "report.json"
    config = CONFIG.format(
        seed=1,
        examples=examples,
        parameters=f"{{ {', '.join(parameters)} }}",
        report=json.dumps(str(report)),
        header=header,
        not_faults=json.dumps(["2xx", "3xx", "4xx", *not_faults]),
    )
    for name, values in ids.items():
        config += f"[dictionaries.{name}]\nvalues = {json.dumps(values)}\n"
    (directory / "config.toml").write_text(config)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", "config.toml"]
    done = subprocess.run(
        [*command, "run", "openapi.json", "--url", server.url, "--no-color"],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    found = json.loads(report.read_text())
    assert found["operations"]["tested"] == found["operations"]["total"]
    tell(f"{who}: {found['test_cases']['generated']} cases on {found['operations']['tested']} operations")


@pytest.mark.parametrize("who", ["client", "rater", "operator", "token"])
def test_nothing_breaks_and_answers_are_as_described(
    redis_server: "RedisServer", tmp_path: Path, who: str, faults: list[str], tell: Tell
) -> None:
    with running(tmp_path, redis_server.url, ServerSettings(**UNLIMITED)) as server:
        # 504: a promotion that is waited for, with no replica that follows it.
        schemathesis(server, tmp_path, who, not_faults=["504"], examples=EXAMPLES, tell=tell)


def test_refusals_without_redis_are_as_described(
    redis_server: "RedisServer", tmp_path: Path, faults: list[str], tell: Tell
) -> None:
    with running(tmp_path, redis_server.url, ServerSettings(**UNLIMITED)) as server:
        redis_server.kill()
        fewer = max(1, EXAMPLES // 10)
        schemathesis(server, tmp_path, "client", not_faults=["503"], examples=fewer, tell=tell)


def test_refusals_over_the_limit_are_as_described(
    redis_server: "RedisServer", tmp_path: Path, faults: list[str], tell: Tell
) -> None:
    rates, fewer = UNLIMITED | {"rate_per_key": "20/second"}, max(1, EXAMPLES // 10)
    with running(tmp_path, redis_server.url, ServerSettings(**rates)) as server:
        schemathesis(server, tmp_path, "operator", not_faults=["504"], examples=fewer, tell=tell)


TEXT = st.text(st.characters(), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@st.composite
def bodies(draw: st.DrawFn, completion_id: str) -> bytes:
    """An event with something odd in it, or one whose bytes were damaged, or no event at all."""
    ref = {"completion_id": completion_id}
    events: list[dict[str, Any]] = [
        {"type": "thumb", "value": "up", **ref},
        {"type": "rating", "score": 5, **ref},
        {"type": "ranking", "groups": [[ref], [ref | {"choice": 1}, ref | {"choice": 2}]]},
        {"type": "demonstration", "text": "x", **ref},
        {"type": "demonstration", "text": "x", "messages": [{"role": "user", "content": "x"}]},
    ]
    odd = {name: JSON for name in ("completion_id", "choice", "value", "score", "groups", "messages", "more")}
    odd |= {"text": TEXT, "comment": TEXT, "rater": TEXT, "context": st.dictionaries(TEXT, JSON)}
    names = draw(st.lists(st.sampled_from(sorted(odd)) | st.sampled_from(["comment", "context"]), max_size=2))
    event = draw(st.sampled_from(events)) | {name: draw(odd[name]) for name in names}
    body = json.dumps(event, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    match draw(st.integers(0, 9)):
        case 0:
            return draw(st.binary(max_size=200))
        case 1 | 2:
            at = draw(st.integers(0, len(body)))
            return body[:at] + draw(st.binary(max_size=3)) + body[at + draw(st.integers(0, 3)) :]
    return body


def test_no_bytes_of_an_event_break_anything(
    redis_server: "RedisServer", tmp_path: Path, faults: list[str], tell: Tell
) -> None:
    with (
        running(tmp_path, redis_server.url, ServerSettings(**UNLIMITED)) as server,
        httpx.Client(
            base_url=server.url, headers={"Authorization": f"Bearer {server.keys['client']}"}
        ) as http,
    ):
        statuses: dict[int, int] = {}

        @settings(
            max_examples=20 * EXAMPLES,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(body=bodies(server.completions[0]), batch=st.booleans())
        def send(body: bytes, batch: bool) -> None:
            sent = http.post(f"/v1/feedback{'/batch' if batch else ''}", content=body)
            statuses[sent.status_code] = statuses.get(sent.status_code, 0) + 1
            assert sent.status_code in (200, 202, 404, 409, 422), sent.text
            for line in sent.text.splitlines():
                answer = json.loads(line)
                if "error" not in answer:
                    assert http.get(f"/v1/feedback/{answer['event_id']}").status_code == 200

        send()
        tell(f"bodies, by the status of the answer: {statuses}")
        record = http.get(f"/v1/completions/{server.completions[0]}")
        assert record.status_code == 200
