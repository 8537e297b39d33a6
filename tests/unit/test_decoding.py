"""Packed weights: passes give what they gave, from copies that follow no later change and leave no trace."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.core import attention, blocks, lora
from stages.core.decoding import packed_weights
from stages.core.sequences import PackedBatch
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3

CPU = torch.device("cpu")
SEQUENCES = [list(range(3, 20)), [8, 9], [10, 11, 12, 13, 200, 201]]
Build = Callable[[], PreTrainedModel]


def adapted(build: Build, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model with our layers and an adapter on some linear layers, none of its matrices zero."""
    attention.register()
    model = build().to(dtype)
    model.set_attn_implementation(attention.NAME)
    blocks.speed_up(model)
    targets = ["c_attn", "c_proj"] if build is tiny_gpt2 else ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    peft_model = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, target_modules=targets))
    lora.speed_up(peft_model)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in peft_model.named_parameters():
            if "lora" in name:
                nn.init.normal_(parameter, std=0.2)
    return peft_model.get_base_model().eval()


@torch.no_grad()
def hidden(model: PreTrainedModel) -> Tensor:
    packed = PackedBatch.of(SEQUENCES, CPU)
    body = getattr(model, model.base_model_prefix)
    output = body(
        input_ids=packed.tokens_1N, position_ids=packed.position_ids_1N, layout=packed.layout, use_cache=False
    )
    return output.last_hidden_state[0]


@pytest.mark.parametrize("build", [tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3, tiny_gpt2])
def test_packing_changes_nothing_but_the_cost(build: Build) -> None:
    model = adapted(build)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plain_ND = hidden(model)
    logits_NV = model.get_output_embeddings()(plain_ND)
    with packed_weights(model) as head:
        packed_ND = hidden(model)
        torch.testing.assert_close(packed_ND, plain_ND, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(head(plain_ND), logits_NV, rtol=1e-4, atol=1e-5)
    assert torch.equal(hidden(model), plain_ND)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_the_copies_are_what_runs() -> None:
    model = adapted(tiny_llama)
    before_ND = hidden(model)
    with packed_weights(model):
        packed_ND = hidden(model)
        with torch.no_grad():
            for parameter in model.model.layers.parameters():
                if parameter.dim() == 2:  # norms are read as they are
                    parameter.mul_(2)
        assert torch.equal(hidden(model), packed_ND)
    assert not torch.allclose(hidden(model), before_ND)


def test_each_packing_takes_the_weights_of_its_time() -> None:
    model = adapted(tiny_llama)
    with packed_weights(model):
        before_ND = hidden(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.add_(0.5)
    expected_ND = hidden(model)
    with packed_weights(model):
        torch.testing.assert_close(hidden(model), expected_ND, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected_ND, before_ND)


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, tiny_qwen3])
def test_in_bfloat16_adapters_stay_beside_the_weights(build: Build) -> None:
    exact, low = adapted(build), adapted(build, torch.bfloat16)
    with torch.no_grad():
        for mine, other in zip(exact.parameters(), low.parameters(), strict=True):
            mine.copy_(other)
    true_ND, plain_ND = hidden(exact), hidden(low).float()
    with packed_weights(low):
        packed_ND = hidden(low).float()
        assert all(block.packed.inputs.high_RP is not None for block in low.model.layers)
    # bfloat16 on both sides, other roundings: packing must not be the less exact of the two.
    assert 1e-4 < float((packed_ND - true_ND).norm()) < 1.3 * float((plain_ND - true_ND).norm())


def test_an_error_leaves_nothing_packed() -> None:
    model = adapted(tiny_llama)
    with pytest.raises(RuntimeError, match="stop"), packed_weights(model):
        raise RuntimeError("stop")
    assert all(getattr(module, "packed", None) is None for module in model.modules())
