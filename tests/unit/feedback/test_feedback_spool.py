"""The spool on a real file: order, the bound, several writers, kill -9, a torn end, forgetting."""

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from feedback.spool import Spool

ROOT = Path(__file__).resolve().parents[3]

WRITER = """
import sys, time
from pathlib import Path
from feedback.spool import Spool
spool = Spool(Path(sys.argv[1]), 2**30)
for number in range(10**9):
    spool.append([f"{sys.argv[2]} {number} {part} ".encode() + b"x" * 5000 for part in range(5)])
    print(number, flush=True)
    time.sleep(0.005)
"""


def all_of(spool: Spool) -> list[bytes]:
    return [record.data for record in spool.oldest(10**6)]


def test_records_come_out_in_order_and_leave_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    spool = Spool(path, 2**24)
    assert (spool.oldest(5), spool.waiting(), path.exists()) == ([], 0, False)
    secret = b"what somebody asked"
    assert spool.append([b"%d " % i + secret * 20 for i in range(1000)]) == 1000
    assert path.stat().st_mode & 0o777 == 0o600
    full = path.stat().st_size
    first = spool.oldest(400)
    assert [record.data.split()[0] for record in first] == [b"%d" % i for i in range(400)]
    spool.remove(first[-1].id)
    assert spool.waiting() == 600
    assert spool.append([b"late"]) == 1
    rest = spool.oldest(1000)
    assert (len(rest), rest[-1].data) == (601, b"late")
    assert [record.id for record in spool.oldest(2, after=rest[598].id)] == [rest[599].id, rest[600].id]
    spool.remove(rest[-1].id)
    assert (spool.waiting(), path.stat().st_size < full / 10) == (0, True)
    assert secret not in path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["spool.db"]
    # What is new has another id than all that was, also after the file was empty.
    spool.append([b"new"])
    assert spool.oldest(1)[0].id > rest[-1].id


def test_the_bound_keeps_what_came_first(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", 100_000)
    kept = sum(spool.append([b"%06d" % i + b"x" * 994]) for i in range(200))
    assert 70 < kept < 100
    assert [data[:6] for data in all_of(spool)] == [b"%06d" % i for i in range(kept)]
    assert (tmp_path / "spool.db").stat().st_size < 120_000
    spool.remove(spool.oldest(20)[-1].id)
    assert spool.append([b"x" * 1000] * 50) > 5, "what was replayed makes room"
    assert Spool(tmp_path / "none.db", 0).append([b"x"]) == 0


def start_writer(path: Path, name: str) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(path), name]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


def test_writers_at_once_one_killed_in_the_midst(tmp_path: Path) -> None:
    """What a writer was told is kept is there, whole batches in its order; a killed one harms no other."""
    path = tmp_path / "spool.db"
    writers = {name: start_writer(path, name) for name in ("a", "b")}
    told = {name: 0 for name in writers}
    for name, writer in writers.items():
        for _ in range(5):
            assert writer.stdout is not None
            told[name] += bool(writer.stdout.readline())
    for name in ("a", "b"):
        writers[name].kill()
        time.sleep(0.2)
    for name, writer in writers.items():
        assert writer.stdout is not None
        told[name] += len(writer.stdout.read().splitlines())
        writer.stdout.close()
        writer.wait(timeout=10)
    assert min(told.values()) >= 5
    records = [tuple(data.split()[:3]) for data in all_of(Spool(path, 2**30))]
    for name, count in told.items():
        mine = [(int(number), int(part)) for writer, number, part in records if writer == name.encode()]
        batches = len(mine) // 5
        assert mine == [(number, part) for number in range(batches) for part in range(5)]
        assert batches in (count, count + 1), "one more may be there than it came to tell of"


def test_a_torn_end_is_rolled_back(tmp_path: Path) -> None:
    """The disk holds half of a commit, as after a crash in its midst: its journal undoes it."""
    path = tmp_path / "spool.db"
    spool = Spool(path, 2**24)
    spool.append([b"whole %d" % i for i in range(10)])
    before = path.read_bytes()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA cache_size = 1")  # so that pages are written before the commit
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(
        "INSERT INTO records (schema, data) VALUES ('1', ?)", [(b"y" * 3000,) for _ in range(100)]
    )
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for name in ("spool.db", "spool.db-journal"):
        (crashed / name).write_bytes((tmp_path / name).read_bytes())
    connection.rollback()
    assert (crashed / "spool.db").read_bytes() != before
    # Nor is the last page whole.
    with (crashed / "spool.db").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1000)
    found = Spool(crashed / "spool.db", 2**24)
    assert all_of(found) == [b"whole %d" % i for i in range(10)]
    assert found.append([b"on"]) == 1


def test_discarding_forgets_what_is_picked(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    spool = Spool(path, 2**24)
    assert spool.discard(lambda data: True) == 0
    spool.append([b"%d from %s" % (i, b"zoe" if i % 3 else b"bob") for i in range(30)])
    assert spool.discard(lambda data: data.endswith(b"zoe")) == 20
    assert all_of(spool) == [b"%d from bob" % i for i in range(0, 30, 3)]
    assert b"zoe" not in path.read_bytes()


def test_a_file_that_is_no_spool_says_so(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        Spool(path, 2**20).append([b"x"])
