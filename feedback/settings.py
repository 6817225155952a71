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
