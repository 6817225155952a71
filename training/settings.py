"""The settings of a training round; read by the files of this package."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class TrainingSettings(BaseModel):
    """Section `[training]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every_hours: float = Field(
        6.0, gt=0, description="How often `instructloop up` looks whether a round is due, in hours."
    )
    minimum_events: int = Field(
        64, ge=1, description="A timed round waits until so many new feedback events are stored."
    )
    seed: int = Field(0, ge=0, description="The seed of every random choice in a round.")
    threads: int = Field(0, ge=0, description="Threads for the trainer's own computing; 0 takes all cores.")
    keep_rounds: int = Field(
        2, ge=1, description="Of how many rounds the working files (reward models, checkpoints) are kept."
    )
    held_out_share: float = Field(
        0.3, gt=0, lt=1, description="The share of prompts that only the gate's judge and metrics ever see."
    )
    minimum_judged: int = Field(
        8, ge=2, description="A round needs so many rankings, thumbs and ratings on each side of the split."
    )
    prompt_tokens: int = Field(
        384, ge=8, description="Longer prompts lose their beginning beyond so many tokens, in training."
    )
    response_tokens: int = Field(
        256, ge=8, description="Longer judged responses lose their end beyond so many tokens, in training."
    )
    sft_minimum: int = Field(
        16, ge=1, description="With fewer demonstrations than this the SFT stage is skipped."
    )
    sft_epochs: float = Field(3.0, gt=0, description="Passes over the demonstrations in the SFT stage.")
    sft_learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate of the SFT stage.")
    reward_epochs: int = Field(2, ge=1, description="Passes over the judged prompts to fit a reward model.")
    reward_learning_rate: float = Field(3e-5, gt=0, description="Peak learning rate of a reward model.")
    reward_batch: int = Field(
        8, ge=1, description="Prompts (each with all its responses) a reward-model step."
    )
    reward_backbone: str = Field(
        "",
        description="Directory or Hugging Face name that reward models start from; empty: the SFT policy.",
    )
    reward_heads: int = Field(
        4, ge=1, description="Heads of a reward model, each on a bootstrap of the prompts of its own."
    )
    reward_spread_penalty: float = Field(
        0.5, ge=0, description="PPO's reward is the heads' mean less so many times their standard deviation."
    )
    reward_rater_weights: dict[str, float] = Field(
        default_factory=dict,
        description="How much a rater's judgements count, by rater id; 1 where none is given, 0 leaves out.",
    )
    reward_older_share: float = Field(
        0.25, ge=0, lt=1, description="At most this share of what a reward model is fitted to is older data."
    )
    reward_query_completions: int = Field(
        256, ge=0, description="Recorded completions, judged and not yet judged each, scored for /v1/queries."
    )
    ppo_updates: int = Field(8, ge=1, description="PPO updates in a round, each on fresh episodes.")
    ppo_batch: int = Field(32, ge=2, description="Episodes an update: one sampled response to a prompt each.")
    ppo_mini_batches: int = Field(2, ge=1, description="Optimiser steps an epoch; divides `ppo_batch`.")
    ppo_epochs: int = Field(2, ge=1, description="Passes over an update's episodes.")
    ppo_learning_rate: float = Field(1e-5, gt=0, description="Learning rate of the policy in PPO.")
    ppo_critic_learning_rate: float = Field(1e-3, gt=0, description="Learning rate of the value head in PPO.")
    ppo_kl_coefficient: float = Field(
        0.05,
        ge=0,
        description="The price of a nat of KL from the SFT policy, in standard deviations of reward.",
    )
    ppo_response_tokens: int = Field(64, ge=1, description="The longest response of an episode, in tokens.")
    ppo_temperature: float = Field(1.0, gt=0, description="The sampling temperature of episodes.")
    ppo_missing_end_penalty: float = Field(
        1.0, ge=0, description="Taken from the score of a response that does not end by itself."
    )
    ppo_checkpoint_updates: int = Field(
        4, ge=1, description="PPO can be resumed from the last multiple of so many updates."
    )
    kv_cache_gib: float = Field(
        1.0, gt=0, description="Memory for the rollout engine's keys and values, in GiB."
    )
    vllm_arguments: dict[str, Any] = Field(
        default_factory=dict, description="More arguments of vLLM's `LLM` for the rollout engine."
    )
