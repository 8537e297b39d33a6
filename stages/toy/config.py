"""The `toy:` section of a run's config: the built-in world, so that a first run needs no model and no data."""

from typing import Annotated

from pydantic import Field

from stages.core.config import Section


class ToyConfig(Section):
    """A small Llama pretrained on text of the built-in world, and the rows for the later stages."""

    hidden_size: Annotated[int, Field(ge=8)] = 128
    layers: Annotated[int, Field(ge=1)] = 4
    heads: Annotated[int, Field(ge=1)] = 4
    pretrain_steps: Annotated[int, Field(ge=1)] = Field(600, description="of about a thousand tokens each")
    learning_rate: Annotated[float, Field(gt=0)] = 4e-3
    demonstrations: Annotated[int, Field(ge=1)] = 2000
    preferences: Annotated[int, Field(ge=1)] = 3000
    prompts: Annotated[int, Field(ge=1)] = 1000
    eval_prompts: Annotated[int, Field(ge=1)] = 256
    label_noise: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.1, description="share of the judge's verdicts turned around"
    )
