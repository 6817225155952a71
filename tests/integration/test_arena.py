"""The arena on SQLite and on Postgres: blind pairs, one vote a rater, and verdicts out of them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy.engine import Engine

from evaluation.judges import ChatPrompt, Pair
from evaluation.people_judge import PeopleJudge
from registry.arena import AlreadyVoted, Arena, BlindPair, OfferedPair, UnknownPair

ASKED = [{"role": "user", "content": "Name a frog."}]


def offered(number: int) -> OfferedPair:
    return OfferedPair(ASKED, f"good {number}", f"bad {number}")


def prefer(arena: Arena, rater: str, word: str) -> BlindPair | None:
    """Vote for the answer that has a word, as a rater sees the pair; returns the pair."""
    pair = arena.next_pair(rater)
    if pair is not None:
        arena.vote(pair.id, rater, "first" if word in pair.first else "second")
    return pair


def test_each_rater_is_asked_once_in_an_order_of_its_own(either_database: Engine) -> None:
    arena = Arena(either_database)
    ids = arena.offer([offered(i) for i in range(40)], wanted=2)
    assert ids == arena.offer([offered(i) for i in range(40)]), "the same pairs are not new ones"
    swapped = {"k/ann": 0, "k/bob": 0}
    orders: dict[str, set[bool]] = {}
    for rater in swapped:
        seen = []
        while (pair := arena.next_pair(rater)) is not None:
            assert pair == arena.next_pair(rater), "looking again shows the same"
            assert {pair.first[:4], pair.second[:4]} == {"good", "bad "}
            swapped[rater] += pair.first.startswith("bad")
            orders.setdefault(pair.id, set()).add(pair.first.startswith("bad"))
            arena.vote(pair.id, rater, "first" if pair.first.startswith("good") else "second")
            seen.append(pair.id)
        assert sorted(seen) == sorted(ids)
    # 40 tosses: outside of this once in more than ten thousand runs.
    assert all(8 <= count <= 32 for count in swapped.values())
    assert {True, False} in orders.values(), "two raters see the pairs in the same order"
    assert arena.next_pair("k/eve") is None, "enough have voted"
    votes = arena.votes(ids)
    assert {vote.outcome for own in votes.values() for vote in own} == {1.0}
    assert {len(own) for own in votes.values()} == {2}


def test_a_vote_stands_and_its_labels_go_with_their_answers(either_database: Engine) -> None:
    arena = Arena(either_database)
    (id_,) = arena.offer([offered(1)], wanted=20)
    for number in range(12):
        rater = f"k/r{number}"
        pair = arena.next_pair(rater)
        assert pair is not None
        labels = [["hallucination"] if "bad" in text else ["opinion"] for text in (pair.first, pair.second)]
        for _ in range(2):
            arena.vote(id_, rater, "tie", first_labels=labels[0], second_labels=labels[1])
        with pytest.raises(AlreadyVoted):
            arena.vote(id_, rater, "first", first_labels=labels[0], second_labels=labels[1])
        with pytest.raises(AlreadyVoted):
            arena.vote(id_, rater, "tie")
    (votes,) = arena.votes([id_]).values()
    assert len(votes) == 12
    assert {(v.outcome, *v.first_labels, *v.second_labels) for v in votes} == {
        (0.5, "opinion", "hallucination")
    }
    with pytest.raises(UnknownPair):
        arena.vote("pair-none", "k/r1", "tie")


def test_many_raters_at_once_lose_no_vote(either_database: Engine) -> None:
    arena = Arena(either_database)
    with ThreadPoolExecutor(4) as pool:
        offers = list(pool.map(lambda _: arena.offer([offered(i) for i in range(6)], wanted=4), range(4)))
        assert all(ids == offers[0] for ids in offers)
        voted = pool.map(lambda r: [prefer(arena, f"k/r{r}", "good") for _ in range(6)], range(4))
        cast = sum(pair is not None for pairs in voted for pair in pairs)
    assert sum(len(votes) for votes in arena.votes(offers[0]).values()) == cast == 24


def test_any_text_can_be_offered(either_database: Engine) -> None:
    arena = Arena(either_database)
    pair = OfferedPair([{"role": "user", "content": "nul \0 and \ud800"}], "\0" * 3, "🐸" * 1000)
    (id_,) = arena.offer([pair])
    shown = arena.next_pair("k/ann")
    assert shown is not None
    assert shown.id == id_
    assert "🐸" * 1000 in (shown.first, shown.second)
    assert "\0" not in shown.first + shown.second


def test_people_are_a_judge_whose_verdicts_come_later(either_database: Engine) -> None:
    arena = Arena(either_database)
    judge = PeopleJudge(arena, wanted=3)
    prompt = ChatPrompt("p", tuple(ASKED))
    pairs = [Pair(prompt, "good a", "bad b"), Pair(prompt, "bad c", "good d"), Pair(prompt, "same", "same")]
    assert judge.compare(pairs) == [None, None, 0.5]
    for rater in ("k/ann", "k/bob"):
        while prefer(arena, rater, "good") is not None:
            pass
    assert judge.compare(pairs) == [None, None, 0.5], "two of three have voted"
    while (pair := arena.next_pair("k/eve")) is not None:
        arena.vote(pair.id, "k/eve", "first" if "bad" in pair.first else "second")
    assert judge.compare(pairs) == [1.0, 0.0, 0.5], "the majority decides"
    assert judge.compare([pairs[0].swapped]) == [None], "the other way round it is another pair"
    assert PeopleJudge(arena, wanted=4).compare(pairs)[:2] == [None, None]
    while (pair := arena.next_pair("k/max")) is not None:
        arena.vote(pair.id, "k/max", "first" if "bad" in pair.first else "second")
    assert PeopleJudge(arena, wanted=4).compare(pairs) == [0.5] * 3, "two and two is a tie"


def test_who_is_forgotten_has_cast_no_vote_and_what_is_withdrawn_is_gone(either_database: Engine) -> None:
    arena = Arena(either_database)
    ids = arena.offer([offered(1), offered(2)], wanted=5)
    for rater in ("k/ann", "k/bob"):
        while prefer(arena, rater, "good") is not None:
            pass
    assert arena.forget(lambda rater: rater == "k/ann") == 2
    assert arena.forget(lambda rater: rater == "k/ann") == 0
    assert [vote.rater for votes in arena.votes(ids).values() for vote in votes] == ["k/bob"] * 2
    arena.withdraw(ids[:1])
    assert [len(votes) for votes in arena.votes(ids).values()] == [0, 1]
    seen = arena.next_pair("k/eve")
    assert seen is not None
    assert seen.id == ids[1]
