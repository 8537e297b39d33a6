"""The LoRA layer against peft's own arithmetic: outputs, gradients, switching."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from stages.core.lora import FastLinear, speed_up

RANK, INPUTS, OUTPUTS = 3, 6, 5


class TwoLayers(nn.Module):
    """Two linear layers, the first with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, OUTPUTS)
        self.second = nn.Linear(OUTPUTS, INPUTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Both layers, a kink between them."""
        return self.second(torch.tanh(self.first(x)))


def models(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """The same two adapters on the same base: peft's arithmetic, and ours. Adapter `one` is active."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=7, target_modules=["first", "second"], lora_dropout=dropout)
    theirs = get_peft_model(TwoLayers().to(dtype), config, adapter_name="one", autocast_adapter_dtype=True)
    theirs.add_adapter("two", config)
    for name, parameter in theirs.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.3)
    ours = copy.deepcopy(theirs)
    assert len(speed_up(ours)) == 2
    return theirs, ours


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    (out.float() * torch.arange(out.numel()).view(out.shape).sin()).sum().backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert x.grad is not None
    return found | {"x": x.grad, "out": out.detach()}


def test_output_and_gradients_are_pefts() -> None:
    theirs, ours = models()
    x = torch.randn(2, 4, INPUTS)
    expected, found = gradients(theirs, x), gradients(ours, x)
    assert expected.keys() == found.keys()
    assert sum("lora" in name for name in found) == 4
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_in_bfloat16_the_adapter_keeps_float32_gradients() -> None:
    theirs, ours = models(torch.bfloat16)
    x = torch.randn(2, 4, INPUTS, dtype=torch.bfloat16)
    expected, found = gradients(theirs, x), gradients(ours, x)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        # bfloat16 has 8 bits: rounding of 2^-8 relative to the largest entry, a few of them in a row.
        assert float((found[name] - value).abs().max()) <= 0.03 * float(value.abs().max()), name


def test_each_adapter_and_none_run_as_in_peft() -> None:
    theirs, ours = models()
    x = torch.randn(3, INPUTS)
    outputs = []
    for adapter in ("one", "two"):
        theirs.set_adapter(adapter)
        ours.set_adapter(adapter)
        outputs.append(ours(x))
        torch.testing.assert_close(outputs[-1], theirs(x))
    with theirs.disable_adapter(), ours.disable_adapter():
        outputs.append(ours(x))
        torch.testing.assert_close(outputs[-1], theirs(x))
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def test_dropout_is_pefts_in_training_and_absent_in_evaluation() -> None:
    theirs, ours = models(dropout=0.5)
    x = torch.randn(3, INPUTS)
    torch.manual_seed(1)
    expected = theirs.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(ours.train()(x), expected)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_dora_keeps_pefts_arithmetic() -> None:
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["first"], use_dora=True))
    assert speed_up(model) == []
    assert any(type(each) is Linear for each in model.modules())
    assert not any(isinstance(each, FastLinear) for each in model.modules())
