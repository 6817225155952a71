"""Judges: each says of two answers to one prompt which is the better, all behind one protocol.

Owns the protocol and the judges that need nothing but this process: reward models, program checks, cases. The
judges that ask somebody are in `endpoint_judge` and `people_judge`; what follows from verdicts is elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from evaluation.checks import all_satisfied, degenerate, share_satisfied
from evaluation.comparison import outcome
from evaluation.reward_model import RewardModel, score_responses


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What is asked, as text: `key` names it, `messages` are role and content, `checks` what programs check.

    A prompt that is no chat is one message of the user's. That of a case may have a `bad` answer.
    """

    key: str
    messages: tuple[Mapping[str, str], ...]
    checks: tuple[Mapping[str, Any], ...] = ()
    bad: str | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, as text."""

    prompt: ChatPrompt
    first: str
    second: str

    @property
    def swapped(self) -> "Pair":
        """The same two answers in the other order."""
        return Pair(self.prompt, self.second, self.first)


class Judge(Protocol):
    """Anything that tells the better of two answers.

    `axis` says by what: `overall`, `helpful`, `honest`, `harmless`, `attempts`, `constraints`, `truthful` or
    `passing`. `agreement` holds how often the judge agreed with people, as `evaluation.agreement.kept` gives
    it, by data set; None where nobody measured it. It is to be stated beside the judge's verdicts.
    """

    name: str
    axis: str
    agreement: Mapping[str, Any] | None

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """1 where the first answer wins, 0 where the second does, 0.5 for a tie, None for no verdict."""


class RewardModelJudge:
    """The answer that a reward model scores higher wins; its `name` should say which model it is.

    Prompts keep their last `prompt_tokens`, answers their first `response_tokens`, as in training. An answer
    ends with the end-of-turn token, as one that its author ended. It is scored once, however many others it
    is compared with.
    """

    axis = "overall"

    def __init__(
        self,
        name: str,
        model: RewardModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_tokens: int = 1024,
        response_tokens: int = 1024,
        agreement: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.agreement = agreement
        self._model = model
        self._tokenizer = tokenizer
        self._prompt_tokens = prompt_tokens
        self._response_tokens = response_tokens
        self._scores: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """Score what is new, all answers to a prompt in one row with it."""
        asked = [
            [
                (tuple(self._prompt(pair.prompt)), tuple(self._answer(text)))
                for text in (pair.first, pair.second)
            ]
            for pair in pairs
        ]
        new: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}  # in order, each once
        for prompt, answer in (one for both in asked for one in both):
            if (prompt, answer) not in self._scores:
                new.setdefault(prompt, {})[answer] = None
        for (prompt, answers), scores in zip(
            new.items(), score_responses(self._model, [(p, list(a)) for p, a in new.items()]), strict=True
        ):
            for answer, score in zip(answers, scores, strict=True):
                self._scores[prompt, answer] = score
        return [outcome(*(self._scores[one] for one in both)) for both in asked]

    def _prompt(self, prompt: ChatPrompt) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            [dict(message) for message in prompt.messages], add_generation_prompt=True, return_dict=False
        )
        return ids[-self._prompt_tokens :]

    def _answer(self, text: str) -> list[int]:
        ids = [*self._tokenizer(text, add_special_tokens=False).input_ids, self._tokenizer.eos_token_id]
        return ids[: self._response_tokens]


class ChecksJudge:
    """The answer that meets more of its prompt's checks wins; there is no verdict where a prompt has none."""

    name = "checks"
    axis = "constraints"
    # A program does not err about what it checks, so there is nothing to measure with people.
    agreement: Mapping[str, Any] | None = None

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """Compare the shares of the checks that are met. Raises BadCheck."""
        return [checked(pair.prompt.checks, pair.first, pair.second) for pair in pairs]


class CasesJudge:
    """An answer that passes its case wins over one that does not, each passing as for `evaluation.cases`.

    That is by the case's checks, or without any by beating its bad answer in the eyes of `reference`. There
    is no verdict on prompts that are no cases, and without a reference on those that have no checks.
    """

    name = "cases"
    axis = "passing"

    def __init__(self, reference: RewardModelJudge | None) -> None:
        self.reference = reference
        self.agreement = None if reference is None else reference.agreement

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """Compare whether the two answers pass. Raises BadCheck."""
        answers = [(pair.prompt, text) for pair in pairs for text in (pair.first, pair.second)]
        passed = self._passed(answers)
        return [
            None if ours is None or theirs is None else outcome(ours, theirs)
            for ours, theirs in zip(passed[::2], passed[1::2], strict=True)
        ]

    def _passed(self, answers: Sequence[tuple[ChatPrompt, str]]) -> list[bool | None]:
        beside = {
            n: Pair(prompt, text, prompt.bad)
            for n, (prompt, text) in enumerate(answers)
            if self.reference is not None and prompt.bad is not None and not prompt.checks
        }
        verdicts = self.reference.compare(list(beside.values())) if self.reference and beside else []
        better = dict(zip(beside, verdicts, strict=True))
        return [
            better[n] == 1 and not degenerate(text)
            if n in better
            else all_satisfied(prompt.checks, text)
            if prompt.checks
            else None
            for n, (prompt, text) in enumerate(answers)
        ]


def checked(checks: Sequence[Mapping[str, Any]], first: str, second: str) -> float | None:
    """Return the first text's outcome by the share of `checks` that each meets; None without checks."""
    if not checks:
        return None
    return outcome(share_satisfied(checks, first), share_satisfied(checks, second))
