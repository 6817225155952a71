"""What an evaluation is asked for: who answers, which prompts, who judges, with every field checked.

Owns the request's form and what has to be there for it; carrying it out is `evaluation.run`'s.
"""

import re
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from registry.registry import Registry, UnknownVersion

Axis = Literal["overall", "helpful", "honest", "harmless", "attempts", "constraints", "truthful"]
JudgeKind = Literal["reward-model", "checks", "cases", "endpoint", "people"]

HELD_OUT = "held-out"
"""In the place of a prompt file: the store's prompts that no round trains on."""
CASES = "cases"
"""In the place of a prompt file: the prompts of the operators' cases."""
FEW_SHOT = "+few-shot"
LABELS = "+labels"


class UnsuitableRequest(ValueError):  # noqa: N818
    """A request that can't be carried out here: `field` is the one at fault, `problem` says why."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class _Asked(BaseModel):
    """A model at an OpenAI-compatible endpoint, or none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = Field(
        None,
        max_length=500,  # Keys come from the environment: what stands here is kept and shown.
        pattern=r"^https?://[^\s#@?]+$",
        description="An endpoint's base URL, with /v1",
    )
    model: str | None = Field(None, min_length=1, max_length=200, description="The model's name there")
    key_variable: str | None = Field(
        None,
        max_length=100,
        # No other variable than an API key's is to be sent anywhere.
        pattern=r"^[A-Z][A-Z0-9_]*API_KEY$",
        description="The environment variable with its API key, which has to end in API_KEY",
    )

    @model_validator(mode="after")
    def _is_whole(self) -> "_Asked":
        if (self.url is None) != (self.model is None):
            raise ValueError("an endpoint takes a url and a model")
        if self.key_variable is not None and self.url is None:
            raise ValueError("key_variable is for an endpoint's key")
        return self

    @property
    def place(self) -> str:
        """The model and where it is, in words."""
        return f"{self.model} at {urlsplit(self.url or '').netloc}"


class Contestant(_Asked):
    """Who answers: a `version` (with `few_shot`, after a few examples), or a model at an endpoint.

    As text: `policy-0003`, `policy-0000+few-shot`, or `URL#MODEL` and, with a key, `URL#MODEL#VARIABLE`.
    `base` is the first version, `serving` the one in service.
    """

    version: str | None = Field(None, min_length=1, max_length=100, description="A version of the policy")
    few_shot: bool = Field(default=False, description="Let the version see a few examples before each prompt")

    @model_validator(mode="after")
    def _is_one(self) -> "Contestant":
        if (self.version is None) == (self.url is None):
            raise ValueError("either a version or an endpoint (url and model) is needed")
        if self.few_shot and self.version is None:
            raise ValueError("few_shot is for versions")
        return self

    @property
    def name(self) -> str:
        """What it is called in results."""
        if self.version is None:
            return self.place
        return f"{self.version}{FEW_SHOT if self.few_shot else ''}"


class JudgeChoice(_Asked):
    """Who judges: `kind` and what it takes.

    `reward-model` is that of a `round`'s held-out side, on which no policy was trained. `checks` are the
    prompts' own. `cases`, for the prompts of cases, tells who passes them, by a `round`'s reward model where
    they have no checks. `endpoint` is a language model, asked by one `axis`, and `people` are those in the
    arena, by the majority of so many `votes`. As text: `reward-model`, `checks`, `cases`, `URL#MODEL` or
    `URL#MODEL#VARIABLE`, `people`; a round or votes follow as in `people:3`, and an axis stands before the
    last two as in `helpful=URL#MODEL`, with `helpful+labels=URL#MODEL` for `labels`.
    """

    kind: JudgeKind
    round: int | None = Field(None, ge=1, lt=2**31, description="Whose reward model; unset: the last one's")
    axis: Axis = Field("overall", description="By what an endpoint or people judge")
    votes: int = Field(1, ge=1, le=100, description="How many people are asked about a pair")
    labels: bool = Field(
        default=False,
        description="Also ask an endpoint which of InstructGPT's labels hold of each answer, one by one",
    )

    @model_validator(mode="after")
    def _fits(self) -> "JudgeChoice":
        if (self.kind == "endpoint") != (self.url is not None):
            raise ValueError("url and model are for the kind endpoint, and it needs them")
        if self.round is not None and self.kind not in ("reward-model", "cases"):
            raise ValueError("round is for the kinds reward-model and cases")
        if self.axis != "overall" and self.kind not in ("endpoint", "people"):
            raise ValueError("axis is for the kinds endpoint and people")
        if self.labels and self.kind != "endpoint":
            raise ValueError("labels is for the kind endpoint: people give them with their votes")
        if self.votes != 1 and self.kind != "people":
            raise ValueError("votes is for the kind people")
        return self


def _endpoint(text: str) -> dict[str, Any]:
    url, *rest = text.split("#")
    if not 1 <= len(rest) <= 2:
        raise ValueError(f"{text!r}: an endpoint is URL#MODEL, or with a key URL#MODEL#VARIABLE")
    return {"url": url, **dict(zip(("model", "key_variable"), rest, strict=False))}


