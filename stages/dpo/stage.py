"""Preference pairs + policy -> policy."""

import copy

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import DPOConfig

from data.errors import UserError
from data.prepare import prepare_preferences
from stages.core.context import StageContext, StageResult
from stages.core.models import open_encoder, resolve_model
from stages.core.pairs import measure
from stages.core.passes import check_head
from stages.core.supervised import encode_rows, publish, tuning_request
from stages.core.supervised_run import SupervisedRun, quiet_libraries, trl_options
from stages.core.trl_training import train
from stages.core.tuning import inner_model, tuned_model
from stages.dpo.config import DpoConfig
from stages.dpo.labels import refuse_margins
from stages.dpo.trainer import DpoTrainer


def run(context: StageContext[DpoConfig]) -> StageResult:
    """A policy in `context.out/weights`, moved towards the chosen responses and held near where it started."""
    quiet_libraries()
    encoder = open_encoder(context.inputs["policy"], context.shared)
    prepared = encode_rows(context, encoder, prepare_preferences)
    refuse_margins([*prepared.train, *prepared.holdout])
    trainer = build_trainer(context, SupervisedRun(context, encoder, prepared.train, prepared.holdout, measure))
    train(trainer)
    return StageResult("policy", publish(trainer), context.parents())


def build_trainer(context: StageContext[DpoConfig], run: SupervisedRun) -> DpoTrainer:
    """TRL's trainer for this stage, with the policy it starts from as the reference.

    A whole model's reference is handed to TRL, which would load it from where the base came from: that lacks an adapter
    merged since. It is float32 as the policy is, so that both are the same to the last bit before the first step.
    """
    options = trl_options(context.config, context.shared, folder=run.folder, steps=run.steps)
    model = tuned_model(resolve_model(context.inputs["policy"]), head="lm", request=tuning_request(context))
    if isinstance(inner_model(model).get_output_embeddings(), BaseTunerLayer):
        raise UserError("tuning.targets: names the model's head, which dpo cannot train by LoRA; take it out")
    trainer = DpoTrainer(
        run=run,
        model=model,
        ref_model=None if isinstance(model, PeftModel) else copy.deepcopy(model).requires_grad_(False),
        args=DPOConfig(**options),
        processing_class=run.encoder.tokenizer,
    )
    check_head(inner_model(trainer.model), packing=context.shared.packing)
    return trainer
