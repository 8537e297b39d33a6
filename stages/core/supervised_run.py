"""A run of `sft`, `rm` or `dpo`: its rows in their order, its steps, and what TRL's trainers are told.

Logging, evaluation, saving, batches and ranks are ours; TRL and transformers keep the loop, the schedule and AdamW.
"""

import itertools
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import datasets
import torch
import transformers

from data.chat import ChatEncoder
from stages.core.best_weights import BestWeights
from stages.core.config import SharedConfig
from stages.core.context import StageContext
from stages.core.supervised_config import SupervisedSection

EVALUATIONS = 10  # in a run that does not say how many


class LabelledRow(Protocol):
    """A row that says where it came from."""

    @property
    def origin(self) -> str:
        """file:line"""
        ...


RowT = TypeVar("RowT", bound=LabelledRow)


@dataclass(frozen=True)
class Measured(Generic[RowT]):
    """Rows with what they hold; `tokens` are real tokens, `weight` is their share in a batch's loss."""

    rows: Sequence[RowT]
    tokens: int
    weight: float


def row_order(num_rows: int, *, section: SupervisedSection, seed: int) -> list[int]:
    """The rows in the order they are trained on, all epochs in one list; each epoch has its own shuffle.

    Steps cut it into pieces of `batch_size`, so the position in the data is the step. The last piece may be shorter;
    with `max_steps` there are exactly that many full ones.
    """
    wanted = round(num_rows * section.epochs) if section.max_steps is None else section.max_steps * section.batch_size
    order: list[int] = []
    for epoch in itertools.count():
        if len(order) >= max(wanted, 1):
            return order[: max(wanted, 1)]
        rows = list(range(num_rows))
        random.Random(f"{seed}/rows/{epoch}").shuffle(rows)
        order += rows
    raise AssertionError


def trl_options(section: SupervisedSection, shared: SharedConfig, *, folder: Path, steps: int) -> dict[str, Any]:
    """The arguments that SFTConfig, RewardConfig and DPOConfig take alike.

    AdamW with betas 0.9 and 0.999, epsilon 1e-8 (Loshchilov & Hutter 2019, 1711.05101). Logging, evaluation, saving
    and shuffling are ours, so they are off here.
    """
    schedule = "constant_with_warmup" if section.schedule == "constant" else section.schedule
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": section.batch_size,  # cut into passes, and shared among ranks, by us
        "gradient_accumulation_steps": 1,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": round(section.warmup * steps),
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "optim": "adamw_torch",
        "seed": shared.seed,
        "bf16": shared.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": shared.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def quiet_libraries() -> None:
    """Silences progress bars and remarks of the libraries: what matters goes to the metrics."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


@dataclass
class SupervisedRun(Generic[RowT]):
    """What a trainer needs to know about its stage.

    `measure` weighs rows.
    """

    context: StageContext[Any]
    encoder: ChatEncoder
    rows: Sequence[RowT]
    holdout: Sequence[RowT]
    measure: Callable[[Sequence[RowT]], Measured[RowT]]

    def __post_init__(self) -> None:
        section: SupervisedSection = self.context.config
        self.order = row_order(len(self.rows), section=section, seed=self.context.shared.seed)
        self.steps = math.ceil(len(self.order) / section.batch_size)
        self.eval_every = section.eval_every or math.ceil(self.steps / EVALUATIONS)
        self.folder = self.context.out / "checkpoints"
        self.best = BestWeights(self.folder / "best")
        self.figures: dict[str, float] = {}  # of the newest step and the newest evaluation

    @property
    def dataset(self) -> datasets.Dataset:
        """Row numbers in training order: all that TRL sees of the data."""
        return datasets.Dataset.from_dict({"row": self.order})

    def collate(self, examples: Sequence[dict[str, int]]) -> dict[str, list[RowT]]:
        """The rows of one step, as the loop hands them on."""
        return {"rows": [self.rows[example["row"]] for example in examples]}
