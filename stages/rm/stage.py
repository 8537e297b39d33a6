"""Preference pairs + policy -> reward model."""

import json
from pathlib import Path

from trl import RewardConfig

from data.artifacts import write_atomically
from data.prepare import prepare_preferences
from stages.core import ranks
from stages.core.context import StageContext, StageResult
from stages.core.models import open_encoder, resolve_model
from stages.core.pairs import measure
from stages.core.supervised import encode_rows, publish, tuning_request
from stages.core.supervised_run import SupervisedRun, quiet_libraries, trl_options
from stages.core.trl_training import train
from stages.core.tuning import tuned_model
from stages.rm.config import RmConfig
from stages.rm.trainer import RmTrainer


def run(context: StageContext[RmConfig]) -> StageResult:
    """A reward model in `context.out/weights`, and its diagnostics in `report.json`."""
    quiet_libraries()
    encoder = open_encoder(context.inputs["policy"], context.shared)
    prepared = encode_rows(context, encoder, prepare_preferences)
    trainer = build_trainer(context, SupervisedRun(context, encoder, prepared.train, prepared.holdout, measure))
    train(trainer)
    figures = publish(trainer, _score_at_the_last_token)
    if ranks.current().is_main:
        _write_report(context.out / "report.json", figures, num_pairs=len(prepared.holdout))
    return StageResult("reward_model", figures, context.parents())


def build_trainer(context: StageContext[RmConfig], run: SupervisedRun) -> RmTrainer:
    """TRL's trainer for this stage, with the model it starts from."""
    options = trl_options(context.config, context.shared, folder=run.folder, steps=run.steps)
    source = resolve_model(context.inputs["policy"])
    return RmTrainer(
        run=run,
        model=tuned_model(source, head="score", request=tuning_request(context)),
        # disable_dropout would also silence tuning.dropout
        args=RewardConfig(**options, disable_dropout=False, center_rewards_coefficient=context.config.centering),
        processing_class=run.encoder.tokenizer,
    )


def _score_at_the_last_token(folder: Path) -> None:
    """Keeps transformers from reading the score before the last token of a full model.

    Its forward takes the last token that is not padding; where padding is EOS, that is the token before EOS. Without a
    padding token it takes the last one, and refuses batches.
    """
    path = folder / "config.json"
    if not path.is_file():
        return  # an adapter; the base's config rules
    config = json.loads(path.read_text(encoding="utf-8"))
    ends = config.get("eos_token_id")
    if config.get("pad_token_id") in (ends if isinstance(ends, list) else [ends]):
        path.write_text(json.dumps({**config, "pad_token_id": None}, indent=2, sort_keys=True), encoding="utf-8")


def _write_report(path: Path, figures: dict[str, float], *, num_pairs: int) -> None:
    """The diagnostics of the published weights on the holdout."""
    holdout = {name.removeprefix("eval/"): round(value, 6) for name, value in figures.items() if "eval/" in name}
    write_atomically(path, json.dumps({"holdout_pairs": num_pairs, "holdout": holdout}, indent=2) + "\n")
