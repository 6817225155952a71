"""What events become where raters are compared."""

from typing import Any

from feedback.events import FEEDBACK, Event
from feedback.votes import Vote, key_of, ranking_verdicts, verdicts_of, votes_of


def event(event_id: str = "e1", rater: str = "k1/ann", **said: Any) -> Event:
    feedback = FEEDBACK.validate_python(said)
    return Event(event_id=event_id, key_id="k1", rater=rater, received_at=7.0, feedback=feedback)


def ref(choice: int, name: str = "c") -> dict[str, Any]:
    return {"completion_id": name, "choice": choice}


def test_a_ranking_says_something_of_every_pair_whatever_order_it_names_them_in() -> None:
    said = {("c#0", "c#1"): "-", ("c#0", "c#2"): "=", ("c#1", "c#2"): "+"}
    for groups in ([[ref(1)], [ref(0), ref(2)]], [[ref(1)], [ref(2), ref(0)]]):
        assert verdicts_of(event(type="ranking", groups=groups).feedback) == said  # type: ignore[arg-type]
    assert ranking_verdicts([["b"], ["a"]]) == {("a", "b"): "-"}


def test_a_thumb_and_a_rating_of_the_same_response_can_be_compared() -> None:
    found = [
        verdicts_of(event(**said, **ref(1)).feedback)  # type: ignore[arg-type]
        for said in (
            {"type": "thumb", "value": "up"},
            {"type": "rating", "score": 5},
            {"type": "thumb", "value": "down"},
            {"type": "rating", "score": 3},
            {"type": "rating", "score": 4},
        )
    ]
    assert found == [{("c#1",): label} for label in "++--="]


def test_votes_carry_who_when_and_on_which_prompt_and_leave_out_the_rest() -> None:
    events = [
        event("e1", type="thumb", value="up", **ref(0), context={"task": "summaries"}),
        event("e2", type="demonstration", completion_id="c", text="better"),
        event("e3", type="thumb", value="up", **ref(0, "unknown")),
        event("e4", rater="k2/", type="ranking", groups=[[ref(0)], [ref(1)]]),
    ]
    assert votes_of(events, {("c", 0): "hash"}) == [
        Vote("e1", "k1/ann", "k1", "hash", {("c#0",): "+"}, task="summaries", at=7.0),
        Vote("e4", "k2/", "k2", "hash", {("c#0", "c#1"): "+"}, task="ranking", at=7.0),
    ]
    assert key_of("k2/a/b") == "k2"
