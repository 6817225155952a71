from pathlib import Path

import pytest

from instructloop.config import Config, ConfigProblem, child_environment, load


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "instructloop.toml"
    path.write_text(text)
    return path


def test_defaults_need_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(environment={})
    assert config == Config(data_dir=tmp_path / ".instructloop")
    assert config.database_url == f"sqlite:///{tmp_path}/.instructloop/store.db"
    assert config.queue_url == f"unix://{tmp_path}/.instructloop/redis/redis.sock"


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[server]\nport = 9001\nhost = '0.0.0.0'\n")
    assert load(path, {}).server.port == 9001
    config = load(path, {"INSTRUCTLOOP_SERVER__PORT": "9002", "UNRELATED__KEY": "x"})
    assert (config.server.port, config.server.host) == (9002, "0.0.0.0")


def test_a_file_in_the_working_directory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "[server]\nport = 9001\n")
    monkeypatch.chdir(tmp_path)
    assert load(environment={}).server.port == 9001


def test_an_empty_variable_unsets(tmp_path: Path) -> None:
    path = written(tmp_path, "[queue]\nurl = 'redis://elsewhere'\n")
    assert load(path, {}).queue_url == "redis://elsewhere"
    assert load(path, {"INSTRUCTLOOP_QUEUE__URL": ""}).queue.url is None


@pytest.mark.parametrize("text", ['["https://a.example"]', "['https://a.example']"])
def test_lists_come_from_the_environment(text: str) -> None:
    assert load(environment={"INSTRUCTLOOP_SERVER__CORS_ORIGINS": text}).server.cors_origins == [
        "https://a.example"
    ]


@pytest.mark.parametrize(
    "text",
    ['{"tensor_parallel_size": 2, "dtype": "float32"}', '{tensor_parallel_size = 2, dtype = "float32"}'],
)
def test_tables_come_from_the_environment_as_json_or_toml(text: str) -> None:
    config = load(environment={"INSTRUCTLOOP_SERVER__VLLM_ARGUMENTS": text})
    assert config.server.vllm_arguments == {"tensor_parallel_size": 2, "dtype": "float32"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprot = 1\n", r"unknown key server\.prot \(did you mean 'port'\?\)"),
        ("[sever]\nport = 1\n", r"unknown key 'sever' \(did you mean 'server'\?\)"),
        ("nonsense = 1\n", r"unknown key 'nonsense' \(known: data_dir, model"),
        ("[server]\nport = 70000\n", r"server\.port: .*65535 \(got 70000\)"),
        ("server = 1\n", r"server: "),
        ("[server\n", r"not TOML"),
    ],
)
def test_a_wrong_file_is_refused_naming_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigProblem, match=message) as caught:
        load(path, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("INSTRUCTLOOP_SERVER__PROT", "1", r"INSTRUCTLOOP_SERVER__PROT: unknown key server\.prot .*'port'"),
        ("INSTRUCTLOOP_SEVER__PORT", "1", r"unknown key sever\.port"),
        ("INSTRUCTLOOP_SERVER__PORT__X", "1", r"unknown key"),
        ("INSTRUCTLOOP_SERVER__PORT", "many", r"server\.port: .*'many'"),
        ("INSTRUCTLOOP_SERVER__VLLM_ARGUMENTS", "{nope", r"neither TOML nor JSON"),
    ],
)
def test_a_wrong_variable_is_refused_naming_it(variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigProblem, match=message):
        load(environment={variable: value})


def test_a_missing_file_is_refused_when_it_was_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigProblem, match="no such file"):
        load(tmp_path / "absent.toml", {})
    with pytest.raises(ConfigProblem, match="no such file"):
        load(environment={"INSTRUCTLOOP_CONFIG": str(tmp_path / "absent.toml")})


def test_a_child_reads_the_same_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "data_dir = 'data'\n[server]\nport = 9001\n")
    monkeypatch.chdir(tmp_path)
    config = load(path, {})
    monkeypatch.chdir("/")
    assert load(environment=child_environment(config, path)) == config
