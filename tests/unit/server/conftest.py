"""Parts of the server on a real SQLite file."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from databases import migrated
from prometheus_client import CollectorRegistry
from server_bench import Bench, MemoryQueue

from feedback.keys import Keys
from feedback.store import Store
from registry.registry import Registry
from registry.rounds import Rounds
from server.identity import Identity
from server.metrics import ServerMetrics


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = migrated(tmp_path / "store.db")
    yield engine
    engine.dispose()


@pytest.fixture
def registry(database: sa.Engine, tmp_path: Path) -> Registry:
    return Registry(database, tmp_path / "versions")


@pytest.fixture
def metrics() -> ServerMetrics:
    return ServerMetrics(CollectorRegistry())


@pytest.fixture
def publish(registry: Registry, tmp_path: Path) -> Callable[[str], str]:
    """Publishes a version whose weights file holds the given text; returns its name."""
    made = iter(range(1000))

    def make(weights: str) -> str:
        staging = tmp_path / f"staging-{next(made)}"
        staging.mkdir()
        (staging / "model.safetensors").write_text(weights)
        return registry.publish(staging, parent=None, round_id=None, kind="test", details={}).name

    return make


@pytest.fixture
def bench(database: sa.Engine, registry: Registry, metrics: ServerMetrics, tmp_path: Path) -> Bench:
    roles = {"client": "client", "other": "client", "rater": "rater", "operator": "operator"}
    made = {who: Keys(database).create(role, who) for who, role in roles.items()}  # type: ignore[arg-type]
    return Bench(
        database=database,
        queue=MemoryQueue(),
        store=Store(database),
        registry=registry,
        rounds=Rounds(database),
        identity=Identity(b"s" * 32, token_hours=1),
        metrics=metrics,
        keys={who: key.secret for who, key in made.items()},
        key_ids={who: key.id for who, key in made.items()},
        data_dir=tmp_path,
    )
