"""The `eval:` section of a run's config."""

from typing import Annotated

from pydantic import Field

from data.paths import ConfigPath
from data.sources import SourceConfig
from stages.core.config import Section
from stages.core.reward_config import RewardConfig
from stages.core.rollout.config import EngineConfig


class EvalConfig(Section):
    """Policies side by side on prompts none of them was trained on."""

    prompts: Annotated[list[SourceConfig], Field(min_length=1)]
    policies: Annotated[dict[str, ConfigPath], Field(min_length=1)] = Field(
        {"sft": "stage:sft", "ppo": "stage:ppo"},
        description="name -> stage, folder or hub id; the first is the reference. With `dpo:` in the config, the "
        "default is sft, dpo, and ppo where the config has it",
    )
    scores: dict[str, RewardConfig] = Field(
        {"score": RewardConfig(model="rm")},
        description="column -> reward model or function; nothing is trained on them. With `dpo:` and without `rm:` in "
        "the config, the default is none",
    )
    pairs: list[SourceConfig] = Field([], description="preference pairs on which every reward model is checked")
    max_prompts: Annotated[int, Field(ge=1)] = 256
    response_length: Annotated[int, Field(ge=1)] = Field(64, description="most new tokens")
    temperature: Annotated[float, Field(gt=0)] = 1.0
    rollout: EngineConfig = Field(EngineConfig(), description="who samples, as in ppo.rollout")
    kl_budget: Annotated[float, Field(gt=0)] | None = Field(
        None, description="nats per response; the report says which policies stay within it"
    )
