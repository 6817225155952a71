"""What all tests share: the order of the suites, lines for the summary, the default model, converted once."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from instructloop import model

ROOT = Path(__file__).resolve().parents[1]
SUITES = ("unit", "integration", "e2e")

# The models of most tests are tiny: more threads would spend their time on waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=1000, stateful_step_count=80)
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick suites first, however the tests were named on the command line."""

    def suite(item: pytest.Item) -> int:
        part = item.path.relative_to(ROOT / "tests").parts[0]
        return SUITES.index(part) if part in SUITES else len(SUITES)

    items.sort(key=suite)


Tell = Callable[[str], None]
_TOLD = pytest.StashKey[list[str]]()


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Tell:
    """Keep a line for the summary at the end of the run, also when the test passes."""
    told = request.config.stash.setdefault(_TOLD, [])
    name = request.node.name
    return lambda line: told.append(f"{name}: {line}")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """Show what tests told: how many cases were tried."""
    if told := config.stash.get(_TOLD, []):
        terminalreporter.section("cases")
        for line in told:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """A checkpoint of the default model: `INSTRUCTLOOP_TEST_MODEL`, else converted once and kept."""
    given = os.environ.get("INSTRUCTLOOP_TEST_MODEL")
    if given:
        return Path(given)
    destination = ROOT / ".instructloop" / "test-model"
    if not (destination / "config.json").exists():
        # In a process of its own, as the supervisor does it: its memory is given back.
        subprocess.run(model.command(None, destination), check=True)
    return destination
