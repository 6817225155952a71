"""The settings of how a candidate is compared with the version in service; read by training and the gate."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ConditionName = Literal["decided prompts", "win rate", "KL", "cases", "gold against proxy", "tax"]
"""The gate's conditions."""


class EvaluationSettings(BaseModel):
    """Section `[evaluation]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    win_rate_bound: float = Field(
        0.5,
        ge=0,
        le=1,
        description="A candidate is promoted only if its win rate's lower confidence bound reaches this.",
    )
    kl_budget: float = Field(
        25.0,
        gt=0,
        description="How far a candidate may move from the version in service: KL, in nats a response.",
    )
    decided_prompts: int = Field(
        6,
        ge=2,
        description="The fewest held-out prompts that must tell the two versions apart for a promotion.",
    )
    prompts: int = Field(
        64, ge=2, description="How many held-out prompts the candidate and the version in service answer."
    )
    samples_per_prompt: int = Field(
        4, ge=1, le=16, description="How many answers each of the two gives to a held-out prompt."
    )
    max_tokens: int = Field(64, ge=1, description="The longest answer to a held-out prompt, in tokens.")
    temperature: float = Field(
        0.7, ge=0, le=2, description="The sampling temperature of answers to held-out prompts."
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="The confidence level of all intervals.")
    resamples: int = Field(
        2000, ge=200, description="How many bootstrap resamples an interval is computed from."
    )
    tax_tasks: list[str] = Field(
        default_factory=list,
        description="Benchmarks on which candidates may not lose: names of lm-evaluation-harness, or "
        "directories of task definitions; none if empty.",
    )
    tax_limit: int = Field(
        400, ge=0, description="How many items of each benchmark are asked, the first ones; 0 asks all."
    )
    tax_bound: float = Field(
        0.05,
        ge=0,
        le=1,
        description="The gate refuses unless the interval rules out that a benchmark's score fell by more.",
    )
    cases_may_break: int = Field(
        0, ge=0, description="How many cases that pass on the version in service may fail on a candidate."
    )
    case_tokens: int = Field(256, ge=1, description="The longest answer to a case, in tokens.")
    canary_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="The share of end users who get a candidate that passes first, as a canary that their "
        "votes promote or roll back; 0 promotes it at once.",
    )
    report_only: list[ConditionName] = Field(
        default_factory=list,
        description="Conditions of the gate that are reported but refuse no candidate.",
    )
