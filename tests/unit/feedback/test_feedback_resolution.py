"""What becomes of an event, compared with a slow and obvious statement of the rules."""

from hypothesis import given
from hypothesis import strategies as st

from feedback.events import FEEDBACK, Feedback, references
from feedback.resolution import Outcome, Part
from feedback.resolution import resolve as resolve_references


def resolve(feedback: Feedback, known: dict[str, list[Part]]) -> Outcome:
    return resolve_references(references(feedback), known)


def part(
    number: int = 0, choices: tuple[int, ...] = (0, 1), prompt: str = "p", parts: int | None = None
) -> Part:
    return Part(number, parts, prompt, frozenset(choices))


def thumb(id: str, choice: int = 0) -> Feedback:
    return FEEDBACK.validate_python({"type": "thumb", "completion_id": id, "choice": choice, "value": "up"})


def ranking(*refs: tuple[str, int]) -> Feedback:
    return FEEDBACK.validate_python(
        {"type": "ranking", "groups": [[{"completion_id": id, "choice": choice}] for id, choice in refs]}
    )


def test_an_event_waits_for_its_completion() -> None:
    assert resolve(thumb("chatcmpl-1"), {}) == Outcome("waiting", "no such completion: chatcmpl-1")
    assert resolve(thumb("chatcmpl-1"), {"chatcmpl-1": [part()]}) == Outcome("stored")


def test_a_choice_that_can_never_come_is_rejected_with_its_number() -> None:
    outcome = resolve(thumb("chatcmpl-1", 2), {"chatcmpl-1": [part()]})
    assert outcome == Outcome("rejected", "completion chatcmpl-1 has no choice 2")


def test_a_completion_of_several_prompts_is_waited_for_until_all_are_there() -> None:
    first, second = part(0, (0, 1)), part(1, (2, 3), "q")
    assert resolve(thumb("cmpl-1", 2), {"cmpl-1": [first]}).status == "waiting"
    assert resolve(thumb("cmpl-1", 2), {"cmpl-1": [first, second]}).status == "stored"
    known = {"cmpl-1": [part(0, (0, 1), parts=2), part(1, (2, 3), parts=2)]}
    assert resolve(thumb("cmpl-1", 4), known).status == "rejected"
    assert resolve(thumb("cmpl-1", 4), {"cmpl-1": known["cmpl-1"][:1]}).status == "waiting"


def test_a_ranking_is_of_one_prompt() -> None:
    same = {"a": [part()], "b": [part()]}
    assert resolve(ranking(("a", 0), ("b", 1)), same).status == "stored"
    outcome = resolve(ranking(("a", 0), ("b", 1)), {"a": [part()], "b": [part(prompt="q")]})
    assert outcome.status == "rejected"
    assert outcome.reason is not None and outcome.reason.startswith("groups:")
    parts = {"cmpl-1": [part(0, (0,)), part(1, (1,), "q")]}
    assert resolve(ranking(("cmpl-1", 0), ("cmpl-1", 1)), parts).status == "rejected"


def test_a_ranking_over_two_prompts_is_rejected_before_the_rest_arrives() -> None:
    known = {"a": [part()], "b": [part(prompt="q")]}
    assert resolve(ranking(("a", 0), ("b", 0), ("c", 0)), known).status == "rejected"


def test_a_demonstration_on_messages_needs_nothing() -> None:
    told = FEEDBACK.validate_python(
        {"type": "demonstration", "messages": [{"role": "user", "content": "a"}], "text": "b"}
    )
    assert resolve(told, {}) == Outcome("stored")


ids = st.sampled_from(["a", "b", "c"])


@given(
    refs=st.lists(st.tuples(ids, st.integers(0, 3)), min_size=2, max_size=5, unique=True),
    known=st.dictionaries(ids, st.builds(part, choices=st.just((0, 1)), prompt=st.sampled_from("pq"))),
)
def test_rankings_follow_the_rules(refs: list[tuple[str, int]], known: dict[str, Part]) -> None:
    there = [(id, choice) for id, choice in refs if id in known]
    impossible = any(choice not in (0, 1) for _, choice in there)
    prompts = {known[id].prompt_hash for id, choice in there if choice in (0, 1)}
    if impossible or len(prompts) > 1:
        expected = "rejected"
    elif len(there) < len(refs):
        expected = "waiting"
    else:
        expected = "stored"
    outcome = resolve(ranking(*refs), {id: [one] for id, one in known.items()})
    assert outcome.status == expected
    assert (outcome.reason is None) == (expected == "stored")
