"""Who takes part in an evaluation: the contestants and judges that a request names, made of what is there.

Owns what they are made with, and closes what they opened. What they are asked is `evaluation.run`'s.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer

from evaluation.agreement import kept
from evaluation.contestants import (
    Contestant,
    EndpointContestant,
    Sampling,
    SharedEngine,
    VersionContestant,
)
from evaluation.endpoint import Endpoint
from evaluation.endpoint_judge import EndpointJudge
from evaluation.few_shot import FEW_SHOT
from evaluation.judges import CasesJudge, ChecksJudge, Judge, RewardModelJudge
from evaluation.people_judge import PeopleJudge
from evaluation.reward_model import RewardModel
from evaluation.sampler import Sampler
from evaluation.settings import EvaluationSettings
from feedback.privacy import PrivacyFilter
from feedback.store import Store
from registry.arena import Arena
from registry.evaluation_request import Contestant as ContestantChoice
from registry.evaluation_request import EvaluationRequest, JudgeChoice, reward_model_of
from registry.evaluations import Evaluations
from registry.registry import Registry


class CannotEvaluate(ValueError):  # noqa: N818
    """An evaluation can't be carried out, or not any more; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Equipment:
    """What evaluations are carried out with.

    `held_out_share` and `privacy` are those of rounds, and so are `reward_tokens`: how many tokens of a
    prompt and of an answer reward models read. Prompt and answer have at most `max_model_len` tokens.
    `environment` holds endpoints' keys.
    """

    evaluations: Evaluations
    registry: Registry
    store: Store
    data_dir: Path
    settings: EvaluationSettings
    make_sampler: Callable[[Path], Sampler]
    max_model_len: int
    held_out_share: float
    reward_tokens: tuple[int, int]
    privacy: PrivacyFilter | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)


class Participants:
    """The contestants and judges of one request; close them in the end."""

    def __init__(self, request: EvaluationRequest, equipment: Equipment) -> None:
        self._request = request
        self._equipment = equipment
        self._engine = SharedEngine(equipment.make_sampler)
        self._endpoints: list[Endpoint | EndpointJudge] = []

    def close(self) -> None:
        """End the engine, if one runs, and close the connections."""
        self._engine.close()
        for endpoint in self._endpoints:
            endpoint.close()

    def contestants(self) -> list[Contestant]:
        """Make the contestants; raises CannotEvaluate, UnknownVersion."""
        return [self._contestant(choice) for choice in self._request.contestants]

    def check_judges(self) -> None:
        """Raise CannotEvaluate now, rather than after all answers, where a judge is not to be had."""
        for choice in self._request.judges:
            self._key(choice)
            if choice.round is None:
                continue
            if not (self._reward_model(choice) / "head.safetensors").exists():
                raise CannotEvaluate(f"the reward model of round {choice.round} is not kept any more")
            if self._equipment.registry.desired() is None:
                raise CannotEvaluate("no version is in service, and a reward model reads by its tokenizer")

    def judges(self) -> list[Judge]:
        """Make the judges. They may be models, too, so the contestants' engine ends."""
        self._engine.close()
        return [self._judge(choice) for choice in self._request.judges]

    def _contestant(self, choice: ContestantChoice) -> Contestant:
        request = self._request
        sampling = Sampling(request.n, request.max_tokens, request.temperature)
        if choice.version is None:
            return EndpointContestant(choice.name, self._endpoint(choice), sampling)
        version = self._equipment.registry.version(choice.version)
        if version.state == "pruned":
            raise CannotEvaluate(f"the weights of {version.name} were deleted to save disk space")
        try:
            return VersionContestant(
                choice.name,
                version.path,
                self._engine,
                sampling,
                max_model_len=self._equipment.max_model_len,
                examples=FEW_SHOT if choice.few_shot else (),
            )
        except ValueError as problem:
            raise CannotEvaluate(str(problem)) from problem

    def _judge(self, choice: JudgeChoice) -> Judge:
        if choice.kind == "checks":
            return ChecksJudge()
        if choice.kind == "cases":
            return CasesJudge(None if choice.round is None else self._reward_judge(choice))
        if choice.kind == "endpoint":
            return self._endpoint_judge(choice)
        if choice.kind == "people":
            return PeopleJudge(Arena(self._equipment.store.engine), wanted=choice.votes, axis=choice.axis)
        return self._reward_judge(choice)

    def _reward_judge(self, choice: JudgeChoice) -> RewardModelJudge:
        serving = self._equipment.registry.desired()
        assert serving is not None
        prompt_tokens, response_tokens = self._equipment.reward_tokens
        return RewardModelJudge(
            f"reward model of round {choice.round}",
            RewardModel.load(self._reward_model(choice)),
            AutoTokenizer.from_pretrained(str(self._equipment.registry.version(serving.name).path)),
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            agreement=kept(self._reward_model(choice)),
        )

    def _reward_model(self, choice: JudgeChoice) -> Path:
        assert choice.round is not None
        return reward_model_of(self._equipment.data_dir, choice.round)

    def _endpoint_judge(self, choice: JudgeChoice) -> EndpointJudge:
        assert choice.url is not None and choice.model is not None
        judge = EndpointJudge(choice.url, choice.model, axis=choice.axis, api_key=self._key(choice))
        self._endpoints.append(judge)
        return judge

    def _endpoint(self, choice: ContestantChoice) -> Endpoint:
        assert choice.url is not None and choice.model is not None
        endpoint = Endpoint(choice.url, choice.model, self._key(choice))
        self._endpoints.append(endpoint)
        return endpoint

    def _key(self, choice: ContestantChoice | JudgeChoice) -> str | None:
        if choice.key_variable is None:
            return None
        if key := self._equipment.environment.get(choice.key_variable):
            return key
        raise CannotEvaluate(
            f"{choice.key_variable}, with the key for {choice.place}, is not set in the environment of the "
            "process that carries evaluations out"
        )
