"""What the stages on TRL's trainers share: batches of rows, one metrics line a step, checkpoints, a clean stop.

TRL and transformers run the loop and the schedule. Inside it stand our data order, token-weighted losses over the whole
batch, and the engine that sums gradients over ranks; around it evaluation on the holdout and crash-safe state.
"""

import hashlib
import itertools
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data.errors import UserError
from stages.core import ranks
from stages.core.checkpoints import latest_checkpoint, save_checkpoint
from stages.core.context import Interrupted
from stages.core.engine import Engine, Training, passes
from stages.core.engines import open_engine
from stages.core.measure import peak_memory_bytes
from stages.core.passes import tokens_multiple
from stages.core.supervised_run import LabelledRow, SupervisedRun
from stages.core.tuning import inner_model, save_weights

NAMED_ROWS = 8  # origins that an error lists
FIGURES, MOMENTS_FILE, SCHEDULER_FILE = "figures.json", "moments.safetensors", "scheduler.pt"


class StageTrainer(Trainer, ABC):
    """Mixed in before a TRL trainer: rows in, one metrics line a step, our checkpoints.

    A subclass defines `summed_loss`. The loss of a step is the sum over all its rows divided by the sum of their
    weights, so it does not depend on how a batch is cut into microbatches.
    """

    def __init__(self, *, run: SupervisedRun[Any], **options: Any) -> None:
        self.run = run
        self._step_began = 0.0
        self._tokens_before = 0
        self._step_rows: Sequence[LabelledRow] = []
        self.engine: Engine
        self.is_spare_pass = False  # made because other ranks make one: it counts nothing
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

    def holdout_passes(self) -> Sequence[Sequence[Any]]:
        """This rank's part of the holdout, in pieces for one forward pass each."""
        size = self.run.context.config.rows_per_pass
        return ranks.share([self.run.holdout[start : start + size] for start in range(0, len(self.run.holdout), size)])

    def get_train_dataloader(self) -> DataLoader:
        """One item a step: all its rows, on every rank alike."""
        return DataLoader(
            self.train_dataset, batch_size=self.run.context.config.batch_size, collate_fn=self.run.collate
        )

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        """Puts our engine where the loop would wrap the model for accelerate: it sums gradients over ranks."""
        self.create_optimizer()
        # DeepSpeed takes empty groups out, and the schedule counts groups.
        self.optimizer.param_groups = [group for group in self.optimizer.param_groups if group["params"]]
        training = Training(
            modules=[self.model, *self.frozen_modules()],
            parameters={name: each for name, each in self.model.named_parameters() if each.requires_grad},
            optimizer=self.optimizer,
            max_grad_norm=self.args.max_grad_norm,
            read_directly=list(head.parameters()) if (head := inner_model(self.model).get_output_embeddings()) else [],
        )
        self.engine = open_engine(training, self.run.context.shared.distributed)
        self.create_scheduler(num_training_steps=max_steps)
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            self.engine.load_moments(load_file(folder / MOMENTS_FILE))
            self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_FILE, weights_only=True))
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
        self.optimizer = Stepped(self.optimizer)
        self.model_wrapped = self.model
        for name in ("model", "optimizer", "lr_scheduler", "train_dataloader"):
            setattr(self.callback_handler, name, getattr(self, name, train_dataloader))
        return self.model, train_dataloader

    def frozen_modules(self) -> list[nn.Module]:
        """Modules beside the model that its passes run."""
        return []

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """The rows of one step."""
        self._step_began = time.perf_counter()
        self._tokens_before = self.state.num_input_tokens_seen
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The step's loss, over all its rows; leaves the gradients in the engine. Each rank takes its part of the rows.

        Dropout depends on the step and the rank alone. Raises UserError, before any update, where a loss is not finite.
        """
        rows: Sequence[Any] = inputs["rows"]
        run, size = self.run, self.run.context.config.rows_per_pass
        whole, own = run.measure(rows), ranks.share(rows)
        groups = [own[start : start + size] for start in range(0, len(own), size)]
        model.train()
        torch.manual_seed(_dropout_seed(run.context.shared.seed, self.state.global_step))
        self.engine.discard()
        losses: list[float] = []
        problems: list[str] = []
        for group, counts in passes(self.engine, groups, [min(rows, key=lambda row: run.measure([row]).tokens)]):
            self.is_spare_pass = not counts
            loss = float(self.engine.backward(lambda group=group: self._part(model, group, whole.weight)))
            if not math.isfinite(loss):
                problems += self._not_finite("loss", loss, group).problems
            losses.append(loss)
        ranks.check_together(problems)
        self._step_rows = rows
        self.state.num_input_tokens_seen += whole.tokens
        return torch.tensor(sum(ranks.gather_lists(losses)), device=self.args.device)

    def _part(self, model: nn.Module, rows: Sequence[Any], weight: float) -> Tensor:
        """The rows' part of the step's loss; nothing in a pass that only other ranks need."""
        loss = self.summed_loss(model, rows)
        return loss * 0.0 if self.is_spare_pass else loss / weight

    def _clip_grad_norm(self, model: nn.Module) -> float:
        """The gradient's norm before clipping: the step is made here, on all ranks together."""
        norm = self.engine.step()
        if not math.isfinite(norm):
            raise self._not_finite("gradient norm", norm, self._step_rows)
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
            with self.engine.gathered():
                with torch.no_grad():
                    figures = self.holdout_figures(step)
                if ranks.current().is_main:
                    run.best.offer(step, figures, lambda folder: save_weights(self.model, folder))
            values |= figures
        values["memory/peak_bytes"] = peak_memory_bytes()
        run.figures |= values
        run.context.metrics.log(step, values)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Rank 0 writes it; the same files whatever the number of ranks and the strategy."""
        context = self.run.context
        moments = self.engine.moments()
        with self.engine.gathered():
            if ranks.current().is_main:
                save_checkpoint(
                    self.run.folder,
                    self.state.global_step,
                    lambda folder: self._write_state(folder, moments),
                    key=context.key,
                    keep=context.shared.keep_checkpoints,
                )

    def _write_state(self, folder: Path, moments: Mapping[str, Tensor]) -> None:
        save_weights(self.model, folder)
        save_file(dict(moments), folder / MOMENTS_FILE)
        torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_FILE)
        self.state.save_to_json(str(folder / "trainer_state.json"))
        (folder / FIGURES).write_text(json.dumps(self.run.figures), encoding="utf-8")
        self.run.best.store(folder)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        return  # nothing is drawn but by seeds of the step

    def _prepare_dataset(self, dataset: datasets.Dataset, *unused: object, **unused_too: object) -> datasets.Dataset:
        return dataset  # rows are tokenised before they come here

    def _send_telemetry(self) -> None:
        return

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted."""
        return 0


