"""What our own routes answer, as the OpenAPI document has it. vLLM's routes are described by vLLM.

Numbers that are not finite are null in JSON.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from feedback.events import Label
from registry.audit import AuditEntry
from registry.evaluations import Evaluation
from registry.registry import Manifest, Replica, Trial
from registry.rounds import Metric, Round
from registry.states import State

NO_NUL = r"^[^\u0000]*$"
"""The pattern of texts that Postgres can hold."""

Reason = Annotated[str, Field(max_length=1000, pattern=NO_NUL)]


class ProblemDetail(BaseModel):
    """What was wrong: its kind, a sentence for a person, and the field at fault if one is."""

    type: str
    message: str
    param: str | None


class ProblemAnswer(BaseModel):
    """The one shape of a refusal."""

    error: ProblemDetail


class Health(BaseModel):
    """The engine lives."""

    status: Literal["alive"]


class Ready(BaseModel):
    """Whether this replica can generate and take feedback; what is wrong, else `ok`."""

    ready: bool
    version: str
    generation: str
    feedback: str


class ReceiptAnswer(BaseModel):
    """The event is durably queued."""

    event_id: str
    status: Literal["queued"]


class EventAnswer(BaseModel):
    """What became of an event, which rounds and versions learned from it, and which only judged by it."""

    event_id: str
    status: Literal["queued", "stored", "superseded", "rejected"]
    reason: str | None = None
    superseded_by: str | None = None
    rounds: list[int] = []
    versions: list[str] = []
    held_out_rounds: list[int] = []


class PromptAnswer(BaseModel):
    """One prompt of a completion, as the engine saw it."""

    part: int
    prompt: str | None
    prompt_token_ids: list[int]
    latency_seconds: float


class SpanAnswer(BaseModel):
    """Which version made the output tokens `[start, end)`."""

    version: str
    start: int
    end: int


class ChoiceAnswer(BaseModel):
    """One sampled response; logprobs in nats."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float | None]
    finish_reason: str | None
    weight_spans: list[SpanAnswer]


class GivenFeedback(BaseModel):
    """One event on a completion and what became of it."""

    event_id: str
    status: Literal["waiting", "stored", "superseded", "rejected"]
    reason: str | None
    superseded_by: str | None
    rater: str
    received_at: float
    feedback: dict[str, Any]


class CompletionAnswer(BaseModel):
    """The record of a completion with the feedback on it."""

    id: str
    key_id: str
    user: str | None
    source: str
    endpoint: str
    created_at: float
    messages: list[dict[str, Any]] | None
    sampling: dict[str, Any]
    prompts: list[PromptAnswer]
    choices: list[ChoiceAnswer]
    versions: list[str]
    feedback: list[GivenFeedback]


class QueryChoice(BaseModel):
    """A response to judge; `spread` is how far the reward model's heads disagree on it."""

    choice: int
    text: str
    spread: float | None


class QueryAnswer(BaseModel):
    """A recorded prompt to judge next."""

    completion_id: str
    part: int
    messages: list[dict[str, Any]] | None
    prompt: str | None
    round: int
    spread: float | None
    choices: list[QueryChoice]


class Queries(BaseModel):
    """What to judge next, the least sure first."""

    queries: list[QueryAnswer]


class CaseResultAnswer(BaseModel):
    """What the version in service answered to a case, and what a round's candidate did."""

    round_id: int
    at: float
    version: str
    incumbent: str
    before: str
    before_passed: bool
    after: str
    after_passed: bool
    change: Literal["fixed", "broke", "still failing", "still passing"]


class CaseUse(BaseModel):
    """What a round did with an event of a case."""

    round: int
    use: str
    reason: str | None


class TaughtAnswer(BaseModel):
    """One event that was made of a case, and what learned from it."""

    event_id: str
    status: Literal["queued", "waiting", "stored", "superseded", "rejected"]
    rounds: list[CaseUse]
    versions: list[str]


class CaseAnswer(BaseModel):
    """A case; in a list with its last result only. `origins` are the names of what it was made from."""

    id: str
    title: str
    messages: list[dict[str, str]]
    checks: list[dict[str, Any]]
    good: str | None
    bad: str | None
    trainings: int
    added_by: str
    added_at: float
    removed_by: str | None
    removed_at: float | None
    origins: dict[str, list[str]]
    results: list[CaseResultAnswer]
    taught: list[TaughtAnswer]


