"""Log-probabilities of chosen tokens: by hand, against the full distribution, and in chunks."""

import math

import pytest
import torch
from torch import Tensor, nn

from stages.core import logprobs
from stages.core.logprobs import token_logprobs


def head_of(weights_VD: Tensor) -> nn.Linear:
    head = nn.Linear(weights_VD.shape[1], weights_VD.shape[0], bias=False, dtype=weights_VD.dtype)
    head.weight = nn.Parameter(weights_VD.clone())
    return head


def test_logprobs_by_hand() -> None:
    # logits are hidden * [0, ln 2, ln 5]: at hidden 1 the probabilities are 1/8, 2/8, 5/8
    head = head_of(torch.tensor([[0.0], [math.log(2)], [math.log(5)]]))
    result = token_logprobs(torch.ones(3, 1), head, torch.tensor([0, 1, 2]), 1.0)
    torch.testing.assert_close(result.exp(), torch.tensor([1 / 8, 2 / 8, 5 / 8]))


def test_temperature_divides_the_logits() -> None:
    # at temperature 1/2 the logits double: probabilities 1, 4, 25 of 30
    head = head_of(torch.tensor([[0.0], [math.log(2)], [math.log(5)]]))
    result = token_logprobs(torch.ones(3, 1), head, torch.tensor([0, 1, 2]), 0.5)
    torch.testing.assert_close(result.exp(), torch.tensor([1 / 30, 4 / 30, 25 / 30]))


@pytest.mark.parametrize("rows", [1, 3, 5, 10, 11])
def test_chunks_change_neither_values_nor_gradients(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    torch.manual_seed(0)
    vocabulary, temperature = 17, 0.7
    weights_VD, hidden_MD = torch.randn(vocabulary, 6), torch.randn(10, 6)
    targets_M, weights_M = torch.randint(0, vocabulary, (10,)), torch.randn(10)

    def by_definition(hidden: Tensor, head: nn.Linear) -> Tensor:
        return (head(hidden) / temperature).log_softmax(1)[torch.arange(10), targets_M]

    def run(compute: object) -> tuple[Tensor, Tensor | None, Tensor | None]:
        hidden, head = hidden_MD.clone().requires_grad_(True), head_of(weights_VD)
        values = compute(hidden, head)  # type: ignore[operator]
        (values * weights_M).sum().backward()
        return values.detach(), hidden.grad, head.weight.grad

    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", rows * vocabulary)
    ours = run(lambda hidden, head: token_logprobs(hidden, head, targets_M, temperature))
    for mine, expected in zip(ours, run(by_definition), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_head_gives_float32() -> None:
    head = head_of(torch.randn(9, 4)).to(torch.bfloat16)
    result = token_logprobs(torch.randn(2, 4, dtype=torch.bfloat16), head, torch.tensor([1, 2]), 1.0)
    assert result.dtype == torch.float32