def _contestant(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if "://" in value:
        return _endpoint(value)
    return {"version": value.removesuffix(FEW_SHOT), "few_shot": value.endswith(FEW_SHOT)}


def _judge(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if "://" in value:
        axis, separator, endpoint = value.partition("=")
        if "://" in axis or not separator:
            axis, endpoint = "overall", value
        labels = axis.endswith(LABELS)
        return {
            "kind": "endpoint",
            "axis": axis.removesuffix(LABELS),
            **({"labels": True} if labels else {}),
            **_endpoint(endpoint),
        }
    name, colon, number = value.partition(":")
    axis, _, kind = name.rpartition("=")
    if kind == "people":
        return {"kind": kind, **({"axis": axis} if axis else {}), **({"votes": number} if colon else {})}
    if name not in ("reward-model", "checks", "cases"):
        raise ValueError(
            f"{value!r} is none of reward-model, reward-model:ROUND, checks, cases, URL#MODEL, people, "
            "people:VOTES"
        )
    return {"kind": name, **({"round": number} if colon else {})}


class EvaluationRequest(BaseModel):
    """What is to be compared, on which prompts, by whom."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contestants: list[Annotated[Contestant, BeforeValidator(_contestant)]] = Field(
        min_length=2, max_length=16, description="Who answers; each pair of them is judged"
    )
    prompts: str = Field(
        HELD_OUT,
        min_length=1,
        max_length=1000,
        pattern=r"^[^\x00-\x1f]*$",
        description=f"A JSON-lines file of prompts, `{HELD_OUT}`: those of the store, or `{CASES}`",
    )
    judges: list[Annotated[JudgeChoice, BeforeValidator(_judge)]] = Field(
        [],
        max_length=16,
        description="Who judges; unset: the prompts' checks, for cases also who passes them, and the last "
        "round's reward model if it is kept",
    )
    n: int = Field(1, ge=1, le=16, description="How many answers each contestant gives to a prompt")
    max_tokens: int = Field(256, ge=1, le=100_000, description="The longest answer, in tokens")
    temperature: float = Field(0.7, ge=0, le=2, description="The sampling temperature of answers")
    seed: int = Field(0, ge=0, lt=2**31, description="Of sampling and of the intervals' bootstrap")
    limit: int = Field(200, ge=1, le=100_000, description="How many prompts are asked at most")

    @model_validator(mode="after")
    def _tells_them_apart(self) -> "EvaluationRequest":
        names = [contestant.name for contestant in self.contestants]
        if doubles := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"contestants: {min(doubles)} is there twice")
        if doubled := [judge for judge in self.judges if self.judges.count(judge) > 1]:
            raise ValueError(f"judges: {doubled[0].kind} is there twice")
        return self

    @property
    def by_people(self) -> bool:
        """Whether people in the arena are among the judges."""
        return any(judge.kind == "people" for judge in self.judges)

    @property
    def files(self) -> bool:
        """Whether the prompts are in a file rather than the store."""
        return self.prompts not in (HELD_OUT, CASES)


def reward_model_of(data_dir: Path, round_id: int) -> Path:
    """Return where the reward model of a round's held-out side is, if it is kept."""
    return data_dir / "rounds" / f"{round_id:04d}" / "judge"


def resolve(
    request: EvaluationRequest, registry: Registry, data_dir: Path, *, cases: Callable[[], Sized]
) -> EvaluationRequest:
    """Return the request with every choice made that was left open, once all that it names is there.

    `cases` returns the cases that there are. Raises UnsuitableRequest naming the field.
    """
    contestants = [_known(one, i, registry) for i, one in enumerate(request.contestants)]
    kept = _kept_rounds(data_dir)
    chosen = request.judges or [
        JudgeChoice(kind="checks"),
        *([JudgeChoice(kind="cases")] if request.prompts == CASES else []),
        *([JudgeChoice(kind="reward-model")] if kept else []),
    ]
    judges = [_kept(one, i, kept) for i, one in enumerate(chosen)]
    if request.prompts != CASES and any(judge.kind == "cases" for judge in judges):
        raise UnsuitableRequest("judges", f"cases judges answers to the prompts `{CASES}` and no others")
    if request.prompts == CASES and (count := len(cases())) < 2:
        raise UnsuitableRequest(
            "prompts", f"at least two cases are needed, and there are {count} (`instructloop cases`)"
        )
    if request.files and not Path(request.prompts).is_file():
        raise UnsuitableRequest("prompts", f"there is no file {request.prompts}")
    try:
        # Again through the model: what was told apart by `base` and a name may be one version.
        return EvaluationRequest(
            **request.model_dump(exclude={"contestants", "judges"}), contestants=contestants, judges=judges
        )
    except ValueError:
        raise UnsuitableRequest("contestants", "one is there twice, by another name") from None


def _known(contestant: Contestant, index: int, registry: Registry) -> Contestant:
    field = f"contestants.{index}"
    if contestant.version is None:
        return contestant
    name = contestant.version
    if name == "base":
        name = next(iter(registry.states()), name)
    elif name == "serving" and (desired := registry.desired()) is not None:
        name = desired.name
    try:
        version = registry.version(name)
    except UnknownVersion as problem:
        raise UnsuitableRequest(field, str(problem)) from None
    if version.state == "pruned":
        raise UnsuitableRequest(field, f"the weights of {name} were deleted to save disk space")
    return contestant.model_copy(update={"version": name})


def _kept_rounds(data_dir: Path) -> list[int]:
    """Return the rounds whose held-out side's reward model is kept, oldest first."""
    found = (path.parent.parent.name for path in (data_dir / "rounds").glob("*/judge/head.safetensors"))
    return sorted(int(name) for name in found if re.fullmatch(r"[0-9]+", name))


def _kept(judge: JudgeChoice, index: int, kept: list[int]) -> JudgeChoice:
    field = f"judges.{index}"
    if judge.kind not in ("reward-model", "cases"):
        return judge
    if judge.kind == "cases" and judge.round is None and not kept:
        return judge  # Cases with checks need no reward model, and the others get no verdict.
    if not kept:
        raise UnsuitableRequest(field, "no round has left a reward model yet")
    if judge.round is not None and judge.round not in kept:
        of = ", ".join(map(str, kept))
        raise UnsuitableRequest(field, f"the reward model of round {judge.round} is not kept; there is {of}")
    return judge.model_copy(update={"round": judge.round or kept[-1]})
