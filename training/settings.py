"""The settings of a training round; read by the files of this package."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
    keep_versions: int = Field(
        5, ge=1, description="Of how many versions that neither serve nor did before the weights are kept."
    )
    report_to: list[str] = Field(
        default_factory=list,
        description="Trackers that get a round's figures, by Transformers' names (tensorboard, mlflow, …).",
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
    privacy_filter: bool = Field(
        True,
        description="Rounds and exports get placeholders for e-mail and IP addresses and for phone, card and "
        "account numbers.",
    )
    privacy_phone_regions: list[Annotated[str, Field(pattern="^[A-Z]{2}$")]] = Field(
        default=["US"],
        description="Countries (ISO 3166) whose phone numbers are found without a country code, too.",
    )
    sft_minimum: int = Field(
        16, ge=1, description="With fewer demonstrations than this the SFT stage is skipped."
    )
    sft_case_repeats: int = Field(
        16, ge=1, description="In SFT the good answer of a case counts as so many demonstrations."
    )
    sft_epochs: int = Field(3, ge=1, description="Passes over the demonstrations in the SFT stage.")
    sft_learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate of the SFT stage.")
    sft_checkpoints: int = Field(
        4,
        ge=1,
        description="After so many of its epochs SFT keeps a checkpoint; the reward model chooses one.",
    )
    sft_selection_prompts: int = Field(
        32, ge=2, description="Each of SFT's checkpoints is scored on answers to so many training prompts."
    )
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
    algorithm: Literal["ppo", "rloo", "dpo", "kto"] = Field(
        "ppo", description="How the policy learns from the feedback: PPO, or another of TRL's algorithms."
    )
    ppo_prompt_file: str = Field(
        "", description='More prompts for PPO: JSON lines with "prompt" or "messages"; none if empty.'
    )
    ppo_updates: int = Field(8, ge=1, description="PPO updates in a round, each on fresh episodes.")
    ppo_batch: int = Field(32, ge=2, description="Episodes (sampled responses) an update.")
    ppo_samples_per_prompt: int = Field(
        4, ge=1, description="Episodes with the same prompt in an update; divides `ppo_batch`."
    )
    ppo_mini_batches: int = Field(
        2, ge=1, description="Optimiser steps an epoch; divides the number of prompts of an update."
    )
    ppo_epochs: int = Field(2, ge=1, description="Passes over an update's episodes.")
    ppo_learning_rate: float = Field(1e-5, gt=0, description="Learning rate of the policy in PPO.")
    ppo_critic: Literal["reward_model", "policy", "separate"] = Field(
        "reward_model",
        description="The value head's trunk: the reward model's as it is, the policy's, or a copy of the "
        "reward model's that learns.",
    )
    ppo_critic_learning_rate: float = Field(1e-3, gt=0, description="Learning rate of the value head in PPO.")
    ppo_lora_rank: int = Field(
        0, ge=0, description="Rank of the LoRA adapters that PPO trains; 0 trains all weights."
    )
    ppo_kl_coefficient: float = Field(
        0.05,
        ge=0,
        description="The price of a nat of KL from the SFT policy, in standard deviations of reward.",
    )
    ppo_kl_target: float = Field(
        0.0, ge=0, description="Adapt the KL coefficient to this KL in nats a response; 0 keeps it constant."
    )
    ppo_kl_budget: float = Field(
        25.0, gt=0, description="PPO stops at the last update within this KL from SFT, in nats a response."
    )
    ppo_response_tokens: int = Field(64, ge=1, description="The longest response of an episode, in tokens.")
    ppo_minimum_tokens: int = Field(
        0, ge=0, description="A response of fewer tokens pays the penalty of one that does not end."
    )
    ppo_missing_end_penalty: float = Field(
        1.0, ge=0, description="Taken from the score of a response that does not end by itself."
    )
    ppo_temperature: float = Field(1.0, gt=0, description="The sampling temperature of episodes.")
    ppo_ptx_file: str = Field(
        "", description='Pretraining texts to mix in: JSON lines with "text"; none if empty.'
    )
    ppo_ptx_coefficient: float = Field(
        1.0, ge=0, description="Weight of the pretraining texts' loss (mean nats a token) beside PPO's."
    )
    ppo_ptx_batch: int = Field(4, ge=1, description="Pretraining texts an optimiser step.")
    ppo_ptx_tokens: int = Field(128, ge=2, description="Tokens of a pretraining text.")
    ppo_ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="The candidate is the moving average of the weights over the steps; 0 takes the last.",
    )
    ppo_logprob_gap: float = Field(
        0.1,
        ge=0,
        description="How far, in mean nats a token, the rollout engine's logprobs may be from the trainer's.",
    )
    ppo_beyond_gap: Literal["correct", "stop"] = Field(
        "correct",
        description="Beyond that gap: correct by truncated importance weights, or stop the round.",
    )
    ppo_checkpoint_updates: int = Field(
        4, ge=1, description="PPO can be resumed from the last multiple of so many updates."
    )
    ppo_checkpoints: int = Field(
        4,
        ge=0,
        description="Checkpoints over the updates that are judged to publish the best; 0 takes the last.",
    )
    ppo_selection_prompts: int = Field(
        32, ge=2, description="Each of these checkpoints answers so many prompts that the gate does not use."
    )
    rollout_engine: Literal["vllm", "transformers"] = Field(
        "vllm", description="What samples the episodes and the held-out answers."
    )
    preference_epochs: int = Field(
        1, ge=1, description="Passes over the pairs or judged responses in DPO and KTO."
    )
    preference_batch: int = Field(16, ge=2, description="Pairs (DPO) or judged responses (KTO) a step.")
    preference_learning_rate: float = Field(5e-6, gt=0, description="Peak learning rate of DPO and KTO.")
    preference_beta: float = Field(
        0.1, gt=0, description="How dear a distance from the SFT policy is in DPO and KTO (their beta)."
    )
    kv_cache_gib: float = Field(
        1.0, gt=0, description="Memory for the rollout engine's keys and values, in GiB."
    )
    vllm_arguments: dict[str, Any] = Field(
        default_factory=dict, description="More arguments of vLLM's `LLM` for the rollout engine."
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        """Refuse a batch that its parts do not divide; the message names the settings."""
        if self.ppo_batch % (self.ppo_samples_per_prompt * self.ppo_mini_batches):
            raise ValueError(
                f"ppo_batch ({self.ppo_batch}) has to be a multiple of ppo_samples_per_prompt "
                f"({self.ppo_samples_per_prompt}) times ppo_mini_batches ({self.ppo_mini_batches})"
            )
        return self
