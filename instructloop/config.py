"""The one configuration: every package's settings, from defaults, a TOML file and the environment.

It owns where values come from and how a wrong one is reported. What a setting means, its default and its
bounds stand in its package's `settings.py`. Nothing here imports torch, and no other package reads this.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evaluation.settings import EvaluationSettings
from feedback.settings import QueueSettings, RaterSettings, StoreSettings
from registry.settings import RolloutSettings
from server.settings import ServerSettings
from training.settings import TrainingSettings

FILE = "instructloop.toml"
PREFIX = "INSTRUCTLOOP_"


class ConfigProblem(ValueError):  # noqa: N818
    """The configuration can't be used; the message is one line that names the setting."""


class ModelSettings(BaseModel):
    """Which model the first version is made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | None = Field(
        default=None,
        description="Checkpoint directory or Hugging Face name; unset: the bundled SmolLM2-135M-Instruct",
    )


class Config(BaseModel):
    """All settings of one installation; `data_dir` is absolute after `load`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path = Field(
        default=Path(".instructloop"),
        description="Everything this installation keeps: secret, Redis, database, versions, rounds, logs",
    )
    model: ModelSettings = ModelSettings()
    server: ServerSettings = ServerSettings()
    queue: QueueSettings = QueueSettings()
    store: StoreSettings = StoreSettings()
    raters: RaterSettings = RaterSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    rollout: RolloutSettings = RolloutSettings()

    @property
    def database_url(self) -> str:
        """The configured database, else SQLite in `data_dir`."""
        return self.store.url or f"sqlite:///{self.data_dir / 'store.db'}"

    @property
    def queue_url(self) -> str:
        """The configured Redis, else the embedded one."""
        from instructloop import redis_process

        return self.queue.url or redis_process.url(self.data_dir)

    @property
    def spool_file(self) -> Path:
        """Where completion records wait while Redis is away."""
        return self.data_dir / "spool.db"

    @property
    def versions_dir(self) -> Path:
        """Where model versions live."""
        return self.data_dir / "versions"


def load(path: Path | None = None, environment: Mapping[str, str] = os.environ) -> Config:
    """Read `path` (else `INSTRUCTLOOP_CONFIG`, else ./instructloop.toml if it exists), then the environment.

    Raises ConfigProblem for a file that is missing or not TOML, an unknown key or a value out of bounds.
    """
    values: dict[str, Any] = {}
    named = path or (
        Path(environment["INSTRUCTLOOP_CONFIG"]) if environment.get("INSTRUCTLOOP_CONFIG") else None
    )
    file = named or Path(FILE)
    if named is not None or file.exists():
        values = _read(file)
        _refuse_unknown(values, str(file))
    for variable, keys in _overrides(environment).items():
        _override(values, keys, environment[variable], variable)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigProblem(_explain(error)) from None
    return config.model_copy(update={"data_dir": config.data_dir.expanduser().resolve()})


def child_environment(config: Config, file: Path | None) -> dict[str, str]:
    """Variables that make a child process read the same configuration as this one."""
    variables = {f"{PREFIX}DATA_DIR": str(config.data_dir)}
    if file is not None:
        variables[f"{PREFIX}CONFIG"] = str(file.resolve())
    return variables


def defaults_toml() -> str:
    """Return the text of defaults.toml: each setting once, under its one-line description."""
    lines = [
        "# Every setting with its default. Copy the ones you change into instructloop.toml.",
        f"# Each is also an environment variable: {PREFIX}SECTION__KEY ({PREFIX}SERVER__PORT=9000).",
        "",
    ]
    sections = []
    for name, field in Config.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            sections.append((name, default))
        else:
            lines += _setting_lines(name, str(default), field.description)
    for name, settings in sections:
        lines += ["", f"[{name}]"]
        for key, field in type(settings).model_fields.items():
            lines += _setting_lines(key, getattr(settings, key), field.description)
    return "\n".join(lines).rstrip() + "\n"


def _setting_lines(key: str, default: Any, description: str | None) -> list[str]:
    # TOML has no null: a setting without a value is shown as a comment.
    assignment = f"# {key} =" if default is None else f"{key} = {_toml(default)}"
    return [f"# {description}", assignment]


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case dict():
            inner = ", ".join(f"{json.dumps(str(key))} = {_toml(item)}" for key, item in value.items())
            return f"{{ {inner} }}" if inner else "{}"
        case list() | tuple() | set() | frozenset():
            return "[" + ", ".join(_toml(item) for item in value) + "]"
        case _:
            return json.dumps(str(value))


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigProblem(f"{file}: no such file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigProblem(f"{file}: not TOML: {error}") from None


def _known(section: str | None) -> list[str]:
    if section is None:
        return list(Config.model_fields)
    default = Config.model_fields[section].get_default()
    return list(type(default).model_fields) if isinstance(default, BaseModel) else []


def _refuse_unknown(values: Mapping[str, Any], where: str) -> None:
    for name, value in values.items():
        if name not in Config.model_fields:
            raise ConfigProblem(f"{where}: unknown key {name!r}{_nearest(name, _known(None))}")
        if isinstance(value, dict):
            for key in value:
                if key not in _known(name):
                    raise ConfigProblem(f"{where}: unknown key {name}.{key}{_nearest(key, _known(name))}")


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


def _overrides(environment: Mapping[str, str]) -> dict[str, list[str]]:
    """Variable -> path of keys. A variable without `__` that names no top-level key is somebody else's."""
    found = {}
    for variable in sorted(environment):
        keys = variable.removeprefix(PREFIX).lower().split("__")
        if variable.startswith(PREFIX) and (len(keys) > 1 or keys == ["data_dir"]):
            found[variable] = keys
    return found


def _override(values: dict[str, Any], keys: list[str], text: str, variable: str) -> None:
    if (
        len(keys) > 2
        or keys[0] not in Config.model_fields
        or (len(keys) == 2 and keys[1] not in _known(keys[0]))
    ):
        known = _known(keys[0]) if keys[0] in Config.model_fields else _known(None)
        raise ConfigProblem(f"{variable}: unknown key {'.'.join(keys)}{_nearest(keys[-1], known)}")
    target = values if len(keys) == 1 else values.setdefault(keys[0], {})
    if text == "":
        target.pop(keys[-1], None)
    else:
        target[keys[-1]] = parse(text, variable)


def parse(text: str, variable: str) -> Any:
    """Read lists and tables as TOML; anything else stays text, which pydantic turns into the field's type.

    Raises ConfigProblem that begins with `variable`.
    """
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigProblem(f"{variable}: neither TOML nor JSON: {error}") from None


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    return f"{key}: {first['msg'][:1].lower()}{first['msg'][1:]} (got {first.get('input')!r})"
