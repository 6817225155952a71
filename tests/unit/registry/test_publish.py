"""Publishing: whole or not at all, also when it is killed between any two steps; and proof of the files."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from registry import manifest as manifests
from registry.registry import BrokenVersion, Registry, UnknownVersion

Make = Callable[..., Path]


def publish(registry: Registry, staging: Path, round_id: int | None = 1) -> str:
    return registry.publish(
        staging, parent=None, round_id=round_id, kind="ppo", details={"slice": [0, 9]}
    ).name


def test_a_version_is_what_was_staged(registry: Registry, checkpoint: Make, tmp_path: Path) -> None:
    staging = checkpoint(b"abc")
    version = registry.publish(staging, parent="policy-0007", round_id=3, kind="ppo", details={"seed": 1})
    assert version.name == "policy-0000"
    assert version.state == "candidate"
    assert version.path == tmp_path / "versions" / "policy-0000"
    assert not staging.exists()
    stored = json.loads((version.path / "manifest.json").read_text())
    assert stored["files"]["model.safetensors"] == hashlib.sha256(b"abc").hexdigest()
    assert set(stored["files"]) == {"model.safetensors", "config.json", "onnx/extra.bin"}
    assert (stored["parent"], stored["round_id"], stored["details"]) == ("policy-0007", 3, {"seed": 1})
    assert [(entry.action, entry.version) for entry in registry.log()] == [("published", "policy-0000")]
    registry.verify("policy-0000")


def test_names_count_up_and_are_never_used_again(
    registry: Registry, checkpoint: Make, tmp_path: Path
) -> None:
    assert [publish(registry, checkpoint(), n) for n in (1, 2)] == ["policy-0000", "policy-0001"]
    subprocess.run(["rm", "-r", str(tmp_path / "versions" / "policy-0001")], check=True)
    assert publish(registry, checkpoint(), 3) == "policy-0002"
    assert [version.name for version in registry.versions()] == ["policy-0000", "policy-0002"]


def test_a_round_publishes_once(registry: Registry, checkpoint: Make) -> None:
    assert publish(registry, checkpoint(b"first"), 1) == publish(registry, checkpoint(b"second"), 1)
    assert len(registry.versions()) == len(registry.log()) == 1


@pytest.mark.parametrize("round_id", [5, None], ids=["of a round", "brought in"])
@pytest.mark.parametrize("step", ["write", "sync_tree", "rename", "sync", "mark_ready", "_append", "logged"])
def test_a_kill_between_two_steps_leaves_no_half_version_and_is_made_good(
    step: str, round_id: int | None, registry: Registry, checkpoint: Make, tmp_path: Path
) -> None:
    staging = checkpoint(b"candidate")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, step, str(tmp_path), str(staging), json.dumps(round_id)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if step != "logged":
        assert registry.versions() == []
        with pytest.raises(UnknownVersion):
            registry.version("policy-0000")
    # The trainer starts again: it finds its staging directory, or makes the same one anew.
    if not staging.exists():
        staging = checkpoint(b"candidate")
    assert publish(registry, staging, round_id) == (
        "policy-0001" if step == "logged" and round_id is None else "policy-0000"
    )
    registry.verify(registry.versions()[-1].name)
    actions = [entry.action for entry in registry.log()]
    assert actions == ["published"] * len(registry.versions())
    assert sorted(path.name for path in (tmp_path / "versions").glob("policy-*")) == [
        version.name for version in registry.versions()
    ]


# Runs the real publication and kills its own process just before the named step (after it for "logged").
KILLED = """
import json, os, signal, sys
from pathlib import Path
from instructloop.database import connect
from registry import manifest
from registry.registry import Registry

step, root, staging, round_id = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
owner = {"rename": Path, "_append": Registry}.get(step, manifest)
if step != "logged":
    setattr(owner, step, die)
registry = Registry(connect(f"sqlite:///{root}/store.db"), root / "versions")
registry.publish(staging, parent=None, round_id=round_id, kind="ppo", details={"slice": [0, 9]})
die()
"""


def test_no_manifest_is_ever_seen_torn(registry: Registry, checkpoint: Make) -> None:
    publish(registry, checkpoint())
    registry.annotate("policy-0000", metrics={"accuracy": 0.7})
    registry.annotate("policy-0000", metrics={"kl": 3.0}, verdict={"promote": False, "reasons": ["no"]})
    manifest = registry.version("policy-0000").manifest
    assert manifest.metrics == {"accuracy": 0.7, "kl": 3.0}
    assert manifest.verdict == {"promote": False, "reasons": ["no"]}
    # A write that was killed left its partial file; it is no part of the version.
    (registry.version("policy-0000").path / "manifest.json.partial").write_text("{")
    registry.verify("policy-0000")


def test_a_later_releases_fields_survive_a_rewrite(registry: Registry, checkpoint: Make) -> None:
    publish(registry, checkpoint())
    path = registry.version("policy-0000").path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "signature": "xyz"}))
    registry.annotate("policy-0000", metrics={"kl": 1.0})
    assert json.loads(path.read_text())["signature"] == "xyz"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: _flip(path / "model.safetensors"), "model.safetensors"),
        (lambda path: (path / "onnx" / "extra.bin").unlink(), "onnx/extra.bin"),
        (lambda path: (path / "model-2.safetensors").write_bytes(b"x"), "model-2.safetensors"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json"),
    ],
)
def test_verify_names_the_file_that_changed(
    damage: Callable[[Path], object], named: str, registry: Registry, checkpoint: Make, tmp_path: Path
) -> None:
    publish(registry, checkpoint(bytes(1000)))
    damage(tmp_path / "versions" / "policy-0000")
    with pytest.raises(BrokenVersion, match=named):
        registry.verify("policy-0000")
    with pytest.raises(BrokenVersion, match=named):
        registry.promote("policy-0000", actor="me", reason="")
    assert registry.desired() is None


def test_what_cannot_be_published_is_refused(registry: Registry, checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        publish(registry, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no files"):
        publish(registry, tmp_path / "empty")
    linked = checkpoint()
    os.symlink("/etc/hostname", linked / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a symbolic link"):
        publish(registry, linked)
    assert registry.versions() == []


def test_digests_leave_the_registrys_own_files_out(checkpoint: Make) -> None:
    directory = checkpoint()
    before = manifests.digests(directory)
    manifests.mark_ready(directory)
    (directory / "manifest.json").write_text("{}")
    assert manifests.digests(directory) == before
