"""Memory formulas against models that torch and peft really build (on the meta device: no weights)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from stages.core import attention, blocks, memory
from stages.core.config import Tuning
from stages.core.known_models import known_config
from stages.core.memory import Training, model_shape, training_bytes
from stages.core.sequences import PackedBatch

SHARED = Path(__file__).resolve().parents[3] / "shared"
CONFIGS: dict[str, Any] = {
    "tied": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    ),
    "untied": LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    ),
    "wide heads": LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16
    ),
}


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count(model: Any, *, trainable_only: bool = False) -> int:
    return sum(each.numel() for each in model.parameters() if each.requires_grad or not trainable_only)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_exactly(name: str):
    assert model_shape(CONFIGS[name].to_dict()).parameters == count(on_meta(CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_lora_parameters_are_counted_exactly(name: str):
    model = get_peft_model(on_meta(CONFIGS[name]), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert model_shape(CONFIGS[name].to_dict()).lora_parameters(4) == count(model, trainable_only=True)


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(vocab_size=1000, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4),
        GPT2Config(vocab_size=1000, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    ],
    ids=["qwen2", "gpt2"],
)
def test_other_architectures_are_close(config: Any):
    assert model_shape(config.to_dict()).parameters == pytest.approx(count(on_meta(config)), rel=0.05)


@pytest.mark.parametrize(
    ("hub_id", "billions"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.494),  # model cards
        ("Qwen/Qwen2.5-7B-Instruct", 7.61),
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03),
    ],
)
def test_known_models_have_their_published_size(hub_id: str, billions: float):
    config = known_config(hub_id)
    assert config is not None
    assert model_shape(config).parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_parts_by_hand():
    # One block, hidden 4, intermediate 8, 2 heads of 2, vocabulary 10, tied.
    shape = model_shape(
        {
            "hidden_size": 4,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 10,
            "tie_word_embeddings": True,
        }
    )
    # block: 4 matrices 4x4, 3 of 4x8, 2 norms of 4 = 64 + 96 + 8 = 168; last norm 4; embedding 40
    assert shape.parameters == 212
    # rank 2: 4 x 2 x (4+4) + 3 x 2 x (4+8) = 64 + 72
    assert shape.lora_parameters(2) == 136
    assert shape.kv_cache_bytes(3, 4) == 2 * 1 * 4 * 3 * 4
    lora = training_bytes(shape, Training(Tuning(rank=2), "bfloat16", tokens=0, logits=0))
    assert lora == {
        "weights": 424,
        "adapters": 544,
        "gradients": 544,
        "optimizer": 1088,
        "activations": 0,
        "logits": 0,
    }
    full = training_bytes(shape, Training(Tuning(method="full"), "bfloat16", tokens=0, logits=0))
    assert (full["weights"], full["adapters"], full["gradients"], full["optimizer"]) == (848, 0, 848, 1696)


@pytest.mark.parametrize("written_out", [True, False])
@pytest.mark.parametrize("spans", [True, False])
def test_activations_are_what_torch_saves(written_out: bool, spans: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that autograd keeps for the backward pass of a Llama's blocks, measured, against the formula.

    It is that of a GPU's attention. A CPU's keeps probabilities, heads x length for each token, and no padded output.
    """
    if not spans:
        monkeypatch.setattr(attention, "SPAN_DEVICES", ())
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4
    )
    attention.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).model
    if written_out:
        blocks.speed_up(model)
    saved: dict[int, int] = {}
    parameters = {each.untyped_storage().data_ptr() for each in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    kept: list[Any] = []
    packed = PackedBatch.of([[0] * 128, [0] * 100], torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or keep(tensor), lambda x: x):
        model(input_ids=packed.tokens_1N, position_ids=packed.position_ids_1N, layout=packed.layout, use_cache=False)
    shape = replace(model_shape(config.to_dict()), written_out=written_out)
    probabilities = 4 * 4 * 4 * (128**2 + 100**2 - 228 * 32) if spans else 0  # bytes x layers x heads; 32 wide
    assert shape.activation_bytes(228, 4) + probabilities == pytest.approx(sum(saved.values()), rel=0.2)


def test_the_written_out_blocks_are_those_that_the_formulas_know() -> None:
    kinds = {f"{kind.__name__.removesuffix('DecoderLayer').lower()}" for kind in blocks.FAMILY}
    assert kinds == set(memory.WRITTEN_OUT)


def test_a_config_without_dimensions_says_what_it_lacks():
    with pytest.raises(KeyError, match="hidden_size"):
        model_shape({"model_type": "odd"})


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["stories260K-llama", "stories3M-llama"])
def test_real_models_are_counted_exactly(name: str):
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip("../shared is missing")
    shape = model_shape(json.loads((folder / "config.json").read_text()))
    assert shape.parameters == count(on_meta(AutoConfig.from_pretrained(folder)))
