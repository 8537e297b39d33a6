"""How an engine with weights of its own gets the policy: as a LoRA adapter where vLLM can serve it, else whole."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftConfig

from data.errors import UserError
from stages.core.bank import PolicyBank
from stages.core.models import resolve_model
from stages.core.trunk import Trunk

Dtype = Literal["float32", "bfloat16"]
Form = Literal["adapter", "full"]

# Methods whose effect is a change of weights, so that a model with them merged is the same function.
MERGE_EXACTLY = {"LORA", "ADALORA", "IA3", "LN_TUNING", "SHIRA", "SUPERTUNING", "BEFT"}
# Initialisations that change the base itself: an adapter file alone is then not the policy.
PLAIN_INITS = {"gaussian", "eva", "orthogonal"}
# Features of LoRA that no merged weight can express: they depend on the text, or on another stack of layers.
UNMERGEABLE = ("alora_invocation_tokens", "layer_replication")


@dataclass(frozen=True)
class PolicyFiles:
    """A policy as files; `write` puts it, as it is when called, into an empty folder."""

    base: str  # folder or hub id that a server starts from
    form: Form  # adapter: PEFT's LoRA files for `base`; full: a whole model
    dtype: Dtype
    write: Callable[[Path], None]
    rank: int = 0  # adapter: the largest in it


def policy_files(bank: PolicyBank, dtype: Dtype) -> PolicyFiles:
    """The bank's policy in the cheapest form that vLLM serves.

    Raises UserError, with the reason, for a policy that vLLM cannot serve in any form that is exact.
    """
    name = bank.policy.adapter
    base = resolve_model(bank.source).base
    if name is None:
        return PolicyFiles(base, "full", dtype, bank.save_policy)
    trunk = bank.policy.trunk
    assert trunk.peft is not None
    config = trunk.peft.peft_config[name]
    if served_form(config, dtype) == "full":
        return PolicyFiles(base, "full", dtype, lambda folder: write_merged(trunk, name, folder))
    assert isinstance(config, LoraConfig)
    return PolicyFiles(base, "adapter", dtype, bank.save_policy, max([config.r, *(config.rank_pattern or {}).values()]))


def served_form(config: PeftConfig, dtype: Dtype) -> Form:
    """adapter where vLLM serves the adapter's own files, full where it needs a merged copy and merging is exact.

    Raises UserError for the rest. vLLM's own list is `vllm.lora.peft_helper`.
    """
    hindrance = _hindrance(config)
    if hindrance is None:
        return "adapter"
    mend = "use ppo.rollout.engine=native, or plain LoRA"
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method not in MERGE_EXACTLY or any(getattr(config, feature, None) for feature in UNMERGEABLE):
        raise UserError(f"rollout engine vllm: cannot serve {hindrance}, and it cannot be merged into weights; {mend}")
    if dtype != "float32":
        raise UserError(
            f"rollout engine vllm: cannot serve {hindrance} as an adapter, and merged into {dtype} weights a small "
            f"change is lost; {mend}, or dtype=float32"
        )
    return "full"


def _hindrance(config: PeftConfig) -> str | None:
    """What in the adapter vLLM has no code for; None: nothing."""
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
        return f"tuning by {getattr(config.peft_type, 'value', config.peft_type)}"
    init: Any = config.init_lora_weights
    unserved = {
        "DoRA": config.use_dora,
        "modules_to_save": config.modules_to_save,
        "trained token embeddings": config.trainable_token_indices,
        "LoRA with a bias": config.lora_bias or config.bias != "none",
        "LoRA on single parameters": config.target_parameters,
        f"init_lora_weights={init}": isinstance(init, str) and init.lower() not in PLAIN_INITS,
        **{feature: getattr(config, feature, None) for feature in (*UNMERGEABLE, "use_bdlora", "use_qalora")},
    }
    return next((name for name, used in unserved.items() if used), None)


def write_merged(trunk: Trunk, adapter: str, folder: Path) -> None:
    """Writes the whole model with the adapter in its weights; the trunk's own weights are not touched."""
    merged = copy.deepcopy(trunk.peft)
    assert merged is not None
    merged.merge_and_unload(adapter_names=[adapter]).save_pretrained(str(folder))
