"""The preference loss against values worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from stages.rm.loss import preference_loss


def loss(chosen: float, rejected: float, *, p: float = 1.0, margin: float = 0.0, centering: float = 0.0) -> float:
    values = (torch.tensor([value], dtype=torch.float64) for value in (chosen, rejected, p, margin))
    chosen_B, rejected_B, p_B, margin_B = values
    return preference_loss(chosen_B, rejected_B, p_chosen_B=p_B, margin_B=margin_B, centering=centering).item()


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_bradley_terry() -> None:
    assert loss(2.0, 0.5) == pytest.approx(-log_sigmoid(1.5))
    assert loss(0.5, 2.0) == pytest.approx(-log_sigmoid(-1.5))
    assert loss(1.0, 1.0) == pytest.approx(math.log(2))


def test_a_margin_is_taken_off_the_difference() -> None:
    assert loss(2.0, 0.5, margin=1.0) == pytest.approx(-log_sigmoid(0.5))


def test_soft_labels() -> None:
    # p = 0.75, d = 2: 0.75 * 0.126928 + 0.25 * 2.126928 = 0.626928
    assert loss(2.0, 0.0, p=0.75) == pytest.approx(0.626928, abs=1e-6)


def test_soft_label_with_margin_is_least_at_logit_plus_margin() -> None:
    best = math.log(0.75 / 0.25) + 0.5
    here = loss(best, 0.0, p=0.75, margin=0.5)
    assert here == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))  # the label's entropy
    assert here < loss(best + 0.1, 0.0, p=0.75, margin=0.5)
    assert here < loss(best - 0.1, 0.0, p=0.75, margin=0.5)


@pytest.mark.parametrize("p", [1.0, 0.8, 0.5, 0.3, 0.0])
def test_swapping_the_sides_changes_nothing(p: float) -> None:
    assert loss(1.3, 0.4, p=p, margin=0.7, centering=0.1) == pytest.approx(
        loss(0.4, 1.3, p=1 - p, margin=0.7, centering=0.1)
    )


def test_a_tie_has_no_margin() -> None:
    assert loss(1.0, 0.2, p=0.5, margin=3.0) == loss(1.0, 0.2, p=0.5)


def test_centering_pulls_the_sum_to_zero() -> None:
    assert loss(2.0, 1.0, centering=0.1) - loss(2.0, 1.0) == pytest.approx(0.9)
    assert loss(0.5, -0.5, centering=0.1) == pytest.approx(loss(0.5, -0.5))


def test_great_differences_stay_finite() -> None:
    assert loss(1e4, 0.0) == 0.0
    assert loss(0.0, 1e4) == pytest.approx(1e4)


def test_gradient_raises_chosen_and_lowers_rejected() -> None:
    chosen_B, rejected_B = (torch.zeros(1, requires_grad=True) for _ in range(2))
    one: Tensor = torch.ones(1)
    preference_loss(chosen_B, rejected_B, p_chosen_B=one, margin_B=0 * one, centering=0.0).sum().backward()
    assert chosen_B.grad.item() == pytest.approx(-0.5)
    assert rejected_B.grad.item() == pytest.approx(0.5)
