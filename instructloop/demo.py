"""`instructloop demo`: a scripted rater teaches the served policy to keep to constraints, and it is measured.

Owns the demo's course: rate answers to the training instructions, measure on the held-out ones, run a round,
watch the swap, measure again, report. It goes over HTTP only, as any client and operator would, and reports
what happened also when nothing improved.
"""

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evaluation.checks import all_satisfied, share_satisfied
from instructloop import demo_streams
from instructloop.demo_client import Answer, DemoProblem, Server, each
from instructloop.demo_instructions import Instruction, demonstration, held_out, training
from instructloop.demo_progress import Progress, RoundLine
from instructloop.demo_report import Measurement, figures, write_report
from instructloop.demo_streams import Crossing, Crowd

__all__ = ["DemoProblem", "DemoSizes", "run_demo"]

RATER = "scripted-rater"
_STORED_SECONDS = 180.0
_SWAP_SECONDS = 180.0
_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class DemoSizes:
    """How much the demo does; None stands for all instructions. Smaller sizes are for trying it out."""

    training: int | None = None
    held_out: int | None = None
    ranked: int = 4
    measured: int = 4
    max_tokens: int = 64
    concurrency: int = 16
    streams: int = 16
    round_minutes: float = 60.0


@dataclass(slots=True)
class _Course:
    """What has happened so far; the report is made of it."""

    seed: int
    sizes: DemoSizes
    seconds: dict[str, float] = field(default_factory=dict)
    feedback: dict[str, int] = field(default_factory=dict)
    event_ids: list[str] = field(default_factory=list)


def run_demo(
    base_url: str,
    client_key: str,
    operator_key: str,
    *,
    seed: int,
    output: Path,
    sizes: DemoSizes | None = None,
) -> int:
    """Run the demo against the server at `base_url` and write `demo-report.html` and `demo.json` to `output`.

    Returns 0 when it ran through, whatever it found, and 1 when the round failed. Raises DemoProblem when it
    could not run through, and evaluation.report.ReportProblem when the report cannot be written.
    """
    return asyncio.run(_demo(base_url, client_key, operator_key, _Course(seed, sizes or DemoSizes()), output))


async def _demo(base_url: str, client_key: str, operator_key: str, course: _Course, output: Path) -> int:
    sizes = course.sizes
    to_rate, to_measure = _spread(training(), sizes.training), _spread(held_out(), sizes.held_out)
    async with Server(base_url, client_key, operator_key, concurrency=sizes.concurrency) as server:
        version = await server.check()
        print(
            "This demo's rater is a script, not a person: it ranks answers by checks that a program can do."
        )
        print(f"{version} serves. Rating answers to {len(to_rate)} instructions:", flush=True)
        with _timed(course, "rating"):
            await _rate(server, course, to_rate)
            await _wait_until_stored(server, course)
        print(f"Measuring {version} on {len(to_measure)} held-out instructions:", flush=True)
        with _timed(course, "measuring before"):
            before = await _measure(server, course, to_measure, version)
        crowd = Crowd(server, [item.text for item in to_rate], size=sizes.streams)
        try:
            with _timed(course, "round"):
                finished = await _run_round(server, course, crowd)
                served = await _wait_for_swap(server, finished, version)
        except BaseException:
            crowd.scatter()
            raise
        crossings = await crowd.leave()
        print(f"Measuring {served}, which serves now, on the same instructions:", flush=True)
        with _timed(course, "measuring after"):
            after = await _measure(server, course, to_measure, served)
        receipt = await server.receipt(course.event_ids[0])
    return _conclude(
        course,
        output,
        before=before,
        after=after,
        finished=finished,
        receipt=receipt,
        crossings=crossings,
    )


