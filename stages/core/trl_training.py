"""What the stages on TRL's trainers share: batches of rows, one metrics line a step, checkpoints, a clean stop.

TRL and transformers run the loop (forward, backward, clipping, AdamW, schedule, mixed precision). Around it stand our
data order, token-weighted losses over the whole batch, evaluation on the holdout, and crash-safe state.
"""

import itertools
import json
import math
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import datasets
import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data.chat import ChatEncoder
from data.errors import UserError
from stages.core.best_weights import BestWeights
from stages.core.checkpoints import latest_checkpoint, save_checkpoint
from stages.core.config import SharedConfig
from stages.core.context import Interrupted, StageContext
from stages.core.measure import peak_memory_bytes
from stages.core.passes import tokens_multiple
from stages.core.supervised_config import SupervisedSection
from stages.core.tuning import save_weights

EVALUATIONS = 10  # in a run that does not say how many
NAMED_ROWS = 8  # origins that an error lists
FIGURES = "figures.json"


class LabelledRow(Protocol):
    """A row that says where it came from."""

    @property
    def origin(self) -> str:
        """file:line"""
        ...


RowT = TypeVar("RowT", bound=LabelledRow)


@dataclass(frozen=True)
class Microbatch(Generic[RowT]):
    """The rows of one forward pass; `tokens` are real tokens, `weight` is their share in the batch's loss."""

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
        "per_device_train_batch_size": section.rows_per_pass,
        "gradient_accumulation_steps": section.accumulation,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": round(section.warmup * steps),
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "optim": "adamw_torch",
        "seed": shared.seed,
        "bf16": shared.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
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

    `measure` turns rows into a microbatch.
    """

    context: StageContext[Any]
    encoder: ChatEncoder
    rows: Sequence[RowT]
    holdout: Sequence[RowT]
    measure: Callable[[Sequence[RowT]], Microbatch[RowT]]

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

    def collate(self, examples: Sequence[dict[str, int]]) -> dict[str, Microbatch[RowT]]:
        """One microbatch, as the loop hands it to the loss."""
        return {"microbatch": self.measure([self.rows[example["row"]] for example in examples])}


class StageTrainer(Trainer, ABC):
    """Mixed in before a TRL trainer: rows in, one metrics line a step, our checkpoints.

    A subclass defines `summed_loss`. The loss of a step is the sum over all its rows divided by the sum of their
    weights, so it does not depend on how a batch is cut into microbatches.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the whole batch's weight

    def __init__(self, *, run: SupervisedRun[Any], **options: Any) -> None:
        self.run = run
        self._step_began = 0.0
        self._tokens_before = 0
        self._step_rows: list[LabelledRow] = []
        super().__init__(train_dataset=run.dataset, data_collator=run.collate, callbacks=[SaveAndStop(run)], **options)

    @property
    def multiple(self) -> int:
        """Of how many tokens a packed pass takes a multiple."""
        return tokens_multiple(self.args.device, lowered=self.run.context.shared.dtype == "bfloat16")

    @abstractmethod
    def summed_loss(self, model: nn.Module, rows: Sequence[Any]) -> Tensor:
        """The rows' losses, weighted and summed."""

    @abstractmethod
    def holdout_figures(self, step: int) -> dict[str, float]:
        """The holdout's figures by metric name, `eval/loss` among them; draws no random numbers."""

    def step_figures(self) -> dict[str, float]:
        """More figures of the step just taken, by metric name; asked for once a step."""
        return {}

    def holdout_passes(self) -> Iterator[Sequence[Any]]:
        """The holdout in pieces for one forward pass each."""
        size = self.run.context.config.rows_per_pass
        return (self.run.holdout[start : start + size] for start in range(0, len(self.run.holdout), size))

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The microbatches of one step, and the weight of all their rows."""
        self._step_began = time.perf_counter()
        self._tokens_before = self.state.num_input_tokens_seen
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self._step_rows = [row for batch in batches for row in batch["microbatch"].rows]
        return batches, torch.tensor(float(sum(batch["microbatch"].weight for batch in batches)), device=device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The microbatch's part of the step's loss. Raises UserError, before any update, where it is not finite."""
        microbatch: Microbatch[Any] = inputs["microbatch"]
        loss = self.summed_loss(model, microbatch.rows) / num_items_in_batch
        if not torch.isfinite(loss):
            raise self._not_finite("loss", loss.item(), microbatch.rows)
        self.state.num_input_tokens_seen += microbatch.tokens
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(norm):
            raise self._not_finite("gradient norm", float(norm), self._step_rows)
        return norm

    def _not_finite(self, what: str, value: float, rows: Sequence[LabelledRow]) -> UserError:
        origins = [row.origin for row in rows]
        more = f" and {len(origins) - NAMED_ROWS} more" if len(origins) > NAMED_ROWS else ""
        return UserError(
            f"{self.run.context.stage} step {self.state.global_step + 1}: {what} is {value} on rows "
            f"{', '.join(origins[:NAMED_ROWS])}{more}; no update was made: look at these rows, or lower learning_rate "
            f"({self.args.learning_rate})"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Writes the step's line, with the holdout's figures where they are due; comes before the checkpoint."""
        if "loss" not in logs:
            return  # the loop's summary after the last step
        run, step = self.run, self.state.global_step
        seconds = time.perf_counter() - self._step_began
        tokens = self.state.num_input_tokens_seen
        values = {
            "tokens": float(tokens),
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "seconds": seconds,
            "throughput/tokens_per_s": (tokens - self._tokens_before) / seconds,
            **self.step_figures(),
        }
        if run.holdout and (step % run.eval_every == 0 or step == run.steps):
            self.model.eval()  # each training step turns training mode on again
            with torch.no_grad():
                figures = self.holdout_figures(step)
            values |= figures
            run.best.offer(step, figures, lambda folder: save_weights(self.model, folder))
        values["memory/peak_bytes"] = peak_memory_bytes()
        run.figures |= values
        run.context.metrics.log(step, values)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        context = self.run.context
        save_checkpoint(
            self.run.folder,
            self.state.global_step,
            self._write_state,
            key=context.key,
            keep=context.shared.keep_checkpoints,
        )

    def _write_state(self, folder: Path) -> None:
        save_weights(self.model, folder)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))
        (folder / FIGURES).write_text(json.dumps(self.run.figures), encoding="utf-8")
        self.run.best.store(folder)

    def _prepare_dataset(self, dataset: datasets.Dataset, *unused: object, **unused_too: object) -> datasets.Dataset:
        return dataset  # rows are tokenised before they come here

    def _send_telemetry(self) -> None:
        return

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted."""
        return 0


class SaveAndStop(TrainerCallback):
    """Asks the loop for a checkpoint when one is due, and for the end when the stage is asked to stop."""

    def __init__(self, run: SupervisedRun[Any]) -> None:
        self.run = run

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Decides after each optimizer step."""
        context = self.run.context
        stop = context.should_stop()
        due = state.global_step % context.shared.checkpoint_every == 0 or state.global_step == self.run.steps
        control.should_save = stop or due
        control.should_training_stop |= stop
        return control


def train(trainer: StageTrainer) -> None:
    """Trains to the end, from the newest good checkpoint of the same key where there is one.

    Raises Interrupted where the stage was asked to stop; a checkpoint is written before.
    """
    run = trainer.run
    checkpoint = latest_checkpoint(run.folder, run.context.key)
    run.context.metrics.rewind(checkpoint.step if checkpoint else 0)
    run.context.metrics.start(run.steps, "step")
    run.best.restore(checkpoint.path if checkpoint else None)
    if checkpoint is not None:
        run.context.metrics.say(f"resuming after step {checkpoint.step} of {run.steps}")
        run.figures = json.loads((checkpoint.path / FIGURES).read_text(encoding="utf-8"))
    trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    if trainer.state.global_step < run.steps:
        raise Interrupted(f"{run.context.stage}: stopped after step {trainer.state.global_step} of {run.steps}")
