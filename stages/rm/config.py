"""The `rm:` section of a run's config."""

from typing import Annotated

from pydantic import Field

from data.paths import ConfigPath
from data.sources import SourceConfig
from stages.core.config import Holdout
from stages.core.supervised_config import LABELLED, SupervisedSection


class RmConfig(SupervisedSection):
    """A Bradley-Terry reward model on preference pairs."""

    data: Annotated[list[SourceConfig], Field(min_length=1)] = [SourceConfig(path=LABELLED)]
    holdout: Holdout = 0.1
    policy: ConfigPath | None = Field(None, description="model to start from; default: the sft stage's policy")
    batch_size: Annotated[int, Field(ge=1)] = Field(32, description="pairs per optimizer step, over all ranks")
    centering: Annotated[float, Field(ge=0)] = Field(
        0.01, description="weight of (score_chosen + score_rejected)^2 (Eisenstein et al. 2023, arXiv 2312.09244)"
    )
