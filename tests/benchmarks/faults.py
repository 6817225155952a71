"""What was acknowledged is stored exactly once and in order, whatever fails: real processes, counted.

Givers send events of all four types to the real HTTP routes, each event under its Idempotency-Key until it is
accepted (a few give up after the first failure, many repeat what was accepted), while every part is killed,
stopped, cut off or run out of room in turn. At the end the store is compared with what was acknowledged.
Where vLLM stands in the product, an app answers at once and is recorded as the engine's answers are. Prints
JSON. Run it with `make bench-faults`; some minutes on two cores.
"""

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import Sequence

import sqlalchemy as sa

from feedback import tables
from tests.benchmarks.fault_parts import Proxy, work_directory
from tests.benchmarks.fault_run import LAYOUTS, Fault, Run, Tally


async def kill_part(run: Run, name: str, *, away_seconds: float = 0.5) -> None:
    if name == "server":
        run.server_deaths.append(time.monotonic())
    await run.parts[name].kill()
    await asyncio.sleep(away_seconds)
    await run.parts[name].start()


async def end_server(run: Run) -> None:
    """As an operator does: what is in memory is sent or saved."""
    await run.parts["server"].kill(signal.SIGTERM)
    await run.parts["server"].start()


async def hang_part(run: Run, name: str, *, seconds: float) -> None:
    run.parts[name].pause()
    await asyncio.sleep(seconds)
    run.parts[name].resume()
    await run.parts[name].wait_ready()


async def kill_redis_and_server(run: Run) -> None:
    """The records of an outage are in the spool when the server dies."""
    await run.parts["redis"].kill()
    await asyncio.sleep(5)
    run.server_deaths.append(time.monotonic())
    await run.parts["server"].kill()
    await run.parts["server"].start()
    await asyncio.sleep(1)
    await run.parts["redis"].start()


async def cut(proxy: Proxy, share: float) -> None:
    proxy.cut_share = share
    await asyncio.sleep(3)
    proxy.cut_share = 0.0


async def fill_memory(run: Run) -> None:
    with run.primary.client() as client:
        client.config_set("maxmemory", 1)
        await asyncio.sleep(3)
        client.config_set("maxmemory", 0)


async def fill_redis_disk(run: Run) -> None:
    """Redis ends itself when it can't write its log, each time that it is started."""
    quota = run.primary.quota
    quota.fill(run.parts["redis"].pid)
    await asyncio.sleep(3)
    quota.free(run.parts["redis"].pid)
    await run.parts["redis"].wait_ready()


async def fill_store_disk(run: Run) -> None:
    """The disk of store and spool; Redis is away for a part of the time."""
    quota = run.quotas[0]
    quota.fill(run.parts["ingest"].pid)
    await asyncio.sleep(2)
    await kill_part(run, "redis", away_seconds=1.5)
    await asyncio.sleep(1)
    quota.free(run.parts["ingest"].pid)


async def fail_over(run: Run) -> None:
    """The primary's machine is lost with its disk; its replica takes over and gets a replica of its own."""
    old, new = run.redis
    await run.parts["redis"].kill()
    with new.client() as client:
        client.replicaof("NO", "ONE")
    new.replica_of = None
    for proxy in run.to_redis.values():
        proxy.upstream = new.upstream
        proxy.disconnect()
    await asyncio.sleep(1)
    old.wipe()
    old.replica_of = new.port
    run.redis = [new, old]
    run.parts["redis"], run.parts["replica"] = run.parts["replica"], run.parts["redis"]
    await run.parts["replica"].start()


async def weaken_settings(run: Run) -> None:
    """Redis can't promise durability: feedback is refused, `/ready` says why, generation goes on."""
    # Another reason, a connection that an earlier fault cut, would be told first.
    while (await run.ready()).status_code != 200:
        await asyncio.sleep(0.1)
    with run.primary.client() as client:
        for name, weak in (("appendfsync", "everysec"), ("maxmemory-policy", "allkeys-lru")):
            strong = client.config_get(name)[name]
            client.config_set(name, weak)
            await asyncio.sleep(1.5)
            before = run.accepted()
            ready = await run.ready()
            answered = await run.generated()
            await asyncio.sleep(0.5)
            if ready.status_code != 503 or weak not in ready.json()["feedback"] or not answered:
                run.tally.mistakes.append(f"{name} {weak}: {ready.text}")
            if run.accepted() != before:
                run.tally.mistakes.append(f"{name} {weak}: events are accepted")
            client.config_set(name, strong)


async def hold_the_database(run: Run) -> None:
    """Another transaction holds what ingest needs."""
    with run.engine.begin() as connection:
        connection.execute(sa.update(tables.counter).values(value=tables.counter.c.value))
        await asyncio.sleep(4)


FAULTS: dict[str, Fault] = {
    "kill Redis": lambda run: kill_part(run, "redis"),
    "Redis hangs": lambda run: hang_part(run, "redis", seconds=5),
    "kill ingest": lambda run: kill_part(run, "ingest"),
    "kill the server": lambda run: kill_part(run, "server"),
    "end the server": end_server,
    "kill Redis, then the server": kill_redis_and_server,
    "cut HTTP": lambda run: cut(run.http, 0.3),
    "cut the server's Redis": lambda run: cut(run.to_redis["server"], 0.3),
    "cut ingest's Redis": lambda run: cut(run.to_redis["ingest"], 0.5),
    "fill Redis' memory": fill_memory,
    "fill Redis' disk": fill_redis_disk,
    "fill the store's disk": fill_store_disk,
    "hold the database": hold_the_database,
    "weaken Redis' settings": weaken_settings,
    "kill the replica": lambda run: kill_part(run, "replica", away_seconds=2),
    "the replica hangs": lambda run: hang_part(run, "replica", seconds=5),
    "lose the primary": fail_over,
    "kill Postgres": lambda run: kill_part(run, "postgres", away_seconds=2),
    "Postgres hangs": lambda run: hang_part(run, "postgres", seconds=7),
}
OF_REPLICA = ("kill the replica", "the replica hangs", "lose the primary")
OF_POSTGRES = ("kill Postgres", "Postgres hangs")


def faults_of(layout: str) -> list[str]:
    """List the faults that a layout can have."""
    left_out = () if layout.startswith("replica") else OF_REPLICA
    left_out += () if layout.endswith("postgres") else OF_POSTGRES
    return [name for name in FAULTS if name not in left_out]


async def harm(layout: str, faults: Sequence[str], events: int, seed: int) -> Tally:
    """Run one layout with these faults in turn."""
    async with work_directory() as work:
        return await Run(layout, work, seed).run({name: FAULTS[name] for name in faults}, events)


def main() -> None:
    """Run all layouts and print what they saw, each and together; exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=50_000, help="events accepted, over all layouts")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="default: all")
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # Ended like by Ctrl-C: processes and mounts are cleared away.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    layouts = options.layout or LAYOUTS
    found = {}
    for place, layout in enumerate(layouts):
        names = options.fault or faults_of(layout)
        random.Random(options.seed + place).shuffle(names)
        share = options.events // len(layouts)
        found[layout] = asyncio.run(harm(layout, names, share, options.seed + place))
    total = sum(found.values(), Tally())
    print(json.dumps({"total": vars(total)} | {name: vars(tally) for name, tally in found.items()}, indent=1))
    sys.exit(0 if total.sound else 1)


if __name__ == "__main__":
    main()
