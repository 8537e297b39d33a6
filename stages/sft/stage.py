"""Demonstrations + base model -> policy."""

from trl import SFTConfig

from data.prepare import prepare_demonstrations
from stages.core.context import StageContext, StageResult
from stages.core.models import open_encoder, resolve_model
from stages.core.supervised import encode_rows, publish, tuning_request
from stages.core.supervised_run import SupervisedRun, quiet_libraries, trl_options
from stages.core.trl_training import train
from stages.core.tuning import tuned_model
from stages.sft.config import SftConfig
from stages.sft.trainer import SftTrainer, measure


def run(context: StageContext[SftConfig]) -> StageResult:
    """A policy in `context.out/weights`, trained on the responses of the demonstrations."""
    quiet_libraries()
    encoder = open_encoder(context.inputs["base"], context.shared)
    prepared = encode_rows(context, encoder, prepare_demonstrations)
    trainer = build_trainer(context, SupervisedRun(context, encoder, prepared.train, prepared.holdout, measure))
    train(trainer)
    return StageResult("policy", publish(trainer), context.parents())


def build_trainer(context: StageContext[SftConfig], run: SupervisedRun) -> SftTrainer:
    """TRL's trainer for this stage, with the model it starts from."""
    options = trl_options(context.config, context.shared, folder=run.folder, steps=run.steps)
    source = resolve_model(context.inputs["base"])
    return SftTrainer(
        run=run,
        model=tuned_model(source, head="lm", request=tuning_request(context)),
        args=SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True}),
        processing_class=run.encoder.tokenizer,
    )
