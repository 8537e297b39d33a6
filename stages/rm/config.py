"""The `rm:` section of a run's config."""

from typing import Annotated, Literal

from pydantic import Field

from data.paths import ConfigPath
from data.sources import SourceConfig
from stages.core.config import Holdout, TrainingSection

LABELLED = "stage:label/preferences.jsonl"


class RmConfig(TrainingSection):
    """A Bradley-Terry reward model on preference pairs."""

    data: Annotated[list[SourceConfig], Field(min_length=1)] = [SourceConfig(path=LABELLED)]
    holdout: Holdout = 0.1
    policy: ConfigPath | None = Field(None, description="model to start from; default: the sft stage's policy")
    epochs: Annotated[float, Field(gt=0)] = 1
    max_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="optimizer steps; overrides epochs")
    batch_size: Annotated[int, Field(ge=1)] = Field(32, description="pairs per optimizer step, over all ranks")
    microbatch_size: Annotated[int, Field(ge=1)] = Field(8, description="pairs per forward pass and device")
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    centering: Annotated[float, Field(ge=0)] = Field(
        0.01, description="weight of (score_chosen + score_rejected)^2 (Eisenstein et al. 2023, arXiv 2312.09244)"
    )
    eval_every: Annotated[int, Field(ge=1)] | None = Field(
        None, description="steps between evaluations on the holdout; default: ten in the run"
    )
    publish: Literal["best", "last"] = Field("best", description="which weights the artifact holds, by holdout loss")
