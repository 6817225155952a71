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
    canary_rule: bool = Field(
        True, description="Promote or roll back a canary by its users' votes; false leaves it to operators."
    )
    canary_alpha: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="The chance that a canary no worse is rolled back, and that one worse is promoted, each.",
    )
    canary_margin: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="It is promoted if its share of good votes lies less than this below the stable one's.",
    )
    canary_minimum_votes: int = Field(
        50, ge=1, description="The fewest votes on a canary for its promotion; it is rolled back with fewer."
    )
    canary_hours: float = Field(
        168.0, gt=0, description="A canary on which the votes decide nothing in so many hours is withdrawn."
    )
