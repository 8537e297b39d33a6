"""DPO's loss against values worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from stages.dpo.loss import LogRatios, dpo_loss, label_probability


def tensor(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def loss(
    chosen: float,
    rejected: float,
    *,
    kind: str = "sigmoid",
    beta: float = 0.5,
    label: float = 1.0,
    lengths: tuple[float, float] = (1.0, 1.0),
) -> float:
    ratios = LogRatios(tensor(chosen), tensor(rejected))
    lengths_2B = (tensor(lengths[0]), tensor(lengths[1]))
    return dpo_loss(ratios, lengths_2B, kind=kind, beta=beta, label_B=tensor(label)).item()  # type: ignore[arg-type]


def label(p: float, *, smoothing: float, robust: bool = False) -> float:
    return label_probability(tensor(p), label_smoothing=smoothing, robust=robust).item()


def test_sigmoid() -> None:
    # beta d = 0.5 x (3 - 1) = 1; -log sigmoid(1) = log(1 + e^-1) = 0.313262
    assert loss(3.0, 1.0) == pytest.approx(0.313262, abs=1e-6)
    assert loss(1.0, 3.0) == pytest.approx(1.313262, abs=1e-6)
    assert loss(-2.0, -2.0) == pytest.approx(math.log(2))
    assert loss(3.0, 1.0, lengths=(4.0, 9.0)) == loss(3.0, 1.0)  # sums over tokens, not means


def test_a_soft_label_weighs_both_ways_round() -> None:
    # 0.75 x 0.313262 + 0.25 x 1.313262
    assert loss(3.0, 1.0, label=0.75) == pytest.approx(0.563262, abs=1e-6)


def test_the_soft_loss_is_least_where_the_policy_agrees_with_the_label() -> None:
    best = math.log(0.75 / 0.25) / 0.5  # beta d = logit(0.75)
    here = loss(best, 0.0, label=0.75)
    assert here == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))  # the label's entropy
    assert here < min(loss(best + 0.1, 0.0, label=0.75), loss(best - 0.1, 0.0, label=0.75))


def test_ipo_asks_for_a_margin_a_token() -> None:
    # chosen 4 nats over 2 tokens, rejected -3 over 3: d = 2 - (-1) = 3; the target is 1 / (2 x 0.25) = 2
    values = {"kind": "ipo", "beta": 0.25, "lengths": (2.0, 3.0)}
    assert loss(4.0, -3.0, **values) == pytest.approx(1.0)
    assert loss(4.0, -3.0, **values, label=0.0) == pytest.approx(25.0)
    assert loss(4.0, -3.0, **values, label=0.75) == pytest.approx(7.0)
    assert loss(2.0, -3.0, **values) == pytest.approx(0.0)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
@pytest.mark.parametrize("q", [1.0, 0.8, 0.5, 0.0, 4 / 3])
def test_swapping_the_sides_changes_nothing(kind: str, q: float) -> None:
    there = loss(1.3, 0.4, kind=kind, label=q, lengths=(2.0, 5.0))
    assert there == pytest.approx(loss(0.4, 1.3, kind=kind, label=1 - q, lengths=(5.0, 2.0)))


def test_smoothing_moves_a_label_towards_a_tie() -> None:
    assert label(1.0, smoothing=0.1) == pytest.approx(0.9)
    assert label(0.7, smoothing=0.1) == pytest.approx(0.7 * 0.9 + 0.3 * 0.1)
    assert label(0.5, smoothing=0.1) == pytest.approx(0.5)
    assert label(0.7, smoothing=0.0) == pytest.approx(0.7)


def test_robust_moves_it_away() -> None:
    assert label(1.0, smoothing=0.2, robust=True) == pytest.approx(0.8 / 0.6)
    assert label(0.5, smoothing=0.2, robust=True) == pytest.approx(0.5)


@pytest.mark.parametrize("d", [-1.5, 0.0, 0.7])
def test_robust_is_the_clean_loss_in_the_mean_over_wrong_labels(d: float) -> None:
    right, wrong = (label(p, smoothing=0.2, robust=True) for p in (1.0, 0.0))
    mean = 0.8 * loss(d, 0.0, label=right) + 0.2 * loss(d, 0.0, label=wrong)
    assert mean == pytest.approx(loss(d, 0.0))