class CaseList(BaseModel):
    """Cases, oldest first."""

    cases: list[CaseAnswer]


class CaseRemoved(BaseModel):
    """The case is tried on no candidate any more; what learned from it stays so."""

    removed: str
    taught: list[TaughtAnswer]


class VersionSummary(BaseModel):
    """One version in a list."""

    name: str
    state: State
    kind: str
    parent: str | None
    round: int | None
    created_at: float
    metrics: dict[str, Any]
    verdict: dict[str, Any] | None


class Versions(BaseModel):
    """All versions, oldest first, and the one that should serve."""

    desired: str | None
    versions: list[VersionSummary]


class VersionAnswer(BaseModel):
    """One version with its whole manifest."""

    name: str
    state: State
    manifest: Manifest


class Moved(BaseModel):
    """A move that was recorded; with `wait`, what the replicas serve since."""

    action: Literal["promoted", "rejected", "rolled_back", "canary", "shadow", "withdrawn"]
    version: str
    replicas: list[Replica] | None = None


class Replicas(BaseModel):
    """What each replica last said of itself."""

    replicas: list[Replica]


class RoundList(BaseModel):
    """Rounds, newest first."""

    rounds: list[Round]


class RoundRequest(BaseModel):
    """The round that was asked for, now or before."""

    id: int
    state: Literal["requested"]


class RoundDetail(BaseModel):
    """One round with its stages and figures: all fields of a round in a list, and these."""

    id: int
    state: Literal["requested", "running", "done", "failed"]
    stage: str | None
    cursor: int | None
    cutoff: int | None
    config: dict[str, Any]
    config_hash: str | None
    seed: int | None
    version: str | None
    verdict: dict[str, Any] | None
    error: str | None
    requested_by: str | None
    requested_at: float | None
    started_at: float | None
    ended_at: float | None
    pinned: bool
    repeat_of: int | None
    stages: dict[str, str]
    seconds: dict[str, float | None]
    results: dict[str, Any]
    metrics: list[Metric]


class EvaluationList(BaseModel):
    """Evaluations, newest first."""

    evaluations: list[Evaluation]


class EvaluationRequested(BaseModel):
    """The evaluation that was asked for."""

    id: int
    state: Literal["requested"]


class EvaluationCancelled(BaseModel):
    """The evaluation that was cancelled; one that ran stops at its next step."""

    id: int
    state: Literal["cancelled"]


class Audit(BaseModel):
    """What operators did or were refused, newest first."""

    entries: list[AuditEntry]


class TrialDecision(BaseModel):
    """What the rule does with the trial now, why, and the votes and the evidence behind it."""

    move: Literal["keep", "promote", "rollback"]
    reason: str
    figures: dict[str, Any]


class TrialAnswer(BaseModel):
    """The version on trial beside the one that serves, if any; without `rule`, nothing acts by itself."""

    stable: str | None
    trial: Trial | None
    rule: bool
    decision: TrialDecision | None


class Try(BaseModel):
    """The body that puts a version on trial: the share of end users (canary) or of requests (shadow)."""

    share: float = Field(gt=0, le=1)
    reason: Reason = Field(default="", description="Written to the log")


class Move(BaseModel):
    """The body of a move, which may be left out."""

    reason: Reason = Field(default="", description="Written to the log")


class ArenaPair(BaseModel):
    """Two answers to the last of the messages, blind, to be compared by `axis`."""

    id: str
    axis: str
    messages: list[dict[str, str]]
    first: str
    second: str


class ArenaAnswer(BaseModel):
    """The pair to vote on next; null when there is none for this rater."""

    pair: ArenaPair | None


class ArenaVote(BaseModel):
    """Which answer is better, in the order they were handed out, and InstructGPT's labels of each."""

    model_config = ConfigDict(extra="forbid")

    vote: Literal["first", "second", "tie"]
    first_labels: list[Label] = Field(default=[], max_length=20)
    second_labels: list[Label] = Field(default=[], max_length=20)


class ArenaVoted(BaseModel):
    """The vote was stored."""

    pair_id: str
    vote: Literal["first", "second", "tie"]
