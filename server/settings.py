"""How one serving replica listens, what it accepts, and how its engine is started."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Rate = Annotated[str, Field(pattern=r"^(none|[1-9]\d*/(second|minute|hour|day))$")]
"""`600/minute`, or `none` for no limit."""


class ServerSettings(BaseModel):
    """The `[server]` section. It is read without torch or vLLM."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="Address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on")
    url: str | None = Field(
        default=None,
        description="Where other replicas reach this one; unset: http://, the host or its name, the port",
    )
    track: Literal["stable", "trial"] = Field(
        default="stable",
        description="Whether this replica follows the stable version, or during a trial the one on trial",
    )
    max_model_len: int = Field(default=2048, ge=16, description="Longest prompt plus response, in tokens")
    kv_cache_gib: float = Field(
        default=1.0, gt=0, description="Memory for attention keys and values on a CPU, in GiB"
    )
    token_hours: float = Field(
        default=72.0, gt=0, description="How long a feedback token stays valid, in hours"
    )
    recorder_queue: int = Field(
        default=10_000,
        ge=1,
        description="Most finished completions in memory, on their way to Redis",
    )
    spool_mib: float = Field(
        default=256.0, ge=0, description="Disk for completions while Redis is away, of all replicas, in MiB"
    )
    recorder_batch: int = Field(default=200, ge=1, description="Completions sent to Redis at once")
    max_body_bytes: int = Field(
        default=4 * 2**20, ge=1024, description="Largest request body accepted, in bytes"
    )
    batch_lines: int = Field(
        default=1000, ge=1, description="Most events accepted in one POST /v1/feedback/batch"
    )
    rate_per_key: Rate = Field(
        default="6000/minute", description="Most requests of one API key, over all replicas, or none"
    )
    rate_per_rater: Rate = Field(
        default="1200/minute", description="Most events of one rater that a key names or is, or none"
    )
    rate_per_end_user: Rate = Field(
        default="60/minute", description="Most requests of one end user by feedback token, or none"
    )
    swap_retry_seconds: float = Field(
        default=30.0, gt=0, description="Pause before a version that failed to load is tried again"
    )
    cors_origins: list[str] = Field(
        default=[], description="Web origins whose pages may call this server from a browser"
    )
    vllm_arguments: dict[str, Any] = Field(
        default={},
        description="More vLLM engine arguments, named as vLLM names them (tensor_parallel_size = 2)",
    )
