"""People as the judge: pairs are offered in the arena, and the votes are read as they come.

Owns how votes on a pair become one verdict, and whose labels are whose. The arena itself is
`registry.arena`'s.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.judges import Pair
from registry.arena import Arena, ArenaVote, OfferedPair


class PeopleJudge:
    """Whoever votes in the arena, the majority of `wanted` people a pair, who know of no names.

    `compare` never waits: a pair has no verdict until so many have voted, and asking again is how to see
    whether they have. Equal answers are a tie that nobody is asked about.
    """

    # They are the people.
    agreement: Mapping[str, Any] | None = None

    def __init__(self, arena: Arena, *, wanted: int = 1, axis: str = "overall") -> None:
        self.name = "people" if axis == "overall" else f"people on {axis}"
        self.axis = axis
        self._arena = arena
        self._wanted = wanted

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """Offer the pairs that are not there yet, and return the verdicts that there are."""
        offered = [self._offered(pair) for pair in pairs]
        asked = [one for one in offered if one.first != one.second]
        self._arena.offer(asked, self._wanted)
        votes = self._arena.votes([one.id for one in asked])
        return [0.5 if one.first == one.second else self._verdict(votes[one.id]) for one in offered]

    def labels(self, pairs: Sequence[Pair]) -> list[tuple[list[list[str]], list[list[str]]]]:
        """Return for the two answers of each pair the labels that each voter so far gave it."""
        ids = [self._offered(pair).id for pair in pairs]
        votes = self._arena.votes(ids)
        return [
            ([vote.first_labels for vote in votes[id]], [vote.second_labels for vote in votes[id]])
            for id in ids
        ]

    def _offered(self, pair: Pair) -> OfferedPair:
        return OfferedPair(pair.prompt.messages, pair.first, pair.second, self.axis)

    def _verdict(self, votes: Sequence[ArenaVote]) -> float | None:
        if len(votes) < self._wanted:
            return None
        mean = sum(vote.outcome for vote in votes) / len(votes)
        return 0.5 if mean == 0.5 else float(mean > 0.5)
