"""Decoding: a step of our own gives what the whole sequence gives, from copies that follow no later change."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.core import attention, blocks, lora
from stages.core.attention import pack_layout
from stages.core.decoding import Decoder, ModelDecoder, PackedDecoder, decoder_of
from stages.core.kv_cache import KvCache
from stages.core.models import backbone
from stages.core.sequences import PackedBatch
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3

CPU = torch.device("cpu")
SEQUENCES = [list(range(3, 20)), [8, 9, 30, 31, 32, 33], [10, 11, 12, 13, 200, 201, 14, 15]]
PROMPTS = [12, 2, 4]  # so many tokens of each are its prompt
STEPS = 4
Build = Callable[[], PreTrainedModel]


def adapted(build: Build, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model with our layers and an adapter on some linear layers; no matrix zero, no norm like another."""
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
            elif "norm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.05
    return peft_model.get_base_model().eval()


def forward(model: PreTrainedModel, sequences: list[list[int]], cache: KvCache | None = None) -> Tensor:
    """Hidden states ND of whole sequences, packed; they fill the cache."""
    packed = PackedBatch.of(sequences, CPU)
    layout = pack_layout(packed.documents, CPU, cache)
    output = backbone(model)(
        input_ids=packed.tokens_1N, position_ids=packed.position_ids_1N, layout=layout, use_cache=False
    )
    return output.last_hidden_state[0]


def whole(model: PreTrainedModel) -> Tensor:
    """Hidden states, step by step, of the tokens behind the prompts: all sequences in one pass."""
    states = forward(model, SEQUENCES).split([len(each) for each in SEQUENCES])
    continued = [own[cut : cut + STEPS] for own, cut in zip(states, PROMPTS, strict=True)]
    return torch.stack(continued, 1).flatten(0, 1)


def stepped(model: PreTrainedModel, decoder: Decoder) -> Tensor:
    """The same, token by token."""
    cache = KvCache(capacity=max(PROMPTS) + STEPS)
    forward(model, [each[:cut] for each, cut in zip(SEQUENCES, PROMPTS, strict=True)], cache)
    states: list[Tensor] = []
    for step in range(STEPS):
        new_B = torch.tensor([each[cut + step] for each, cut in zip(SEQUENCES, PROMPTS, strict=True)])
        states.append(decoder.step(new_B, cache))
    return torch.cat(states)


@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (tiny_llama, PackedDecoder),
        (tiny_mistral, PackedDecoder),
        (tiny_qwen2, PackedDecoder),
        (tiny_qwen3, PackedDecoder),
        (tiny_gpt2, ModelDecoder),
    ],
)
def test_steps_give_what_the_whole_sequence_gives(build: Build, kind: type) -> None:
    model = adapted(build)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected = whole(model)
    decoder = decoder_of(model)
    assert type(decoder) is kind
    torch.testing.assert_close(stepped(model, decoder), expected, rtol=1e-4, atol=1e-5)
    logits = model.get_output_embeddings()(expected)
    torch.testing.assert_close(decoder.logits(expected), logits, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


@torch.no_grad()
def test_a_layer_that_only_peft_can_run_leaves_the_steps_to_the_model() -> None:
    attention.register()
    model = tiny_llama()
    model.set_attn_implementation(attention.NAME)
    blocks.speed_up(model)
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(model, config).get_base_model().eval()
    decoder = decoder_of(model)
    assert isinstance(decoder, ModelDecoder)
    torch.testing.assert_close(stepped(model, decoder), whole(model), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_decoder_has_the_weights_of_its_time() -> None:
    model = adapted(tiny_llama)
    decoder, expected = decoder_of(model), whole(model)
    prompts = [each[:cut] for each, cut in zip(SEQUENCES, PROMPTS, strict=True)]
    caches = [KvCache(capacity=max(PROMPTS) + 1) for _ in range(2)]
    for cache in caches:
        forward(model, prompts, cache)
    new_B = torch.tensor([each[cut] for each, cut in zip(SEQUENCES, PROMPTS, strict=True)])
    for parameter in model.model.layers.parameters():
        parameter.mul_(1.5)
    torch.testing.assert_close(decoder.step(new_B, caches[0]), expected[: len(new_B)], rtol=1e-4, atol=1e-5)
    changed = decoder_of(model).step(new_B, caches[1])
    assert not torch.allclose(changed, expected[: len(new_B)], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(stepped(model, decoder_of(model)), whole(model), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, tiny_qwen3])
def test_in_bfloat16_adapters_stay_beside_the_weights(build: Build) -> None:
    exact, low = adapted(build), adapted(build, torch.bfloat16)
    for mine, other in zip(exact.parameters(), low.parameters(), strict=True):
        mine.copy_(other)
    true, plain = whole(exact), whole(low).float()
    decoder = decoder_of(low)
    assert isinstance(decoder, PackedDecoder)
    assert all(block.inputs.high_RP is not None for block in decoder.blocks)
    states = stepped(low, decoder)
    assert states.dtype == torch.bfloat16
    # bfloat16 on both sides, other roundings: ours must not be the less exact of the two.
    assert 1e-4 < float((states.float() - true).norm()) < 1.3 * float((plain - true).norm())
