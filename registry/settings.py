"""The settings of how versions roll out to replicas; read by the server and the command line, not here."""

from pydantic import BaseModel, ConfigDict, Field


class RolloutSettings(BaseModel):
    """Section `[rollout]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    watch_seconds: float = Field(
        1.0, gt=0, le=60, description="How often a replica looks at the registry for the version to serve."
    )
    wait_seconds: float = Field(
        120.0,
        gt=0,
        le=3600,
        description="How long `?wait=true` waits at most until the replicas serve a promoted version.",
    )
