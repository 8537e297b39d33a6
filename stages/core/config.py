"""The facts that every stage shares, and the base of every config section. Imports no torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from data.paths import ConfigPath
from data.sources import SourceConfig


class Section(BaseModel):
    """A frozen part of the run's config; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Tuning(Section):
    """Which parameters a stage trains."""

    method: Literal["lora", "full"] = Field(
        default="lora", description="lora: adapters on a frozen base; full: every weight"
    )
    rank: Annotated[int, Field(ge=1)] = Field(default=16, description="LoRA rank (Hu et al. 2021, arXiv 2106.09685)")
    alpha: Annotated[float, Field(gt=0)] = Field(default=32, description="LoRA scale is alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="dropout on the LoRA input in sft and rm; PPO and DPO train without"
    )
    targets: list[str] | Literal["all-linear"] = Field(
        default="all-linear", description="module names; all linear layers do best (LoRA Without Regret, 2025)"
    )


class Distributed(Section):
    """How a stage is spread over processes."""

    strategy: Literal["none"] = Field(default="none", description="one plain process")


class SharedConfig(Section):
    """What stands once at the top of a run's YAML."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="run folder runs/<name>")
    base_model: ConfigPath = Field(description="folder, hub id, or stage:toy for the built-in toy model")
    chat_template: ConfigPath | None = Field(
        default=None,
        description="a built-in template's name or a Jinja file; default: the tokenizer's own, else `simple`",
    )
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_length: Annotated[int, Field(ge=8)] = Field(default=512, description="prompt + response, tokens")
    overlong: Literal["drop", "truncate_prompt", "truncate_response"] = Field(
        default="drop", description="rows over max_length: dropped, or cut at the prompt's left or the response's right"
    )
    max_refused: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.01, description="share of malformed rows above which the run stops"
    )
    packing: bool = Field(default=True, description="no padding outside attention; false pads batches the usual way")
    tuning: Tuning = Tuning()
    distributed: Distributed = Distributed()
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    checkpoint_every: Annotated[int, Field(ge=1)] = Field(
        default=50, description="optimizer steps (sft, rm, dpo) or updates (ppo) between checkpoints"
    )
    threads: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="CPU threads; default: all cores. Bit-exact resume needs the same number"
    )


class TrainingSection(Section):
    """What every training stage sets for itself."""

    tuning: Tuning | None = Field(default=None, description="overrides the run's tuning for this stage")


Holdout = Annotated[float, Field(ge=0, lt=1)] | SourceConfig
"""A seeded share of the rows, or rows of their own."""
