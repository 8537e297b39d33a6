"""The `sft:` section of a run's config."""

from typing import Annotated, Literal

from pydantic import Field

from data.paths import ConfigPath
from data.sources import SourceConfig
from stages.core.config import Holdout, TrainingSection


class SftConfig(TrainingSection):
    """Supervised fine-tuning on demonstrations; the loss falls on responses only."""

    data: Annotated[list[SourceConfig], Field(min_length=1)]
    holdout: Holdout = 0.05
    policy: ConfigPath | None = Field(None, description="model to start from, when not the run's base_model")
    epochs: Annotated[float, Field(gt=0)] = 1
    max_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="optimizer steps; overrides epochs")
    batch_size: Annotated[int, Field(ge=1)] = Field(32, description="rows per optimizer step, over all ranks")
    microbatch_size: Annotated[int, Field(ge=1)] = Field(8, description="rows per forward pass and device")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-4, description="LoRA wants about 10x full fine-tuning's")
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.03, description="share of the steps that warm up")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    eval_every: Annotated[int, Field(ge=1)] | None = Field(
        None, description="steps between evaluations on the holdout; default: ten in the run"
    )
    publish: Literal["best", "last"] = Field("best", description="which weights the artifact holds, by holdout loss")
