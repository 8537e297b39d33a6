"""The frame of `sft`, `rm` and `dpo`: rows checked and encoded before, weights and figures published after."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from data.artifacts import publish_folder
from data.chat import ChatEncoder
from data.encoded import EncodedDemonstration, EncodedPreference
from data.prepare import Prepared
from stages.core import ranks
from stages.core.context import StageContext
from stages.core.trl_training import StageTrainer
from stages.core.tuning import TuningRequest, save_weights

EncodedT = TypeVar("EncodedT", EncodedDemonstration, EncodedPreference)


def encode_rows(
    context: StageContext[Any], encoder: ChatEncoder, prepare: Callable[..., Prepared[EncodedT]]
) -> Prepared[EncodedT]:
    """The stage's rows by `prepare`; refused ones in quarantine.jsonl.

    Raises UserError where too many were refused or none is left.
    """
    config, shared = context.config, context.shared
    prepared = prepare(config.data, config.holdout, encoder=encoder, run_folder=context.run_folder, seed=shared.seed)
    if ranks.current().is_main:
        prepared.report.write_quarantine(context.out / "quarantine.jsonl")
    context.metrics.say(prepared.report.summary())
    prepared.report.check_refused(shared.max_refused)
    return prepared


def tuning_request(context: StageContext[Any]) -> TuningRequest:
    """What the stage trains: its own tuning, else the run's."""
    shared = context.shared
    return TuningRequest(context.config.tuning or shared.tuning, shared.dtype, shared.packing, shared.seed)


def publish(trainer: StageTrainer, finish: Callable[[Path], None] | None = None) -> dict[str, float]:
    """Writes `weights/` (the best by holdout loss, or the last) with the tokenizer; returns the artifact's figures.

    Figures are those of the published weights; `best/…` and `last/…` say what both reached on the holdout and when.
    Without a holdout the last weights are published.
    """
    with trainer.engine.gathered():
        figures = ranks.from_main(_publish(trainer, finish) if ranks.current().is_main else {})
    trainer.engine.close()
    return figures


def _publish(trainer: StageTrainer, finish: Callable[[Path], None] | None) -> dict[str, float]:
    run = trainer.run
    best = run.best.record if run.context.config.publish == "best" else None

    def write(folder: Path) -> None:
        if best is None:
            save_weights(trainer.model, folder)
        else:
            shutil.copytree(run.best.weights, folder, dirs_exist_ok=True)
        run.encoder.tokenizer.save_pretrained(folder)
        if finish is not None:
            finish(folder)

    publish_folder(run.context.out / "weights", write)
    figures = dict(run.figures) if best is None else run.figures | best.figures
    if (record := run.best.record) is not None:
        figures |= {"best/step": float(record.step), "best/loss": record.figures["eval/loss"]}
        figures |= {"last/step": float(run.steps), "last/loss": run.figures["eval/loss"]}
    return figures
