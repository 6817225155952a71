"""Settings of the feedback queue and of the store. Reading them from files is the application's affair."""

from pydantic import BaseModel, ConfigDict, Field


class QueueSettings(BaseModel):
    """The Redis stream that carries completions and feedback to the store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = Field(
        None, description="Redis URL; none starts an embedded redis-server in the data dir"
    )
    stream: str = Field("instructloop:feed", min_length=1, description="name of the Redis stream")
    group: str = Field(
        "ingest", min_length=1, description="consumer group that moves the stream to the store"
    )
    batch: int = Field(500, ge=1, le=10_000, description="most entries that are stored in one transaction")
    idempotency_hours: float = Field(
        24.0, gt=0, description="hours for which an Idempotency-Key names the same event"
    )
    timeout_seconds: float = Field(
        5.0, gt=0, description="longest wait for an answer from Redis before feedback is refused with 503"
    )
    durability_check_seconds: float = Field(
        1.0, ge=0, description="age at which the check of Redis' durability settings is repeated"
    )
    wait_replicas: int = Field(
        0, ge=0, description="Redis replicas that must have feedback, besides the disk, before it is accepted"
    )
    claim_after_seconds: float = Field(
        30.0, gt=0, description="silence after which another ingest process takes over a batch"
    )


class StoreSettings(BaseModel):
    """The relational database that remembers completions, feedback, versions and rounds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = Field(None, description="SQLAlchemy database URL; none means SQLite in the data dir")
    waiting_hours: float = Field(
        24.0, gt=0, description="hours that feedback waits for the record of its completion"
    )
    retention_days: float | None = Field(
        None, gt=0, description="days after which completions and their texts are deleted; none keeps them"
    )


class RaterSettings(BaseModel):
    """Section `[raters]`: whose votes count how much in a round, and who is asked what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    defend: bool = Field(
        True, description="Weigh votes by what is known of their raters, and limit raters and keys."
    )
    rater_share: float = Field(
        0.05,
        gt=0,
        le=1,
        description="Most of a round's vote weight that one rater has, or two equal shares if that is more.",
    )
    key_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Most of a round's vote weight that one key has, or two equal shares if that is more.",
    )
    most_set_aside: float = Field(
        0.75,
        ge=0,
        lt=1,
        description="Where these two would take more of a round's weight than this, they are raised.",
    )
    prompt_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Most of a prompt's vote weight that one rater has, or two equal shares if that is more.",
    )
    prompt_votes: float = Field(
        2.0, gt=0, description="The votes of one rater on one prompt weigh at most as so many."
    )
    lone_weight: float = Field(
        0.5, gt=0, le=1, description="What a vote weighs where nobody else judged the same responses."
    )
    newcomer_weight: float = Field(
        0.5, gt=0, le=1, description="What a vote weighs while little is known of its rater."
    )
    newcomer_judgements: float = Field(
        10.0,
        gt=0,
        description="From so many verdicts that others share, a rater's own record outweighs the prior.",
    )
    evidence_events: int = Field(
        20_000, ge=1, description="Raters are assessed on so many of the latest votes."
    )
    automatic_quarantine: bool = Field(
        True, description="Quarantine raters who contradict others or gold questions before a round begins."
    )
    quarantine_judgements: int = Field(
        20, ge=5, description="Contradicting others leads to quarantine from so many shared verdicts on."
    )
    gold_share: float = Field(
        0.1, ge=0, lt=1, description="The share of what a rater is asked that is a gold question."
    )
    trusted: list[str] = Field(
        default_factory=lambda: ["import", "cases"],
        description="Raters or keys, by id, whose votes weigh fully and have no limit.",
    )
    held_out: list[str] = Field(
        default_factory=list,
        description="Raters or keys, by id, whose votes only measure reward models and train none.",
    )
    held_out_share: float = Field(
        0.0, ge=0, lt=1, description="The share of all raters that are held out besides, drawn by their id."
    )
