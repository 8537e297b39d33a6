"""The written-out block against transformers' own: outputs, gradients, what is left to transformers."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.core import attention, blocks, lora
from stages.core.sequences import PackedBatch
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3

CPU = torch.device("cpu")
SEQUENCES = [list(range(3, 20)), [8, 9], [10, 11, 12, 13, 200, 201]]
FAMILY = [tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3]
Build = Callable[[], PreTrainedModel]


def packing(model: PreTrainedModel) -> PreTrainedModel:
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return model


def adapted(model: PreTrainedModel, dropout: float = 0.0) -> nn.Module:
    """With LoRA on every linear layer, none of its matrices zero."""
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]  # not all: some parts of a group have no adapter
    config = LoraConfig(r=3, lora_alpha=7, target_modules=targets, lora_dropout=dropout)
    found = get_peft_model(model, config)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in found.named_parameters():
            if "lora" in name:
                nn.init.normal_(parameter, std=0.2)
    return found


def both(build: Build, *, tuning: str, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """transformers' and peft's arithmetic, and ours, on the same weights."""
    theirs = packing(build())
    theirs = adapted(theirs, dropout) if tuning == "lora" else theirs.requires_grad_(True)
    ours = copy.deepcopy(theirs)
    blocks.speed_up(ours)
    lora.speed_up(ours)
    return theirs.eval(), ours.eval()


def run(model: nn.Module) -> Tensor:
    """Logits NV."""
    packed = PackedBatch.of(SEQUENCES, CPU)
    output = model(
        input_ids=packed.tokens_1N, position_ids=packed.position_ids_1N, layout=packed.layout, use_cache=False
    )
    return output.logits[0]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    logits_NV = run(model)
    (logits_NV * torch.arange(logits_NV.numel()).view_as(logits_NV).sin()).sum().backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return found | {"logits": logits_NV.detach()}


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("build", FAMILY)
def test_outputs_and_gradients_are_transformers(build: Build, tuning: str) -> None:
    theirs, ours = both(build, tuning=tuning)
    expected, found = gradients(theirs), gradients(ours)
    assert expected.keys() == found.keys()
    assert len(found) > 20
    for name, value in expected.items():
        largest = float(value.abs().max())
        assert largest > 0, name
        assert float((found[name] - value).abs().max()) <= 1e-5 * largest, name


@pytest.mark.parametrize("build", FAMILY)
def test_the_whole_block_runs_written_out(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = both(build, tuning="lora")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("transformers' own forward pass")

    for module in ours.modules():
        if type(module).__name__.endswith(("Attention", "MLP")):
            monkeypatch.setattr(module, "forward", refuse)
    assert bool(run(ours).isfinite().all())


def test_the_rotation_and_its_gradient_are_the_plain_expression() -> None:
    x_NHE, sin_NE, cos_NE = torch.randn(5, 3, 8, requires_grad=True), torch.randn(5, 8), torch.randn(5, 8)
    turned_NHE = torch.cat([-x_NHE[..., 4:], x_NHE[..., :4]], 2)
    expected_NHE = x_NHE * cos_NE[:, None] + turned_NHE * sin_NE[:, None]
    found_NHE, weights_NHE = blocks.Rotary.apply(x_NHE, cos_NE, sin_NE), torch.randn(5, 3, 8)
    torch.testing.assert_close(found_NHE, expected_NHE)
    (expected,), (found,) = (torch.autograd.grad(each, [x_NHE], weights_NHE) for each in (expected_NHE, found_NHE))
    torch.testing.assert_close(found, expected)


def test_other_architectures_are_left_as_they_are() -> None:
    model = tiny_gpt2()
    kinds = [type(module) for module in model.modules()]
    blocks.speed_up(model)
    assert [type(module) for module in model.modules()] == kinds


def test_another_activation_is_left_as_it_is() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()
    blocks.speed_up(model)
    assert not any(isinstance(module, blocks.FastBlock) for module in model.modules())


def test_without_packing_transformers_runs() -> None:
    model = tiny_llama()
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    expected = model(input_ids=ids).logits
    blocks.speed_up(model)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask).logits[0, 1:], model(input_ids=ids[:1, 1:]).logits[0]
    )


def test_adapter_dropout_is_pefts_in_training() -> None:
    theirs, ours = both(tiny_llama, tuning="lora", dropout=0.5)
    torch.manual_seed(3)
    expected = run(theirs.train())
    torch.manual_seed(3)
    torch.testing.assert_close(run(ours.train()), expected)
    assert not torch.allclose(run(ours), expected)


def test_under_autocast_the_products_are_transformers() -> None:
    theirs, ours = both(tiny_llama, tuning="full")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(ours), run(theirs))


@pytest.mark.parametrize("build", FAMILY)
def test_in_bfloat16_no_less_exact_than_transformers(build: Build) -> None:
    """LoRA's products in bfloat16 on both sides: peft's own are float32, which is another question."""
    theirs, ours = both(build, tuning="lora")
    lora.speed_up(theirs)
    exact = gradients(theirs)
    low_theirs, low_ours = (copy.deepcopy(each) for each in (theirs, ours))
    for model in (low_theirs, low_ours):
        model.zero_grad()
        for name, parameter in model.named_parameters():
            if "lora" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    rough, found = gradients(low_theirs), gradients(low_ours)

    def errors(of: dict[str, Tensor]) -> Tensor:
        return torch.stack([(of[name].float() - value).norm() / value.norm() for name, value in exact.items()])

    assert 1e-4 < float(errors(found).mean()) < 1.3 * float(errors(rough).mean())


def test_gradient_checkpointing_changes_nothing() -> None:
    _, ours = both(tiny_llama, tuning="full")
    expected = gradients(ours)
    ours.zero_grad()
    ours.train().gradient_checkpointing_enable({"use_reentrant": False})
    for name, value in gradients(ours).items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_a_saved_model_is_transformers(tmp_path: object) -> None:
    model = tiny_llama()
    blocks.speed_up(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for (name, found), (_, expected) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(found, expected), name