class Stepped:
    """In the place of the loop's optimizer: the engine has stepped when the loop asked for the gradient's norm."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.param_groups = optimizer.param_groups

    def step(self) -> None:
        """Nothing is left to do."""


class SaveAndStop(TrainerCallback):
    """Asks the loop for a checkpoint when one is due, and for the end when the stage is asked to stop."""

    def __init__(self, run: SupervisedRun[Any]) -> None:
        self.run = run

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Decides after each optimizer step."""
        context = self.run.context
        stop = ranks.any_rank(context.should_stop())
        due = state.global_step % context.shared.checkpoint_every == 0 or state.global_step == self.run.steps
        control.should_save = stop or due
        control.should_training_stop |= stop
        return control


def _dropout_seed(seed: int, step: int) -> int:
    text = f"{seed}/dropout/{step}/{ranks.current().rank}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def train(trainer: StageTrainer) -> None:
    """Trains to the end, from the newest good checkpoint of the same key where there is one.

    Raises Interrupted where the stage was asked to stop; a checkpoint is written before.
    """
    run = trainer.run
    checkpoint = ranks.from_main(latest_checkpoint(run.folder, run.context.key))
    run.context.metrics.rewind(checkpoint.step if checkpoint else 0)
    run.context.metrics.start(run.steps, "step")
    if ranks.current().is_main:
        run.best.restore(checkpoint.path if checkpoint else None)
    if checkpoint is not None:
        run.context.metrics.say(f"resuming after step {checkpoint.step} of {run.steps}")
        run.figures = json.loads((checkpoint.path / FIGURES).read_text(encoding="utf-8"))
    trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    if trainer.state.global_step < run.steps:
        raise Interrupted(f"{run.context.stage}: stopped after step {trainer.state.global_step} of {run.steps}")
