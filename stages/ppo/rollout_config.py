"""`ppo.rollout:`: who samples, at which temperature, and how far the sampler may be from the trainer."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from stages.core.rollout.config import EngineConfig


class RolloutConfig(EngineConfig):
    """How responses are sampled. `top_p` and `top_k` are keys only to be refused with a reason."""

    external_keys: ClassVar[tuple[str, ...]] = ("staleness", "max_sampler_kl", "importance_cap")

    temperature: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="applied alike in every log-probability"
    )
    staleness: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="updates that the policy may be ahead of the version that sampled: from 1 on the next rollouts are "
        "sampled while the update runs; 1 is one-step off-policy (Noukhovitch et al. 2025, 2410.18252)",
    )
    importance_cap: Annotated[float, Field(ge=1)] | None = Field(
        default=2.0,
        description="C of truncated importance sampling between trainer and sampler (Yao et al. 2025, Your efficient "
        "RL framework secretly brings you off-policy RL training; IMPALA, 1802.01561, has 1); null: no correction",
    )
    max_sampler_kl: Annotated[float, Field(gt=0)] = Field(
        default=0.01,
        description="KL(sampler || trainer) in nats per token above which the run stops; the same weights are within "
        "1e-3 of each other in bfloat16 and far closer in float32",
    )
    top_p: float = Field(default=1.0, description="only 1: PPO needs the log-probabilities of what was sampled from")
    top_k: int = Field(default=0, description="only 0 (all tokens), for the same reason")

    @field_validator("top_p", "top_k")
    @classmethod
    def _whole_distribution(cls, value: float, info: ValidationInfo) -> float:
        whole = cls.model_fields[str(info.field_name)].default
        if value != whole:
            raise ValueError(
                "PPO's ratios need the log-probabilities of what was sampled from, and a cut distribution has others; "
                f"use {whole:g}, and temperature for less spread"
            )
        return value

    @model_validator(mode="after")
    def _asleep_or_ahead(self) -> Self:
        if self.sleep and self.staleness:
            raise ValueError(
                f"sleep=true: no effect with staleness={self.staleness}, where the server samples while the policy is "
                "trained; use one of them"
            )
        return self
