"""The settings of how versions roll out to replicas; read by the server and the command line, not here."""

from pydantic import BaseModel, ConfigDict, Field


class RolloutSettings(BaseModel):
    """Section `[rollout]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    watch_seconds: float = Field(
        1.0, gt=0, le=60, description="How often a replica looks at the registry for the version to serve."
    )
    max_unavailable: int = Field(
        1,
        ge=1,
        description="Most replicas of a track that swap at the same time; others wait their turn.",
    )
    shadow_copies: int = Field(
        16,
        ge=1,
        description="Most copies of requests that one replica has under way to a shadow; more are dropped.",
    )
    trial_replica: bool = Field(
        True, description="Whether `up` starts a second replica while a version is on trial."
    )
    wait_seconds: float = Field(
        120.0,
        gt=0,
        le=3600,
        description="How long `?wait=true` waits at most until the replicas serve a promoted version.",
    )