def _spread(instructions: Sequence[Instruction], count: int | None) -> list[Instruction]:
    """Return `count` of the instructions, evenly over all kinds."""
    if count is None or count >= len(instructions):
        return list(instructions)
    return [instructions[position * len(instructions) // count] for position in range(count)]


def _seed(course: _Course, number: int) -> int:
    """Return the sampling seed of the demo's `number`-th request; another for each seed of the demo."""
    return 1_000_000 * course.seed + number


# -- rating


async def _rate(server: Server, course: _Course, instructions: Sequence[Instruction]) -> None:
    """Ask for answers to all instructions, rank them, and add thumbs and demonstrations."""
    sizes = course.sizes

    async def ask(item: tuple[int, Instruction]) -> Answer:
        number, instruction = item
        return await server.ask(
            instruction.text,
            n=sizes.ranked,
            temperature=1.0,
            max_tokens=sizes.max_tokens,
            seed=_seed(course, number),
        )

    numbered = list(enumerate(instructions))
    answers = await each(numbered, ask, Progress("answered", len(instructions)))
    events = _events(instructions, answers, random.Random(course.seed))
    course.event_ids = await each(events, server.give, Progress("feedback given", len(events)))
    for event in events:
        course.feedback[event["type"]] = course.feedback.get(event["type"], 0) + 1


def _events(
    instructions: Sequence[Instruction], answers: Sequence[Answer], chance: random.Random
) -> list[dict[str, Any]]:
    """Return what the scripted rater says: a ranking each, thumbs on a third, demonstrations where it can."""
    events: list[dict[str, Any]] = []
    demonstrations: list[dict[str, Any]] = []
    for number, (instruction, answer) in enumerate(zip(instructions, answers, strict=True)):
        common = {"rater": RATER, "context": {"checks": list(instruction.checks)}}
        shares = [share_satisfied(instruction.checks, text) for text in answer.texts]
        events.append({"type": "ranking", "groups": _groups(answer.completion_id, shares), **common})
        if number % 3 == 0:
            choice = chance.randrange(len(shares))
            value = "up" if shares[choice] == 1 else "down"
            thumb = {"type": "thumb", "completion_id": answer.completion_id, "choice": choice, "value": value}
            events.append(thumb | common)
        best_first = sorted(range(len(shares)), key=lambda choice: -shares[choice])
        written = (demonstration(instruction, answer.texts[choice]) for choice in best_first)
        text = next((text for text in written if text is not None), None)
        if text is not None:
            demonstrated = {"type": "demonstration", "completion_id": answer.completion_id, "text": text}
            demonstrations.append(demonstrated | common)
    return events + demonstrations


def _groups(completion_id: str, shares: Sequence[float]) -> list[list[dict[str, Any]]]:
    """Return a ranking's groups, best first: choices that meet the same share of checks are tied."""
    return [
        [
            {"completion_id": completion_id, "choice": choice}
            for choice, own in enumerate(shares)
            if own == share
        ]
        for share in sorted(set(shares), reverse=True)
    ]


async def _wait_until_stored(server: Server, course: _Course) -> None:
    """Look the receipts up until all events are stored; raises DemoProblem if one is refused or stays."""
    progress = Progress("feedback stored", len(course.event_ids))
    pending = list(course.event_ids)
    deadline = time.monotonic() + _STORED_SECONDS
    while True:
        receipts = await each(pending, server.receipt, lambda _: None)
        refused = [receipt for receipt in receipts if receipt["status"] not in ("stored", "queued")]
        if refused:
            raise DemoProblem(f"an event was not taken: {refused[0]}")
        pending = [receipt["event_id"] for receipt in receipts if receipt["status"] == "queued"]
        progress(len(course.event_ids) - len(pending))
        if not pending:
            return
        if time.monotonic() > deadline:
            raise DemoProblem(
                f"{len(pending)} events were not stored in {_STORED_SECONDS:.0f} s: is `ingest` running?"
            )
        await asyncio.sleep(_POLL_SECONDS)


# -- measuring


async def _measure(
    server: Server, course: _Course, instructions: Sequence[Instruction], version: str
) -> Measurement:
    """Sample answers to all instructions, and greedy ones, from what serves now."""
    sizes = course.sizes

    async def ask(item: tuple[int, Instruction, bool]) -> tuple[str, ...]:
        number, instruction, greedy = item
        answer = await server.ask(
            instruction.text,
            n=1 if greedy else sizes.measured,
            temperature=0.0 if greedy else 0.7,
            max_tokens=sizes.max_tokens,
            seed=_seed(course, 10_000 + number),
        )
        return answer.texts

    work = [
        (number, instruction, greedy)
        for greedy in (False, True)
        for number, instruction in enumerate(instructions)
    ]
    texts = await each(work, ask, Progress("answered", len(work)))
    count = len(instructions)
    measured = Measurement(
        version, tuple(instructions), tuple(texts[:count]), tuple(text for (text,) in texts[count:])
    )
    satisfied = [
        all_satisfied(instruction.checks, text)
        for instruction, found in zip(instructions, measured.sampled, strict=True)
        for text in found
    ]
    print(f"  all constraints met in {sum(satisfied) / len(satisfied):.1%} of the answers", flush=True)
    return measured


# -- the round


async def _run_round(server: Server, course: _Course, crowd: Crowd) -> dict[str, Any]:
    """Ask for a round, show its progress, let the crowd in before a swap; return the round."""
    round_id = await server.request_round()
    print(f"Round {round_id} was asked for:", flush=True)
    shown = RoundLine()
    deadline = time.monotonic() + 60 * course.sizes.round_minutes
    while True:
        state = await server.round(round_id)
        shown(state)
        if state["state"] in ("done", "failed"):
            if _promoted(state):
                # A replica proves a version's files before it pauses, so the streams are there in time.
                print(f"  {course.sizes.streams} clients stream from here on, across the swap", flush=True)
                crowd.start()
            return state
        if time.monotonic() > deadline:
            raise DemoProblem(
                f"round {round_id} did not end in {course.sizes.round_minutes:g} minutes (it is "
                f"{state['state']}, stage {state['stage']}): is the trainer running?"
            )
        await asyncio.sleep(_POLL_SECONDS)


def _promoted(state: dict[str, Any]) -> bool:
    return state["state"] == "done" and bool((state["verdict"] or {}).get("promote"))


async def _wait_for_swap(server: Server, finished: dict[str, Any], before: str) -> str:
    """Return the version that serves after the round: the candidate, once every replica has it."""
    if not _promoted(finished):
        return before
    wanted = finished["version"]
    deadline = time.monotonic() + _SWAP_SECONDS
    while True:
        replicas = [item for item in await server.replicas() if item["state"] != "stopped"]
        if replicas and all(item["state"] == "serving" and item["actual"] == wanted for item in replicas):
            print(
                f"  {wanted} serves now (swapped in {replicas[0]['last_swap_seconds'] or 0:.2f} s)",
                flush=True,
            )
            return str(wanted)
        if time.monotonic() > deadline:
            raise DemoProblem(
                f"{wanted} passed the gate but does not serve everybody after {_SWAP_SECONDS:.0f} s (with "
                f"evaluation.canary_share it is a canary first): {replicas}"
            )
        await asyncio.sleep(0.5)


# -- the end


def _conclude(
    course: _Course,
    output: Path,
    *,
    before: Measurement,
    after: Measurement,
    finished: dict[str, Any],
    receipt: dict[str, Any],
    crossings: Sequence[Crossing],
) -> int:
    """Write the report and the figures, and say in a few lines what happened."""
    found = figures(before, after, seed=course.seed) | {
        "seed": course.seed,
        "sizes": asdict(course.sizes),
        "rater": "a script that ranks by program-checkable constraints; no person",
        "feedback": course.feedback,
        "first_receipt": receipt,
        "round": finished,
        "swap": demo_streams.summary(crossings),
        "seconds": course.seconds,
    }
    write_report(output / "demo-report.html", found, before, after)
    (output / "demo.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    if finished["state"] == "failed":
        print(f"Round {finished['id']} failed: {finished['error']}")
    for line in found["conclusions"]:
        print(line)
    swap = found["swap"]
    print(
        f"Streams: {swap['streams']}, failed {swap['failed']}, cut short {swap['cut']}, "
        f"with tokens of both versions {swap['across_the_swap']}."
    )
    print(f"Report: {output / 'demo-report.html'}   figures: {output / 'demo.json'}")
    return 1 if finished["state"] == "failed" else 0


@contextmanager
def _timed(course: _Course, name: str) -> Iterator[None]:
    """Note how long a part of the course took, in seconds."""
    started = time.monotonic()
    try:
        yield
    finally:
        course.seconds[name] = round(time.monotonic() - started, 1)
