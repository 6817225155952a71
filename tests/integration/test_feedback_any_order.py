"""Whatever the order, the batches and the redeliveries, the store agrees with an obvious slow model."""

from dataclasses import dataclass

import sqlalchemy as sa
from feedback_samples import completion, entries, thumb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import Engine

from feedback import tables
from feedback.events import Event, Thumb
from feedback.store import Slice, Store

IDS = ("a", "b", "c")


@dataclass(frozen=True)
class Delivery:
    """Batches of event numbers and completion ids, some of them delivered again."""

    events: list[Event]
    batches: list[list[int | str]]

    @property
    def arrived(self) -> set[int | str]:
        return {item for batch in self.batches for item in batch}


@st.composite
def deliveries(draw: st.DrawFn) -> Delivery:
    kinds = st.tuples(st.sampled_from(IDS), st.integers(0, 2), st.sampled_from(["x", "y"]))
    said = draw(st.lists(kinds, min_size=1, max_size=8))
    times = draw(st.permutations(range(len(said))))
    events = [
        thumb(f"e{number}", of, choice=choice, rater=rater, received_at=float(time))
        for number, ((of, choice, rater), time) in enumerate(zip(said, times, strict=True))
    ]
    items: list[int | str] = [*range(len(events)), *draw(st.sets(st.sampled_from(IDS)))]
    order = draw(st.permutations(items + draw(st.lists(st.sampled_from(items), max_size=4))))
    batches: list[list[int | str]] = [[]]
    for item in order:
        if draw(st.booleans()):
            batches.append([])
        batches[-1].append(item)
    return Delivery(events, batches)


def model(delivery: Delivery) -> dict[str, str]:
    """The status that each event must end with: each rule in a line, no order, no batches."""
    expected: dict[str, str] = {}
    counting: dict[tuple[str, str, int], list[Event]] = {}
    for event in delivery.events:
        said = event.feedback
        assert isinstance(said, Thumb)
        if said.completion_id not in delivery.arrived:
            expected[event.event_id] = "waiting"
        elif said.choice > 1:
            expected[event.event_id] = "rejected"
        else:
            counting.setdefault((event.rater, said.completion_id, said.choice), []).append(event)
    for rivals in counting.values():
        last = max(rivals, key=lambda event: event.received_at)
        expected |= {event.event_id: "stored" if event is last else "superseded" for event in rivals}
    return expected


@given(deliveries())
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
def test_the_end_does_not_depend_on_the_way(database: Engine, delivery: Delivery) -> None:
    _empty(database)
    store = Store(database)
    slices: list[tuple[int, int, Slice]] = []
    for batch in delivery.batches:
        before = store.head()
        records = [completion(item) if isinstance(item, str) else delivery.events[item] for item in batch]
        store.ingest(entries(*records))
        slices += [(start, store.head(), store.slice(start, store.head())) for start in (0, before)]
    found = {event.event_id: store.event(event.event_id) for event in delivery.events}
    assert {name: one.status for name, one in found.items() if one is not None} == model(delivery)
    # Positions are given once and without gaps, and current events are exactly the slice of all.
    positions = [one.position for one in found.values() if one is not None and one.position is not None]
    assert sorted(positions) == list(range(1, store.head() + 1))
    current = {name for name, status in model(delivery).items() if status == "stored"}
    assert {event.event_id for event in store.slice(0, store.head()).events} == current
    # A slice that was taken on the way is the same now.
    assert all(store.slice(start, end) == then for start, end, then in slices)
    # Who was replaced leads, step by step, to the one that counts.
    for one in found.values():
        while one is not None and one.status == "superseded":
            after = found[str(one.superseded_by)]
            assert after is not None and after.event.received_at > one.event.received_at
            one = after  # noqa: PLW2901


def _empty(engine: Engine) -> None:
    with engine.begin() as connection:
        for table in reversed(tables.METADATA.sorted_tables):
            if table is not tables.counter:
                connection.execute(sa.delete(table))
        connection.execute(sa.update(tables.counter).values(value=0))
