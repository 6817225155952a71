"""SQLite files with the newest schema, migrated once a run and copied: it takes longer than many a test."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from sqlalchemy import Engine

from instructloop.database import connect, migrate


def migrated(path: Path) -> Engine:
    """Make a new database at `path` and open it."""
    shutil.copy(_template(), path)
    return connect(f"sqlite:///{path}")


@cache
def _template() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="il-template-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    engine = connect(f"sqlite:///{directory / 'store.db'}")
    migrate(engine)
    # With the last connection SQLite's write-ahead log goes into the file.
    engine.dispose()
    return directory / "store.db"
