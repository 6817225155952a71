"""What a first start is made of, for real: the embedded Redis, the converted model, the doctor's findings."""

import json
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import redis.asyncio
from safetensors import safe_open

from feedback.queue import FeedbackQueue
from feedback.settings import QueueSettings
from instructloop import doctor, model, redis_process
from instructloop.config import Config, load


class Embedded:
    """The embedded server of one data directory, started as the supervisor starts it."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(redis_process.prepare(self.data_dir), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while failure := redis_process.failure(self.data_dir):
            assert time.monotonic() < deadline, failure
            time.sleep(0.02)

    def end(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(timeout=20)
            self.process = None


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Embedded]:
    server = Embedded(tmp_path / "data")
    server.start()
    yield server
    server.end(signal.SIGTERM)


async def test_the_embedded_redis_promises_durability(embedded: Embedded) -> None:
    client = redis.asyncio.Redis.from_url(redis_process.url(embedded.data_dir))
    assert await FeedbackQueue(client, QueueSettings()).durability() is None
    assert (await client.config_get("port"))["port"] == "0"
    await client.aclose()
    socket = redis_process.socket_path(embedded.data_dir)
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600


def test_the_embedded_redis_keeps_what_it_acknowledged_through_kill_9(embedded: Embedded) -> None:
    with redis.Redis.from_url(redis_process.url(embedded.data_dir)) as client:
        for number in range(200):
            client.xadd("stream", {"number": number})
    embedded.end(signal.SIGKILL)
    assert redis_process.failure(embedded.data_dir) is not None
    embedded.start()
    with redis.Redis.from_url(redis_process.url(embedded.data_dir)) as client:
        assert client.xlen("stream") == 200


def test_a_data_directory_too_deep_for_a_socket_still_works(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    server = Embedded(deep)
    server.start()
    try:
        socket = redis_process.socket_path(deep)
        assert not socket.is_relative_to(deep)
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        assert (deep / "redis").is_dir()
    finally:
        server.end(signal.SIGTERM)
        shutil.rmtree(redis_process.socket_path(deep).parent)


def test_the_default_model_is_whole(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    generation = json.loads((model_dir / "generation_config.json").read_text())
    tokenizer = json.loads((model_dir / "tokenizer_config.json").read_text())
    assert config["pad_token_id"] == generation["pad_token_id"] == 0
    assert config["eos_token_id"] == 2
    assert tokenizer["pad_token"] == model.PAD_TOKEN != tokenizer["eos_token"]
    assert "quantization_config" not in config
    assert (model_dir / "chat_template.jinja").exists()
    # Where it was converted is nobody's business later on.
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert str(Path(sys.prefix)) not in (model_dir / name).read_text()
    with safe_open(model_dir / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert (
        len([name for name in names if name.endswith("q_proj.weight")]) == config["num_hidden_layers"] == 30
    )


def test_the_default_model_knows_something(model_dir: Path) -> None:
    """A conversion with permuted heads or a wrong scale gives fluent-looking files and nonsense."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    policy = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(policy(ids).logits[0, -1].argmax()) == " Paris"


def test_a_local_checkpoint_gets_a_pad_token_that_ends_nothing(model_dir: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for file in model_dir.iterdir():
        if file.suffix == ".safetensors":
            (own / file.name).hardlink_to(file)
        elif file.is_file():
            shutil.copyfile(file, own / file.name)
    tokenizer = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"pad_token": "<|im_end|>"}))
    before = {file.name: file.read_bytes() for file in own.glob("*.json")}

    made = model.ensure_model(str(own), tmp_path / "made")
    assert json.loads((made / "tokenizer_config.json").read_text())["pad_token"] == model.PAD_TOKEN
    assert json.loads((made / "config.json").read_text())["pad_token_id"] == 0
    assert str(tmp_path) not in (made / "config.json").read_text()
    # The weights are shared, the user's own files are as they were.
    assert (made / "model.safetensors").samefile(own / "model.safetensors")
    assert {file.name: file.read_bytes() for file in own.glob("*.json")} == before


@pytest.mark.parametrize(
    ("files", "message"), [([], "no config.json"), (["config.json"], "no .safetensors file")]
)
def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path, files: list[str], message: str) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name in files:
        (own / name).write_text("{}")
    with pytest.raises(model.ModelProblem, match=message):
        model.ensure_model(str(own), tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_the_doctor_finds_nothing_missing_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSTRUCTLOOP_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("INSTRUCTLOOP_SERVER__PORT", "0")
    assert doctor.report(load()) == 0
    said = capsys.readouterr().out
    for what in ("model class", "vLLM", "TRL's PPO", "Redis", "database", "port"):
        assert f"ok  {what}: " in said
    assert not (tmp_path / "data").exists(), "the doctor changes nothing"


def test_the_doctor_says_what_is_missing(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "data_dir": tmp_path,
            "model": {"path": str(tmp_path)},
            "queue": {"url": "redis://127.0.0.1:1/0"},
            "store": {"url": "postgresql://127.0.0.1:1/nowhere"},
        }
    )
    for look, word in (
        (doctor._redis, "queue.url"),
        (doctor._database, "store.url"),
        (doctor._model, "config.json"),
    ):
        finding = look(config)
        assert (finding.level, word in finding.says) == ("missing", True), finding


def test_the_doctor_refuses_a_redis_that_may_forget(tmp_path: Path, embedded: Embedded) -> None:
    url = redis_process.url(embedded.data_dir)
    config = Config.model_validate({"data_dir": tmp_path, "queue": {"url": url}})
    assert doctor._redis(config).level == "ok"
    with redis.Redis.from_url(url) as client:
        client.config_set("appendfsync", "everysec")
    finding = doctor._redis(config)
    assert finding.level == "missing"
    assert "appendfsync" in finding.says
