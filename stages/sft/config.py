"""The `sft:` section of a run's config."""

from typing import Annotated

from pydantic import Field

from data.paths import ConfigPath
from stages.core.supervised_config import SupervisedSection


class SftConfig(SupervisedSection):
    """Supervised fine-tuning on demonstrations; the loss falls on responses only."""

    policy: ConfigPath | None = Field(None, description="model to start from, when not the run's base_model")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-4, description="LoRA wants about 10x full fine-tuning's")
