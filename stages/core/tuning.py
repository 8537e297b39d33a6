"""The model that a supervised stage trains: all of it, or LoRA adapters on a frozen base."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from data.errors import UserError
from stages.core.config import Tuning
from stages.core.lora import speed_up
from stages.core.models import ModelSource, is_reward_model, load_model, lora_config
from stages.core.trunk import read_adapter

TASKS = {"lm": "CAUSAL_LM", "score": "SEQ_CLS"}


@dataclass(frozen=True)
class TuningRequest:
    """What to train and how it is held in memory."""

    tuning: Tuning
    dtype: Literal["float32", "bfloat16"]
    packing: bool
    seed: int


def tuned_model(source: ModelSource, *, head: Literal["lm", "score"], request: TuningRequest) -> nn.Module:
    """A PeftModel on the source's base (lora), or the whole model in float32 (full).

    LoRA: an adapter that the source holds is where the new one starts; the base stays as it is, so that policy, value
    and reward adapters can share it. Adapters and score head are float32 whatever the base's dtype. Full: an adapter
    of the source is merged first. A fresh score head starts small, N(0, 1/(D+1)) as in Stiennon et al. 2020
    (2009.01325) and Huang et al. 2024 (2403.17031, detail 9).
    """
    set_seed(request.seed)
    lora = request.tuning.method == "lora"
    model = load_model(source.base, head=head, dtype=request.dtype if lora else "float32", packing=request.packing)
    if head == "score" and not is_reward_model(model):
        _fresh_head(_score_head(model), request.seed)
    if not lora:
        return model if source.adapter is None else _merged(model, source.adapter)
    peft_model = get_peft_model(model, lora_config(request.tuning, TASKS[head]))
    adapter_config = peft_model.peft_config["default"]
    adapter_config.base_model_name_or_path = _absolute(source.base)
    speed_up(peft_model)
    if source.adapter is not None:
        _start_from(peft_model, source.adapter)
    return peft_model


def save_weights(model: nn.Module, folder: Path) -> None:
    """Writes a model or its adapter the way from_pretrained reads it, safetensors only."""
    if isinstance(model, PeftModel):
        # "auto" would ask the hub whether the base's vocabulary changed; ours never does. A trainer may have put a
        # reference adapter beside the one that trains.
        model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"])
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
        _sort_names(folder / "adapter_config.json")
    else:
        model.save_pretrained(folder)


def _sort_names(path: Path) -> None:
    """Gives the sets in peft's config one order, so that the same adapter is the same bytes."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("target_modules", "modules_to_save"):
        if isinstance(config[name], list):
            config[name] = sorted(set(config[name]))
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model, with its adapters in place where it has some."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _score_head(model: PreTrainedModel) -> nn.Module:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module):
        raise UserError(f"{type(model).__name__}: no head called `score`; use a decoder-only model for rm")
    return head.to(torch.float32)


def _fresh_head(head: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        std = 1 / math.sqrt(parameter.shape[-1] + 1) if parameter.dim() == 2 else 0.0
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def _merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    config, weights, _ = read_adapter(adapter)
    peft_model = PeftModel(model, config)
    _load(peft_model, weights, adapter)
    return peft_model.merge_and_unload().requires_grad_(True)  # peft froze the base


def _start_from(model: PeftModel, adapter: Path) -> None:
    """Copies the weights of a saved adapter into the fresh one; a score head only where the saved one has it."""
    config, weights, head = read_adapter(adapter)
    _check_same_shape(model.peft_config["default"], config, adapter)
    _load(model, weights | head, adapter)


def _check_same_shape(ours: LoraConfig, saved: LoraConfig, adapter: Path) -> None:
    def shape(config: LoraConfig) -> dict[str, object]:
        targets = config.target_modules
        return {
            "rank": config.r,
            "alpha": config.lora_alpha,
            "targets": ", ".join(sorted(targets)) if isinstance(targets, set | list) else targets,
        }

    problems = [
        f"tuning.{name}={wanted} differs from {shape(saved)[name]} of the adapter in {adapter} that this stage starts "
        "from; give both stages the same tuning, or start from a full model"
        for name, wanted in shape(ours).items()
        if shape(saved)[name] != wanted
    ]
    if problems:
        raise UserError(*problems)


def _load(model: PeftModel, weights: Mapping[str, Tensor], adapter: Path) -> None:
    ours = get_peft_model_state_dict(model, save_embedding_layers=False)
    if strangers := sorted(weights.keys() - ours.keys()):
        raise UserError(f"adapter {adapter}: does not fit this base (it has no {strangers[0]})")
    set_peft_model_state_dict(model, ours | dict(weights))


def _absolute(base: str) -> str:
    return str(Path(base).resolve()) if Path(base).is_dir() else base
