"""The `ppo:` section of a run's config."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from data.paths import ConfigPath
from data.sources import SourceConfig
from stages.core.config import Holdout, Section, TrainingSection
from stages.core.reward_config import RewardConfig


class KlConfig(Section):
    """The penalty for leaving the reference policy."""

    coef: Annotated[float, Field(ge=0)] = Field(
        default=0.05, description="beta; 0.05 as in Huang et al. 2024 (2403.17031)"
    )
    estimator: Literal["k1", "k2", "k3"] = Field(default="k1", description="Schulman, Approximating KL divergence")
    target: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="nats per response; makes beta adaptive (Ziegler et al. 2019, sec. 2.2)"
    )
    gain: Annotated[float, Field(gt=0)] = Field(default=0.1, description="K_beta, how fast the adaptive beta moves")


class RolloutConfig(Section):
    """How responses are sampled."""

    engine: Literal["auto", "native"] = "auto"
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="applied alike in every log-probability"
    )


class ScoreConfig(Section):
    """What happens to a score before it becomes a reward."""

    normalize: bool = Field(default=False, description="by running mean and standard deviation, saved with the state")
    clip: Annotated[float, Field(gt=0)] | None = Field(default=None, description="scores are clipped to +-clip, last")
    missing_eos_penalty: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="taken off the score of a response that did not end (Huang et al. 2024, detail 4)"
    )


class PpoConfig(TrainingSection):
    """Proximal policy optimisation of the policy against a reward."""

    prompts: Annotated[list[SourceConfig], Field(min_length=1)]
    holdout: Holdout = Field(default=0.1, description="prompts kept for evaluation only")
    policy: ConfigPath | None = Field(default=None, description="default: the sft stage's policy, else base_model")
    reward: RewardConfig | Annotated[list[RewardConfig], Field(min_length=1)] = RewardConfig(model="rm")
    updates: Annotated[int, Field(ge=1)] = 100
    rollout_batch_size: Annotated[int, Field(ge=1)] = Field(
        default=64, description="responses per update, over all ranks"
    )
    samples_per_prompt: Annotated[int, Field(ge=1)] = 1
    response_length: Annotated[int, Field(ge=1)] = Field(default=64, description="most new tokens")
    rollout: RolloutConfig = RolloutConfig()
    critic: Literal["shared", "adapter", "model"] = "adapter"
    epochs: Annotated[int, Field(ge=1)] = Field(default=4, description="passes over each rollout batch")
    minibatch_size: Annotated[int, Field(ge=1)] = Field(
        default=16, description="responses per optimizer step, over all ranks"
    )
    microbatch_tokens: Annotated[int, Field(ge=1)] = Field(
        default=4096, description="most tokens per forward pass and device"
    )
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    value_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="critic's; default: the policy's, and 25x for the head of a shared critic"
    )
    schedule: Literal["constant", "linear"] = "constant"
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    clip_range: Annotated[float, Field(gt=0)] = Field(
        default=0.2, description="epsilon (Schulman et al. 2017, 1707.06347)"
    )
    value_clip_range: Annotated[float, Field(gt=0)] = 0.2
    value_coef: Annotated[float, Field(ge=0)] = Field(default=0.1, description="weight of the value loss")
    critic_warmup: Annotated[int, Field(ge=0)] = Field(
        default=0, description="first updates that train the critic only"
    )
    kl: KlConfig = KlConfig()
    score: ScoreConfig = ScoreConfig()
    advantage: Literal["gae"] = "gae"
    eval_every: Annotated[int, Field(ge=1)] = Field(
        default=10, description="updates between evaluations on held-out prompts"
    )
    eval_prompts: Annotated[int, Field(ge=1)] = Field(default=64, description="held-out prompts per evaluation")

    @property
    def rewards(self) -> list[RewardConfig]:
        """The reward sources, one or several."""
        return self.reward if isinstance(self.reward, list) else [self.reward]

    @property
    def prompts_per_update(self) -> int:
        """Prompts that one rollout batch takes."""
        return self.rollout_batch_size // self.samples_per_prompt

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        for name, part in [("minibatch_size", self.minibatch_size), ("samples_per_prompt", self.samples_per_prompt)]:
            if self.rollout_batch_size % part:
                raise ValueError(
                    f"{name}={part} does not divide rollout_batch_size={self.rollout_batch_size}; use a divisor of it"
                )
        return self
