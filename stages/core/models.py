"""Models from folders, artifacts and the hub; where a saved policy or reward model finds its base."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from data.chat import ChatEncoder, load_tokenizer
from data.errors import UserError
from data.hub import require_on_hub
from stages.core import attention, blocks
from stages.core.config import SharedConfig, Tuning

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelSource:
    """A full model (`adapter` is None) or a LoRA adapter on the model `base`."""

    base: str  # folder or hub id
    adapter: Path | None = None

    @property
    def folder(self) -> str:
        """Where the tokenizer and, for a reward model, the head stand."""
        return str(self.adapter or self.base)


def resolve_model(source: str) -> ModelSource:
    """The model behind a stage folder, a weights folder or a hub id.

    Raises UserError for a path that does not exist, a stage folder without weights, and an id that the hub lacks.
    """
    folder = Path(source)
    if (folder / "weights").is_dir():
        folder = folder / "weights"
    if not folder.is_dir():
        if folder.is_absolute() or source.startswith(".") or source.count("/") > 1:
            raise UserError(f"model {source}: no such folder; give a model folder, a finished stage or a hub id")
        require_on_hub(source, "model")
        return ModelSource(source)
    adapter_config = folder / "adapter_config.json"
    if adapter_config.is_file():
        return ModelSource(json.loads(adapter_config.read_text(encoding="utf-8"))["base_model_name_or_path"], folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"model {folder}: neither config.json nor adapter_config.json in it; is the stage finished?")
    return ModelSource(str(folder))


def load_model(
    base: str, *, head: Literal["lm", "score"], dtype: str = "float32", packing: bool = True
) -> PreTrainedModel:
    """The full model in `base` with its language-model head or a one-number score head, dropout off.

    Raises UserError where it cannot be loaded.
    """
    attention.register()
    auto = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    options = {} if head == "lm" else {"num_labels": 1}
    try:
        model = auto.from_pretrained(base, dtype=DTYPES[dtype], attn_implementation="sdpa", **options)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model {base}: cannot be loaded ({reason}); check the path or hub id") from error
    if packing:
        model.set_attn_implementation(attention.NAME)
        blocks.speed_up(model)
    return model


def is_reward_model(model: PreTrainedModel) -> bool:
    """Whether the loaded folder already held a score head, told by the class that saved it; else it is random."""
    return any("SequenceClassification" in name for name in model.config.architectures or ())


def load_merged(source: ModelSource, *, head: Literal["lm", "score"] = "lm") -> PreTrainedModel:
    """The full model in float32, an adapter merged into its own copy of the base (exact there, not in bfloat16)."""
    model = load_model(source.base, head=head)
    if source.adapter is None:
        return model
    return PeftModel.from_pretrained(model, str(source.adapter)).merge_and_unload()


def open_encoder(source: str, shared: SharedConfig) -> ChatEncoder:
    """How the model behind a stage folder, a weights folder or a hub id reads and writes text."""
    tokenizer = load_tokenizer(resolve_model(source).folder, shared.chat_template)
    return ChatEncoder(tokenizer, max_length=shared.max_length, overlong=shared.overlong)


def end_tokens(encoder: ChatEncoder, model: PreTrainedModel) -> tuple[int, ...]:
    """Every token that ends a response: the encoder's, and those that the model itself was saved with."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own_list = own if isinstance(own, list) else [] if own is None else [own]
    return tuple(dict.fromkeys([*encoder.end_token_ids, *own_list]))


def backbone(model: PreTrainedModel) -> nn.Module:
    """The transformer without its head."""
    return getattr(model, model.base_model_prefix)


def lora_config(tuning: Tuning, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> LoraConfig:
    """peft's config of a LoRA adapter; a score head is trained whole."""
    return LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=tuning.targets,
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
