"""Linear layers that share an input, against the plain expression and autograd's gradients of it."""

import pytest
import torch
from torch import Tensor

from stages.core import products
from stages.core.products import PackedLinears, Part, project, project_back

INPUTS = 12
FEW, MANY = 5, 40  # below and above the inputs: beside the weights, and folded into copies of them


def _parts() -> list[Part]:
    """A LoRA layer, one with a bias and another rank and scale, and one without an adapter."""
    torch.manual_seed(0)
    first = Part(torch.randn(7, INPUTS), None, torch.randn(2, INPUTS), torch.randn(7, 2), 0.5)
    second = Part(torch.randn(9, INPUTS), torch.randn(9), torch.randn(3, INPUTS), torch.randn(9, 3), 2.0)
    return [first, second, Part(torch.randn(4, INPUTS), torch.randn(4))]


def _plain(x_NI: Tensor, part: Part) -> Tensor:
    out_NO = x_NI @ part.weight_OI.T
    if part.bias_O is not None:
        out_NO = out_NO + part.bias_O
    if part.low_rI is not None and part.high_Or is not None:
        out_NO = out_NO + part.scaling * (x_NI @ part.low_rI.T) @ part.high_Or.T
    return out_NO


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_outputs_are_those_of_the_plain_expression(tokens: int) -> None:
    parts, x_NI = _parts(), torch.randn(tokens, INPUTS)
    outs, low_NR = project(x_NI, parts)
    for out_NO, part in zip(outs, parts, strict=True):
        torch.testing.assert_close(out_NO, _plain(x_NI, part), rtol=1e-5, atol=1e-5)
    # Many tokens need x A' for no output.
    assert (low_NR is None) == (tokens == MANY)


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_gradients_are_those_of_autograd(tokens: int) -> None:
    parts, x_NI = _parts(), torch.randn(tokens, INPUTS)
    leaves = [None if each is None else each.clone().requires_grad_() for part in parts for each in part.tensors]
    x_leaf = x_NI.clone().requires_grad_()
    grads = [torch.randn(tokens, len(part.weight_OI)) for part in parts]
    remade = [Part(*leaves[4 * place : 4 * place + 4], part.scaling) for place, part in enumerate(parts)]  # type: ignore[arg-type]
    torch.autograd.backward([_plain(x_leaf, part) for part in remade], grads)

    _, low_NR = project(x_NI, parts)
    grad_x, found = project_back(x_NI, low_NR, grads, parts, [True] * 12, input_needed=True)
    torch.testing.assert_close(grad_x, x_leaf.grad, rtol=1e-5, atol=1e-4)
    for own, leaf in zip(found, leaves, strict=True):
        assert (own is None) == (leaf is None)
        if own is not None and leaf is not None:
            torch.testing.assert_close(own, leaf.grad, rtol=1e-5, atol=1e-4)


def test_bfloat16_is_never_folded() -> None:
    x_NI = torch.randn(MANY, INPUTS, dtype=torch.bfloat16)
    parts = [part._replace(weight_OI=part.weight_OI.bfloat16(), bias_O=None) for part in _parts()]
    _, low_NR = project(x_NI, parts)
    assert low_NR is not None
    assert low_NR.shape == (MANY, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_onednn", [True, False])
@pytest.mark.parametrize("is_large", [True, False])
def test_a_group_side_by_side_gives_the_outputs_of_its_parts(
    dtype: torch.dtype, has_onednn: bool, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where oneDNN lays the weights out, and where there is none, or none for this dtype on this CPU, or no need."""
    if not has_onednn:
        monkeypatch.setattr(products, "onednn_takes", lambda _: False)
    monkeypatch.setattr(products, "LAID_OUT", 1 if is_large else 2**30)
    parts, x_NI = _parts(), torch.randn(FEW, INPUTS)
    lowered = [part._replace(weight_OI=part.weight_OI.to(dtype), bias_O=None) for part in parts]
    group = PackedLinears(lowered)
    pays = is_large or dtype == torch.bfloat16  # which is slow by any other way
    assert group.is_laid_out == (has_onednn and products.onednn_takes(dtype) and pays)
    expected_NP = torch.cat([_plain(x_NI, part._replace(bias_O=None)) for part in parts], 1)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.2}
    torch.testing.assert_close(group(x_NI).float(), expected_NP, **tolerance)
    onto_NP = torch.randn(expected_NP.shape)
    before_NP = onto_NP.to(dtype)
    torch.testing.assert_close(group(x_NI, before_NP).float(), expected_NP + onto_NP, **tolerance)
    assert torch.equal(before_NP, onto_NP.to(dtype))
