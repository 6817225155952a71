"""`instructloop evaluate` as users run it: real engines, and a running server of ours as a contestant."""

import json
import os
import subprocess
import sys
from pathlib import Path

from server_fixture import REPOSITORY, Installation, served, test_model

from evaluation.evaluation_files import EvaluationFiles, evaluation_directory
from registry.evaluations import Evaluations

__all__ = ["served"]

CHECKS = [{"kind": "max_words", "n": 12}, {"kind": "no_commas"}]


def test_versions_and_a_server_are_compared(served: Installation, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    asked = [
        f"Name a {thing} in at most 12 words without a comma." for thing in ("fruit", "tree", "sea", "bird")
    ]
    prompts.write_text("".join(json.dumps({"prompt": text, "checks": CHECKS}) + "\n" for text in asked))
    other = served.publish(test_model())
    place = f"{served.url}/v1#policy#OWN_API_KEY"
    command = [sys.executable, "-m", "instructloop.cli", "evaluate", "base+few-shot", other, place]
    command += ["--prompts", str(prompts), "--judge", "checks", "--judge", f"overall={place}"]
    command += ["--max-tokens", "24", "--temperature", "0", "--output", str(tmp_path / "page.html")]
    done = subprocess.run(
        command,
        env=served.environment | {"OWN_API_KEY": served.client_key, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (evaluation,) = Evaluations(served.database).list()
    assert evaluation.state == "done"
    assert evaluation.result is not None
    server = f"policy at 127.0.0.1:{served.port}"
    assert [one["name"] for one in evaluation.result["contestants"]] == [
        "policy-0000+few-shot",
        other,
        server,
    ]
    checks, model = evaluation.result["tables"]
    assert [pair["verdicts"] for pair in checks["pairs"]] == [4, 4, 4]
    assert model["name"] == "policy on overall"
    files = EvaluationFiles(evaluation_directory(served.data_dir, evaluation.id))
    few_shot, offline, online = (files.answers_so_far(i, 0) for i in range(3))
    # The same weights, greedy: what an offline engine says is what the server says, and examples change it.
    same = sum(ours[0]["text"] == theirs[0]["text"] for ours, theirs in zip(offline, online, strict=True))
    assert same >= 3, (offline, online)
    assert few_shot != offline
    assert [own[0]["tokens"] for own in online] == [own[0]["tokens"] for own in offline] or same < 4
    assert "checks" in done.stdout
    page = (tmp_path / "page.html").read_text()
    assert server in page
    assert served.client_key not in json.dumps(evaluation.request) + page + done.stderr
