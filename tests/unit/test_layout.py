"""What holds for the whole tree: who imports whom, how light imports are, what ships, how settings stand."""

import ast
import os
import pkgutil
import re
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from instructloop.config import Config, defaults_toml

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "feedback": set(),
    "registry": set(),
    "evaluation": {"feedback", "registry"},
    "training": {"feedback", "registry", "evaluation"},
    "server": {"feedback", "registry"},
    "instructloop": {"feedback", "registry", "evaluation", "training", "server"},
}
EDGES = {
    "vllm": {"server/engine.py", "evaluation/sampler.py"},
    "trl.experimental.ppo": {"training/ppo.py"},
}
HEAVY = ("torch", "vllm", "transformers", "trl", "datasets")


def sources() -> Iterator[tuple[str, Path]]:
    for package in ALLOWED:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield package, path


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that `path` imports anywhere, also inside functions: its dotted name and line."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_packages_import_only_what_lies_below_them() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for package, path in sources()
        for module, line in imported(path)
        for other in ALLOWED
        if other != package and other not in ALLOWED[package] and is_within(module, other)
    ]
    assert wrong == []


def test_unstable_edges_have_one_file_each() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for _, path in sources()
        for module, line in imported(path)
        for edge, files in EDGES.items()
        if is_within(module, edge) and path.relative_to(ROOT).as_posix() not in files
    ]
    # vLLM's HTTP app is built by the file that serves it; its engine is not touched there.
    wrong = [line for line in wrong if not re.match(r"server/\w+\.py:\d+ imports vllm\.entrypoints\b", line)]
    assert wrong == []


def test_there_is_no_drawer_module() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "core", "types"}
    assert [str(path) for _, path in sources() if path.stem in drawers or path.parent.name in drawers] == []


def light_modules() -> list[str]:
    named = ["server.app", "server.settings", "training.settings", "evaluation.settings", "registry.settings"]
    # A server makes the pages of rounds and evaluations, tells of the trial and refuses a bad case.
    named += ["evaluation.round_report", "evaluation.evaluation_report", "training.samples"]
    named += ["evaluation.canary", "evaluation.cases"]
    for package in ("feedback", "registry"):
        for found in pkgutil.iter_modules([str(ROOT / package)]):
            named.append(f"{package}.{found.name}")
    for name in (
        "access",
        "canary",
        "cases",
        "cli",
        "config",
        "supervisor",
        "installation",
        "doctor",
        "dead_letters",
        "evaluations",
        "lineage",
        "listings",
        "raters",
        "rounds",
        "fix",
        "forget",
        "upkeep",
        "parts",
        "model",
        "database",
    ):
        named.append(f"instructloop.{name}")
    return named


def test_light_modules_import_without_torch() -> None:
    """Each in its own process, all in one go: a heavy import in one must not hide behind another."""
    program = (
        # Read once for all: they are no part of what is tested.
        "import alembic.command, fastapi, httpx, pydantic_settings, redis.asyncio, sqlalchemy.orm\n"
        "import importlib, os, sys\n"
        f"print(*[m for m in {HEAVY!r} if m in sys.modules], end='')\n"
        f"for name in {light_modules()!r}:\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        importlib.import_module(name)\n"
        f"        heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "        if heavy: print(name, 'imports', *heavy, flush=True)\n"
        "        os._exit(0)\n"
        "    status = os.waitpid(pid, 0)[1]\n"
        "    if status: print(name, 'failed to import', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.stdout == "", done.stdout + done.stderr


def test_help_answers_in_well_under_a_second() -> None:
    def took() -> float:
        began = time.perf_counter()
        command = [sys.executable, "-m", "instructloop.cli", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        assert "doctor" in done.stdout
        return time.perf_counter() - began

    assert min(took() for _ in range(3)) < 1.0


def settings_fields() -> list[tuple[str, str, str | None]]:
    """(section, key, description) of each setting; section "" holds the top-level ones."""
    fields: list[tuple[str, str, str | None]] = []
    for name, field in Config.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            fields += [(name, key, inner.description) for key, inner in type(default).model_fields.items()]
        else:
            fields.append(("", name, field.description))
    return fields


@pytest.mark.parametrize(("section", "key", "description"), settings_fields())
def test_setting_has_one_line_of_documentation(section: str, key: str, description: str | None) -> None:
    assert description, f"{section}.{key} has no description"
    assert "\n" not in description


def test_every_setting_stands_once_in_the_shipped_file() -> None:
    shipped = (ROOT / "instructloop" / "defaults.toml").read_text()
    assert shipped == defaults_toml(), "run `make defaults`"
    for section, key, description in settings_fields():
        part = shipped if not section else shipped.split(f"[{section}]\n")[1].split("\n[")[0]
        assert len(re.findall(rf"^(?:# )?{key} =", part, flags=re.MULTILINE)) == 1, (section, key)
        assert f"# {description}\n" in part


def test_shipped_defaults_are_the_defaults() -> None:
    shipped = tomllib.loads((ROOT / "instructloop" / "defaults.toml").read_text())
    assert Config.model_validate(shipped) == Config()


@pytest.mark.parametrize("section", [name for name in Config.model_fields if name != "data_dir"])
def test_settings_are_frozen_and_refuse_unknown_keys(section: str) -> None:
    model = type(getattr(Config(), section))
    assert model.model_config.get("extra") == "forbid"
    assert model.model_config.get("frozen") is True


def test_the_wheel_holds_exactly_our_packages(tmp_path: Path) -> None:
    # In a copy: setuptools leaves build/ and *.egg-info where it works.
    copy = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: can't tell which files belong to the project")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--no-index", "-w", str(tmp_path), str(copy)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == set(ALLOWED)
    assert "instructloop/defaults.toml" in names
    assert any(name.startswith("instructloop/migrations/") and name.endswith(".py") for name in names)


def tracked_text() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: can't tell which files belong to the project")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file():
            try:
                yield name, path.read_text()
            except UnicodeDecodeError:
                continue


def test_no_machine_specific_paths_and_no_package_index_are_named() -> None:
    # Spelled in pieces, so that this file does not name them either.
    forbidden = re.compile(
        "|".join(["/wo" + "rk/", "py" + r"pi\.org", "pythonho" + "sted", r"download\.py" + "torch"])
    )
    found = [f"{name}: {hit[0]}" for name, text in tracked_text() if (hit := forbidden.search(text))]
    assert found == []


def test_every_module_says_what_it_owns() -> None:
    missing = []
    for package, path in sources():
        if "migrations" in path.parts or (path.name == "__init__.py" and not path.read_text().strip()):
            continue
        if not ast.get_docstring(ast.parse(path.read_text())):
            missing.append(f"{package}: {path.name}")
    assert missing == []


def test_commands_run_from_any_directory(tmp_path: Path) -> None:
    """The packages are installed, not found by the accident of the working directory."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [
        sys.executable,
        "-c",
        "import instructloop.cli, feedback, registry, evaluation, training, server",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
