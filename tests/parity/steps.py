"""One optimizer step's loss and gradients, through a trainer's own batching and training step."""

import torch
from torch import Tensor
from transformers import Trainer

from data.chat import ChatEncoder
from stages.core.context import StageContext
from stages.core.supervised_run import SupervisedRun
from stages.core.trl_training import StageTrainer
from tests.tiny import tiny_tokenizer


def first_step(trainer: Trainer) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients, by parameter name, of the first step's batch."""
    loader = trainer.get_train_dataloader()
    if isinstance(trainer, StageTrainer):
        trainer._prepare_for_training(1, loader, None)  # opens the engine
    batches, items = trainer.get_batch_samples(
        iter(loader), trainer.args.gradient_accumulation_steps, trainer.args.device
    )
    trainer.current_gradient_accumulation_steps = len(batches)
    loss = sum(trainer.training_step(trainer.model, batch, items).item() for batch in batches)
    grads = {name: value.grad.clone() for name, value in trainer.model.named_parameters() if value.grad is not None}
    return loss, grads


def assert_same_step(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]]) -> None:
    """Equal losses and gradients to 1e-5, and no drift of the mean."""
    assert abs(ours[0] - theirs[0]) < 1e-5
    assert ours[1].keys() == theirs[1].keys()
    assert len(ours[1]) > 0
    assert max(grad.abs().max().item() for grad in theirs[1].values()) > 1e-3  # there is something to compare
    for name, grad in theirs[1].items():
        torch.testing.assert_close(
            ours[1][name], grad, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert abs((ours[1][name] - grad).mean().item()) < 1e-6


def supervised_run(context: StageContext, rows: list, measure) -> SupervisedRun:
    """A run on rows that are tokens already, without a holdout."""
    encoder = ChatEncoder(_with_template(), max_length=64)
    return SupervisedRun(context, encoder, rows, [], measure)


def _with_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer
