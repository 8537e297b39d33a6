"""The `ppo:` section of a run's config."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from data.paths import ConfigPath
from data.sources import SourceConfig
from stages.core.config import Holdout, Section, TrainingSection
from stages.core.reward_config import RewardConfig
from stages.ppo.rollout_config import RolloutConfig


class KlConfig(Section):
    """The penalty for leaving the reference policy."""

    coef: Annotated[float, Field(ge=0)] = Field(
        default=0.05, description="beta; 0.05 as in Huang et al. 2024 (2403.17031)"
    )
    estimator: Literal["k1", "k2", "k3"] = Field(default="k1", description="Schulman, Approximating KL divergence")
    place: Literal["reward", "loss"] = Field(
        default="reward",
        description="reward: part of every token's reward (Ziegler et al. 2019); loss: a term of the loss, as in GRPO, "
        "whose expected gradient is that of KL(policy || reference) with k2 and of KL(reference || policy) with k3",
    )
    target: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="nats per response; makes beta adaptive (Ziegler et al. 2019, sec. 2.2)"
    )
    gain: Annotated[float, Field(gt=0)] = Field(default=0.1, description="K_beta, how fast the adaptive beta moves")

    @model_validator(mode="after")
    def _loss_has_a_gradient(self) -> Self:
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                "estimator=k1 with place=loss trains nothing: the expected gradient of k1 is zero; use k2 or k3"
            )
        return self


class ScoreConfig(Section):
    """What happens to a score before it becomes a reward."""

    normalize: bool = Field(default=False, description="by running mean and standard deviation, saved with the state")
    clip: Annotated[float, Field(gt=0)] | None = Field(default=None, description="scores are clipped to +-clip, last")
    missing_eos_penalty: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="taken off the score of a response that did not end (Huang et al. 2024, detail 4)"
    )


class OverlongConfig(Section):
    """What happens to responses that reach, or nearly reach, `response_length` (Yu et al. 2025, DAPO, 2503.14476)."""

    filter: bool = Field(default=False, description="responses that were cut off train nothing (DAPO, sec. 3.4)")
    buffer: Annotated[int, Field(ge=0)] = Field(
        default=0, description="last tokens over which the penalty grows linearly from 0 (DAPO, eq. 13); 0: no penalty"
    )
    penalty: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="taken off the score at full response_length, where buffer > 0"
    )

    @model_validator(mode="after")
    def _penalty_has_a_buffer(self) -> Self:
        if self.penalty != type(self).model_fields["penalty"].default and self.buffer == 0:
            raise ValueError(f"penalty={self.penalty}: no effect with buffer=0; set buffer to the tokens it grows over")
        return self


class PtxConfig(Section):
    """Language modelling mixed into the update, against forgetting (Ouyang et al. 2022, 2203.02155, eq. 2)."""

    data: Annotated[list[SourceConfig], Field(min_length=1)]
    coef: Annotated[float, Field(gt=0)] = Field(
        default=0.05, description="weight of its mean token loss (OpenRLHF's default; InstructGPT's 27.8 weighs sums)"
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(default=16, description="rows per optimizer step, over all ranks")


# Keys that only a critic, or a discounted sum of rewards, gives a meaning.
_CRITIC_KEYS = (
    *("critic", "value_learning_rate", "value_coef", "value_clip_range", "value_init", "value_fit"),
    *("critic_warmup", "gae_lambda", "bootstrap_truncated"),
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
    samples_per_prompt: Annotated[int, Field(ge=1)] = Field(
        default=1, description="responses to each prompt; they train in one minibatch, as far as it holds them"
    )
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
        default=None,
        description="critic's; default: the policy's, and for a shared critic's head 5x (less above hidden size 256)",
    )
    schedule: Literal["constant", "linear"] = "constant"
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="most of the gradient's norm, policy and critic together; 1 in OpenRLHF and verl; null: no bound, "
        "as in the code of 2403.17031 and TRL 1.12",
    )
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    clip_range: Annotated[float, Field(gt=0)] = Field(
        default=0.2, description="epsilon (Schulman et al. 2017, 1707.06347)"
    )
    clip_range_high: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="epsilon above 1, default clip_range; DAPO's clip-higher is 0.28 (2503.14476, sec. 3.1)",
    )
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        default=None, description="c: bounds the loss at c * |A| where A < 0; 3 in Ye et al. 2020 (1912.09729, eq. 5)"
    )
    entropy_coef: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="weight of the entropy bonus; 0.01 in Schulman et al. 2017, none in InstructGPT"
    )
    early_stop_kl: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="a minibatch whose mean KL(old || new) per token is above it ends the update's epochs; 0.015 in "
        "Spinning Up (Achiam 2018)",
    )
    value_clip_range: Annotated[float, Field(gt=0)] | None = Field(
        default=0.2, description="values move at most this far from the rollout's (2403.17031, detail 11); null: freely"
    )
    value_init: Literal["reward", "fresh"] = Field(
        default="reward",
        description="critics adapter and model start as the reward model where it fits (2203.02155, app. C.4); "
        "fresh: zero head. A shared critic always starts with a zero head",
    )
    value_fit: bool = Field(
        default=True,
        description="before anything trains, the critic's values get the factor and the offset that fit the first "
        "update's returns best; false: as they are, which from 0 favours early ends wherever scores are above 0",
    )
    bootstrap_truncated: bool = Field(
        default=False,
        description="the value after a response that was cut off is the critic's; false: 0, as in InstructGPT",
    )
    value_coef: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="weight of the value loss; default: 0.1 (2403.17031), 0.3 for a shared critic, whose loss is told "
        "in units of the returns' variance",
    )
    critic_warmup: Annotated[int, Field(ge=0)] = Field(
        default=0, description="first updates that train the critic only"
    )
    kl: KlConfig = KlConfig()
    score: ScoreConfig = ScoreConfig()
    overlong: OverlongConfig = OverlongConfig()
    ptx: PtxConfig | None = None
    advantage: Literal["gae", "grpo", "rloo", "reinforce++"] = Field(
        default="gae",
        description="gae learns a critic; grpo (2402.03300) and rloo (2402.14740) compare a prompt's samples, "
        "reinforce++ (2501.03262) normalises returns over the batch",
    )
    eval_every: Annotated[int, Field(ge=1)] = Field(
        default=10, description="updates between evaluations on held-out prompts"
    )
    eval_prompts: Annotated[int, Field(ge=1)] = Field(default=64, description="held-out prompts per evaluation")

    @property
    def rewards(self) -> list[RewardConfig]:
        """The reward sources, one or several."""
        return self.reward if isinstance(self.reward, list) else [self.reward]

    @property
    def has_critic(self) -> bool:
        """Whether values are learned: only GAE uses them."""
        return self.advantage == "gae"

    @property
    def value_weight(self) -> float:
        """The weight of the value loss, by the critic where none is given.

        A shared critic's, in units of the returns' variance (see update.py), explained 0.32 of that variance on random
        walks (tests/walks.py) at 0.1 and 0.38 at 0.3, with scores of 0.90 and 0.89. On words
        (benchmarks/text_reward.py) policies learned as fast as with critic `adapter` at 0.3; at 0.1 and 1 more slowly.
        """
        if self.value_coef is None:
            return 0.3 if self.critic == "shared" else 0.1
        return self.value_coef

    @property
    def minibatches(self) -> int:
        """Optimizer steps that one pass over a rollout batch takes."""
        return self.rollout_batch_size // self.minibatch_size

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

    @model_validator(mode="after")
    def _bootstrapped_responses_train(self) -> Self:
        if self.bootstrap_truncated and self.overlong.filter:
            raise ValueError(
                "bootstrap_truncated=true: no effect with overlong.filter=true, which leaves those responses out; "
                "use one of them"
            )
        return self

    @model_validator(mode="after")
    def _advantage_uses_its_keys(self) -> Self:
        """No key without an effect: those of a critic belong to gae, gamma to whoever discounts."""
        compared = self.advantage in ("grpo", "rloo")
        if compared and self.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt={self.samples_per_prompt}: advantage={self.advantage} compares the samples of a "
                "prompt; use 2 or more"
            )
        idle = () if self.has_critic else (*_CRITIC_KEYS, *(("gamma",) if compared else ()))
        fields = type(self).model_fields
        given = [f"{name}={getattr(self, name)}" for name in idle if getattr(self, name) != fields[name].default]
        if given:
            raise ValueError(
                f"{', '.join(given)}: no effect with advantage={self.advantage}, which has no critic"
                f"{' and no discount' if compared else ''}; take out, or use advantage=gae"
            )
        return self
