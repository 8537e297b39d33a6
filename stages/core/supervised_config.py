"""What `sft:`, `rm:` and `dpo:` share: one pass over labelled rows, evaluated on a holdout. Imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from data.paths import ConfigPath
from data.sources import SourceConfig
from stages.core.config import Holdout, TrainingSection

LABELLED = "stage:label/preferences.jsonl"  # what rm and dpo learn from where the config names nothing else


class SupervisedSection(TrainingSection):
    """Training on labelled rows: data, batches, optimizer, evaluation."""

    data: Annotated[list[SourceConfig], Field(min_length=1)]
    holdout: Holdout = 0.05
    policy: ConfigPath | None = None
    epochs: Annotated[float, Field(gt=0)] = 1
    max_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="optimizer steps; overrides epochs")
    batch_size: Annotated[int, Field(ge=1)] = Field(32, description="rows per optimizer step, over all ranks")
    microbatch_size: Annotated[int, Field(ge=1)] = Field(
        8, description="most rows per forward pass and device; divides batch_size where it is smaller"
    )
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.03, description="share of the steps that warm up")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    eval_every: Annotated[int, Field(ge=1)] | None = Field(
        None, description="steps between evaluations on the holdout; default: ten in the run"
    )
    publish: Literal["best", "last"] = Field("best", description="which weights the artifact holds, by holdout loss")

    @property
    def rows_per_pass(self) -> int:
        """Rows in one forward pass."""
        return min(self.microbatch_size, self.batch_size)

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step."""
        return self.batch_size // self.rows_per_pass

    @model_validator(mode="after")
    def _microbatch_divides(self) -> Self:
        if self.batch_size % self.rows_per_pass:
            divisors = [size for size in range(1, self.batch_size) if self.batch_size % size == 0]
            raise ValueError(
                f"microbatch_size={self.microbatch_size} does not divide batch_size={self.batch_size}; "
                f"use one of {', '.join(map(str, divisors))}"
            )
        return self
