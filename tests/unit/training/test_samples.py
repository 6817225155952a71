"""Sample responses: bounded, and after a resumption as if nothing had happened."""

from pathlib import Path
from typing import Any

from training.samples import SAMPLES_AN_UPDATE, SampleLog


def some(update: int, run: int = 1) -> list[dict[str, Any]]:
    return [
        {"prompt": f"p{i}\n\u2028", "response": f"{run}: <b>{update}</b>", "score": i / 3} for i in range(10)
    ]


def test_a_resumed_run_replaces_what_the_killed_one_kept_after_the_checkpoint(tmp_path: Path) -> None:
    log = SampleLog(tmp_path)
    assert log.read() == []
    for update in (1, 2, 3, 4, 5):
        log.keep(update, some(update))
    resumed = SampleLog(tmp_path)
    for update in (3, 4, 5, 6):
        resumed.keep(update, some(update, run=2))
    found = resumed.read()
    assert [line["update"] for line in found] == sorted(list(range(1, 7)) * SAMPLES_AN_UPDATE)
    assert found[0] == {"update": 1, "prompt": "p0\n\u2028", "response": "1: <b>1</b>", "score": 0.0}
    assert {line["response"][0] for line in found if line["update"] >= 3} == {"2"}
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]
