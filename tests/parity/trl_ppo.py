"""Runs TRL 1.12's PPOTrainer on given weights and prompts, and saves what it computed.

A program, not a module: `python trl_ppo.py FOLDER` with TRL 1.12 first on the path, in a process of its own because the
installed TRL bears the same name. Reads FOLDER/cases.json, writes FOLDER/<case>.pt for each: the local tensors of its
training loop after the last microbatch, the gradients at every optimizer step, and the metrics that it logs.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Witness(TrainerCallback):
    """Keeps the tensors of the training loop, which stand in no object, and the metrics of one update."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.metrics: dict[str, float] = {}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        frame = sys._getframe()
        while frame.f_code is not PPOTrainer.train.__code__:
            assert frame.f_back is not None
            frame = frame.f_back
        found = frame.f_locals.items()
        self.tensors = {name: torch.as_tensor(value).clone() for name, value in found if _is_array(value)}

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.metrics = {name: float(value) for name, value in logs.items()}


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def load(model: PreTrainedModel, adapter: str | None) -> PreTrainedModel | PeftModel:
    """The model, under its adapter where it has one."""
    if adapter is None:
        return model
    config = LoraConfig.from_pretrained(adapter)
    if not model.can_generate():
        config.task_type = None  # a language model's adapter on a value model
    return PeftModel.from_pretrained(model, adapter, config=config, is_trainable=True)


def critic(part: dict[str, str | None]) -> PreTrainedModel | PeftModel:
    """The value model with the given head."""
    model = AutoModelForSequenceClassification.from_pretrained(part["model"], num_labels=1)
    with torch.no_grad():
        model.score.weight.copy_(torch.load(part["head"]))
    critic = load(model, part["adapter"])
    model.score.weight.requires_grad_(True)
    return critic


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What one case computed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    np.random.seed(0)
    tokenizer = AutoTokenizer.from_pretrained(case["tokenizer"], padding_side="left")
    if case["pad_is_eos"]:
        tokenizer.pad_token = tokenizer.eos_token
    policy = load(AutoModelForCausalLM.from_pretrained(case["policy"]["model"]), case["policy"]["adapter"])
    value = critic(case["value"])
    trained = [each for model in (policy, value) for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=case["learning_rate"])
    witness = Witness()
    trainer = PPOTrainer(
        args=PPOConfig(output_dir=str(folder / "output"), **case["args"]),
        processing_class=tokenizer,
        model=policy,
        ref_model=AutoModelForCausalLM.from_pretrained(case["reference"]) if case["reference"] else None,
        reward_model=AutoModelForSequenceClassification.from_pretrained(case["reward"]),
        train_dataset=Dataset.from_dict({"input_ids": case["prompts"]}),
        value_model=value,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        callbacks=[witness],
    )
    steps: list[dict[str, Tensor]] = []

    def keep_gradients(*_: Any) -> None:
        named = trainer.model.named_parameters()
        steps.append({name: each.grad.clone() for name, each in named if each.grad is not None})

    optimizer.register_step_pre_hook(keep_gradients)
    trainer.train()
    return {"tensors": witness.tensors, "metrics": witness.metrics, "steps": steps}


def main(folder: Path) -> None:
    assert trl.__version__ == "1.12.0", trl.__version__
    torch.set_num_threads(1)
    for name, case in json.loads((folder / "cases.json").read_text(encoding="utf-8")).items():
        torch.save(run(case, folder), folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
