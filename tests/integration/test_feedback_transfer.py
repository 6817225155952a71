"""Import through a real queue into a real store, and export that `datasets` opens."""

import gzip
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio
from datasets import load_dataset
from feedback_samples import completion, entries, event, ranking, thumb
from sqlalchemy.engine import Engine

from feedback.preferences import ImportProblem
from feedback.queue import FeedbackQueue, StreamReader
from feedback.settings import QueueSettings
from feedback.store import Store
from feedback.transfer import ImportCounts, export, import_preferences

if TYPE_CHECKING:
    from conftest import RedisServer

DATA = Path(os.environ.get("INSTRUCTLOOP_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
SETTINGS = QueueSettings()


async def bring(server: "RedisServer", path: Path, **options: Any) -> ImportCounts:
    client = redis.asyncio.Redis.from_url(server.url)
    try:
        return await import_preferences(FeedbackQueue(client, SETTINGS), path, "hh", **options)
    finally:
        await client.aclose()


def ingest_all(server: "RedisServer", store: Store) -> None:
    with server.client() as client:
        reader = StreamReader(client, SETTINGS, "a")
        while found := reader.read(0):
            store.ingest(found)
            reader.done(found)


async def test_human_preferences_come_in_once_and_go_out_again(
    redis_server: "RedisServer", database: Engine, tmp_path: Path
) -> None:
    path = DATA / "hh-rlhf" / "helpful-base.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent: set INSTRUCTLOOP_DATA to the directory that has hh-rlhf/")
    with gzip.open(path, "rt") as lines:
        originals = [json.loads(line) for line in lines]
    store, seen = Store(database), []
    started = time.monotonic()
    counts = await bring(redis_server, path, progress=seen.append)
    ingest_all(redis_server, store)
    seconds = time.monotonic() - started
    assert counts == ImportCounts(queued=len(originals))
    assert (seen[0], seen[-1]) == (500, len(originals))
    assert seconds < 20, f"{len(originals)} pairs took {seconds:.1f} s"
    first = store.counts()
    assert (first["stored"], first["completions"]) == (len(originals), len(originals))
    await bring(redis_server, path)
    ingest_all(redis_server, store)
    assert store.counts() == first

    rows = export(store, tmp_path / "out", "parquet")
    assert rows["preferences"] == len(originals)
    found = load_dataset(
        str(tmp_path / "out"), "preferences", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(found) == len(originals)
    assert {row["weight"] for row in found} == {1.0}
    for row, original in list(zip(found, originals, strict=True))[:200]:
        assert original["chosen"].rstrip().endswith(row["chosen"][0]["content"])
        assert original["rejected"].rstrip().endswith(row["rejected"][0]["content"].rstrip())
        assert row["prompt"][-1]["role"] == "user"
        assert all(turn["content"] in original["chosen"] for turn in row["prompt"])


async def test_a_bad_line_stops_the_import_and_keeps_what_was_good(
    redis_server: "RedisServer", database: Engine, tmp_path: Path
) -> None:
    lines = [json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b"}) for i in range(700)]
    lines[650] = json.dumps({"prompt": "p", "chosen": "a"})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(
        ImportProblem, match=r"line 651: rejected: missing \(650 comparisons queued, 0 already"
    ):
        await bring(redis_server, path)
    ingest_all(redis_server, Store(database))
    assert Store(database).counts()["stored"] == 650
    problems: list[ImportProblem] = []
    assert await bring(redis_server, path, on_problem=problems.append) == ImportCounts(699, 0, 1)
    ingest_all(redis_server, Store(database))
    assert Store(database).counts()["stored"] == 699
    assert [problem.line for problem in problems] == [651]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_export_writes_what_counts_now(database: Engine, tmp_path: Path, format: Any) -> None:
    store = Store(database)
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "x"}}]
    tied = {"groups": [[(0,), (1,)], [(2,)]]}
    groups = [[{"completion_id": "c4", "choice": i} for (i,) in group] for group in tied["groups"]]
    demonstration = {
        "type": "demonstration",
        "messages": [{"role": "user", "content": "say"}],
        "text": "said",
    }
    store.ingest(
        entries(
            completion("c1", n=3),
            completion("c2", messages=None, prompt="once", prompt_token_ids=[1]),
            completion("c3", messages=None, prompt_token_ids=[2]),
            completion("c4", n=3, messages=[{"role": "user", "content": parts}], prompt_token_ids=[3]),
            ranking("r1", ("c1", 2), ("c1", 0), ("c1", 1)),
            event("r2", {"type": "ranking", "groups": groups}),
            event("r3", {"type": "ranking", "groups": [groups[0]]}),
            thumb("t1", "c1", value="up", received_at=1),
            thumb("t2", "c1", value="down", received_at=2),
            thumb("t3", "c2"),
            thumb("t4", "c3"),
            event("s1", {"type": "rating", "completion_id": "c2", "choice": 1, "score": 6}),
            event("d1", {"type": "demonstration", "completion_id": "c1", "text": "better"}),
            event("d2", demonstration),
        )
    )
    counts = export(store, tmp_path, format)
    assert counts == {"preferences": 5, "thumbs": 2, "ratings": 1, "demonstrations": 2, "without_text": 1}
    opened = {
        name: list(load_dataset(str(tmp_path), name, split="train", cache_dir=str(tmp_path / ".cache")))
        for name in ("preferences", "thumbs", "ratings", "demonstrations")
    }
    pairs = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in opened["preferences"]]
    assert pairs[:3] == [("reply 2", "reply 0"), ("reply 2", "reply 1"), ("reply 0", "reply 1")]
    assert pairs[3:] == [("reply 0", "reply 2"), ("reply 1", "reply 2")]
    assert [row["weight"] for row in opened["preferences"]] == pytest.approx([1 / 3] * 3 + [1 / 2] * 2)
    assert opened["preferences"][3]["prompt"][0]["content"].startswith("look\n{")
    thumbs = {row["event_id"]: row for row in opened["thumbs"]}
    assert {name: row["label"] for name, row in thumbs.items()} == {"t2": False, "t3": True}
    assert thumbs["t3"]["prompt"] == [{"role": "user", "content": "once"}]
    assert thumbs["t3"]["completion"] == [{"role": "assistant", "content": "reply 0"}]
    assert (opened["ratings"][0]["score"], opened["ratings"][0]["rater"]) == (6, "k1/r")
    assert [row["completion"][0]["content"] for row in opened["demonstrations"]] == ["better", "said"]
    assert [path.name for path in tmp_path.glob(".*.partial")] == []


def test_an_export_of_nothing_writes_no_data(database: Engine, tmp_path: Path) -> None:
    (tmp_path / "thumbs.jsonl").write_text("from an earlier export")
    assert sum(export(Store(database), tmp_path, "jsonl").values()) == 0
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".jsonl"] == []
