"""The `dpo:` section of a run's config."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from data.paths import ConfigPath
from data.sources import SourceConfig
from stages.core.config import Holdout
from stages.core.supervised_config import LABELLED, SupervisedSection

LossKind = Literal["sigmoid", "ipo", "robust"]


class DpoConfig(SupervisedSection):
    """Direct preference optimisation: a policy from preference pairs, without a reward model."""

    data: Annotated[list[SourceConfig], Field(min_length=1)] = [SourceConfig(path=LABELLED)]
    holdout: Holdout = 0.1
    policy: ConfigPath | None = Field(
        None, description="model to start from, and the reference; default: the sft stage's policy"
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(
        64, description="pairs per optimizer step, over all ranks (Rafailov et al. 2023, app. B)"
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        1e-5, description="for LoRA; a tenth of it for full fine-tuning (Rafailov et al. 2023, app. B)"
    )
    beta: Annotated[float, Field(gt=0)] = Field(
        0.1, description="price of moving away from the reference (Rafailov et al. 2023, arXiv 2305.18290, eq. 7)"
    )
    loss: LossKind = Field(
        "sigmoid",
        description="sigmoid: DPO; ipo: squared distance to a margin of 1/(2 beta) nats a token (Azar et al. 2023, "
        "arXiv 2310.12036); robust: corrected for wrong labels (Chowdhury et al. 2024, arXiv 2403.00409)",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="share of labels taken to be wrong: sigmoid and ipo hedge against them, robust takes them out"
    )

    @model_validator(mode="after")
    def _robust_needs_a_share(self) -> Self:
        if self.loss == "robust" and self.label_smoothing == 0:
            raise ValueError(
                "label_smoothing=0 makes loss robust the same as sigmoid; give the share of labels that are wrong, "
                "as in 0.1, or leave out loss: robust"
            )
        return self
