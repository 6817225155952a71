"""An ingest process of its own, for a test to kill: `ingest_process.py REDIS_URL DATABASE_URL NAME`."""

import signal
import sys
import threading

import redis

from feedback.ingest import run
from feedback.queue import StreamReader
from feedback.settings import QueueSettings
from feedback.store import Store
from instructloop.database import connect

SETTINGS = QueueSettings(batch=40, claim_after_seconds=1.0)


def main(redis_url: str, database_url: str, name: str) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    reader = StreamReader(redis.Redis.from_url(redis_url), SETTINGS, name)
    run(reader, Store(connect(database_url)), stop)


if __name__ == "__main__":
    main(*sys.argv[1:])
