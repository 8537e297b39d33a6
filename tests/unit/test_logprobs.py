"""Log-probabilities of chosen tokens, and entropies: by hand, against the full distribution, and in chunks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.core import logprobs
from stages.core.logprobs import token_logprobs, token_logprobs_and_entropy
from tests.largest import Largest


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
@pytest.mark.parametrize("head_trains", [True, False])
def test_chunks_change_neither_values_nor_gradients(
    monkeypatch: pytest.MonkeyPatch, rows: int, head_trains: bool
) -> None:
    torch.manual_seed(0)
    vocabulary, temperature = 17, 0.7
    weights_VD, hidden_MD = torch.randn(vocabulary, 6), torch.randn(10, 6)
    targets_M, weights_M = torch.randint(0, vocabulary, (10,)), torch.randn(10)

    def by_definition(hidden: Tensor, head: nn.Linear) -> Tensor:
        return (head(hidden) / temperature).log_softmax(1)[torch.arange(10), targets_M]

    def run(compute: object) -> tuple[Tensor, Tensor | None, Tensor | None]:
        hidden, head = hidden_MD.clone().requires_grad_(True), head_of(weights_VD).requires_grad_(head_trains)
        values = compute(hidden, head)  # type: ignore[operator]
        (values * weights_M).sum().backward()
        return values.detach(), hidden.grad, head.weight.grad

    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", {"cpu": rows * vocabulary})
    ours = run(lambda hidden, head: token_logprobs(hidden, head, targets_M, temperature))
    for mine, expected in zip(ours, run(by_definition), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_trains", [True, False])
def test_a_head_may_have_a_bias(head_trains: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 17).requires_grad_(head_trains)
    hidden_MD, targets_M = torch.randn(10, 6, requires_grad=True), torch.randint(0, 17, (10,))
    wanted = [hidden_MD, head.weight, head.bias] if head_trains else [hidden_MD]
    ours_M = token_logprobs(hidden_MD, head, targets_M, 1.0)
    dense_M = head(hidden_MD).log_softmax(1)[torch.arange(10), targets_M]
    torch.testing.assert_close(ours_M, dense_M)
    weights_M = torch.randn(10)
    expected = torch.autograd.grad((dense_M * weights_M).sum(), wanted)
    for mine, theirs in zip(torch.autograd.grad((ours_M * weights_M).sum(), wanted), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_head_gives_float32() -> None:
    head = head_of(torch.randn(9, 4)).to(torch.bfloat16)
    result = token_logprobs(torch.randn(2, 4, dtype=torch.bfloat16), head, torch.tensor([1, 2]), 1.0)
    assert result.dtype == torch.float32


def test_entropy_by_hand() -> None:
    # at temperature 1/2 the probabilities are 1/30, 4/30, 25/30 wherever hidden is 1, and 1/3 each where it is 0
    head = head_of(torch.tensor([[0.0], [math.log(2)], [math.log(5)]]))
    hidden_MD = torch.tensor([[1.0], [0.0]])
    logprobs_M, entropy_M = token_logprobs_and_entropy(hidden_MD, head, torch.tensor([2, 0]), 0.5)
    skewed = -sum(share * math.log(share) for share in (1 / 30, 4 / 30, 25 / 30))
    torch.testing.assert_close(entropy_M, torch.tensor([skewed, math.log(3)]))
    torch.testing.assert_close(logprobs_M.exp(), torch.tensor([25 / 30, 1 / 3]))


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_entropy_has_the_gradient_of_the_dense_definition(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    torch.manual_seed(0)
    vocabulary, temperature = 17, 0.7
    weights_VD, hidden_MD = torch.randn(vocabulary, 6), torch.randn(10, 6)
    targets_M, weights_M2 = torch.randint(0, vocabulary, (10,)), torch.randn(10, 2)

    def dense(hidden: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
        probabilities = torch.exp(head(hidden) / temperature)
        probabilities = probabilities / probabilities.sum(1, keepdim=True)
        return probabilities[torch.arange(10), targets_M].log(), torch.distributions.Categorical(
            probabilities
        ).entropy()

    def run(compute: object) -> tuple[Tensor | None, ...]:
        hidden, head = hidden_MD.clone().requires_grad_(True), head_of(weights_VD)
        values_M2 = torch.stack(compute(hidden, head), dim=1)  # type: ignore[operator]
        (values_M2 * weights_M2).sum().backward()
        return values_M2.detach(), hidden.grad, head.weight.grad

    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", {"cpu": rows * vocabulary})
    ours = run(lambda hidden, head: token_logprobs_and_entropy(hidden, head, targets_M, temperature))
    for mine, expected in zip(ours, run(dense), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compute", [token_logprobs, token_logprobs_and_entropy])
@pytest.mark.parametrize("gradients", [False, True])
def test_no_tensor_exceeds_a_chunk(monkeypatch: pytest.MonkeyPatch, compute: Any, gradients: bool) -> None:
    """In the update and in scoring alike: 50 tokens of a vocabulary of 100 in chunks of 7."""
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", {"cpu": 700})
    head, hidden_MD = head_of(torch.randn(100, 2)), torch.randn(50, 2, requires_grad=True)
    with Largest() as largest, torch.set_grad_enabled(gradients):
        result = compute(hidden_MD, head, torch.zeros(50, dtype=torch.long), 1.0)
        if gradients:
            sum(each.sum() for each in (result if isinstance(result, tuple) else [result])).backward()
    assert largest.numel == 700
