"""The facts that every stage shares, and the base of every config section. Imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
    """How a stage is spread over processes. Nothing here changes a result."""

    strategy: Literal["none", "ddp", "zero1", "zero2", "zero3"] = Field(
        default="none",
        description="none: nothing is divided, and several ranks are ddp; ddp: each rank holds everything; zero1, 2, 3 "
        "(DeepSpeed): ranks share optimizer state, gradients too, parameters too (Rajbhandari et al. 2020, 1910.02054)",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        default="none",
        description="what waits in CPU memory: optimizer state (zero1, 2, 3), and with zero3 parameters too",
    )
    deepspeed: ConfigPath | None = Field(
        default=None, description="a DeepSpeed JSON of your own, in place of the one that `launch plan` shows"
    )

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed holds the trained parameters."""
        return self.strategy.startswith("zero")

    @model_validator(mode="after")
    def _strategy_uses_its_keys(self) -> Self:
        if self.offload != "none" and not self.is_zero:
            raise ValueError(
                f"offload={self.offload}: no effect with strategy={self.strategy}; use strategy=zero1, zero2 or zero3"
            )
        if self.offload == "parameters" and self.strategy != "zero3":
            raise ValueError(f"offload=parameters: needs strategy=zero3, not {self.strategy}; or use offload=optimizer")
        if self.deepspeed is not None and not self.is_zero:
            raise ValueError(
                f"deepspeed={self.deepspeed}: no effect with strategy={self.strategy}; use zero1, zero2 or zero3"
            )
        return self


class SharedConfig(Section):
    """What stands once at the top of a run's YAML."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="run folder runs/<name>")
    base_model: ConfigPath = Field(description="folder, hub id, or stage:toy for the built-in toy model")
    chat_template: ConfigPath | None = Field(
        default=None,
        description="a built-in template's name or a Jinja file; default: the tokenizer's own, else `simple`",
    )
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of products and frozen weights; what trains is float32. On a CPU see `launch doctor`",
    )
    max_length: Annotated[int, Field(ge=8)] = Field(default=512, description="prompt + response, tokens")
    overlong: Literal["drop", "truncate_prompt", "truncate_response"] = Field(
        default="drop", description="rows over max_length: dropped, or cut at the prompt's left or the response's right"
    )
    max_refused: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.01, description="share of malformed rows above which the run stops"
    )
    packing: bool = Field(default=True, description="no padding outside attention; false pads batches the usual way")
    tuning: Tuning = Tuning()
    gradient_checkpointing: bool = Field(
        default=False, description="keeps no activations of a block and computes them anew in the backward pass"
    )
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
