"""PPO's losses, value and gradient by hand on both sides of the clip for both signs of the advantage."""

import math

import pytest
import torch
from torch import Tensor

from stages.core.ops import kl_estimate
from stages.ppo.loss import policy_loss, value_loss

CLIP = 0.2


def policy_value_and_gradient(ratio: float, advantage: float, **options: float) -> tuple[float, float]:
    """The loss of one token whose ratio is `ratio`, and its derivative by the new log-probability."""
    old = torch.tensor([-1.5], dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_(True)
    loss = policy_loss(new, old, torch.tensor([advantage], dtype=torch.float64), CLIP, **options)
    loss.backward()
    assert new.grad is not None
    return loss.item(), new.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # unclipped: loss = -ratio * A, and d ratio / d logprob = ratio
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.1, -2.0, 2.2, 2.2),
        # ratio above 1 + e: a good token gains no more; a bad one is still pushed down
        (1.5, 2.0, -2.4, 0.0),
        (1.5, -2.0, 3.0, 3.0),
        # ratio below 1 - e: a good token is still pushed up; a bad one has lost enough
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_policy_loss_clips_only_what_would_move_further(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    assert policy_value_and_gradient(ratio, advantage) == pytest.approx((loss, gradient), abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # e = 0.2 below, 0.5 above: a good token gains up to a ratio of 1.5
        (1.4, 2.0, -2.8, -2.8),
        (1.6, 2.0, -3.0, 0.0),
        # below, and for bad tokens, nothing changed
        (0.5, 2.0, -1.0, -1.0),
        (1.6, -2.0, 3.2, 3.2),
        (0.5, -2.0, 1.6, 0.0),
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_clip_higher_frees_the_upper_side_only(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    result = policy_value_and_gradient(ratio, advantage, clip_range_high=0.5)
    assert result == pytest.approx((loss, gradient), abs=1e-12)


def test_the_upper_side_may_be_the_narrower_one() -> None:
    assert policy_value_and_gradient(1.1, 2.0, clip_range_high=0.05) == pytest.approx((-2.1, 0.0), abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # c = 3: the loss of a bad token is at most 3 * |A| = 6, and then has no gradient
        (4.0, -2.0, 6.0, 0.0),
        (2.5, -2.0, 5.0, 5.0),
        (1.0, -2.0, 2.0, 2.0),
        (0.5, -2.0, 1.6, 0.0),
        # good tokens are untouched: c * A would be above every objective, and must not replace it
        (4.0, 2.0, -2.4, 0.0),
        (1.1, 2.0, -2.2, -2.2),
        (0.1, 2.0, -0.2, -0.2),
    ],
)
def test_dual_clip_bounds_the_loss_of_bad_tokens_only(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    result = policy_value_and_gradient(ratio, advantage, dual_clip=3.0)
    assert result == pytest.approx((loss, gradient), abs=1e-12)


def test_dual_clip_decides_token_by_token() -> None:
    old, ratios = torch.zeros(3), torch.tensor([5.0, 5.0, 0.9])
    advantages = torch.tensor([-1.0, 1.0, -1.0])
    # 2 * 1 (bounded), -1.2 (clipped), 0.9 (as it is)
    total = policy_loss(ratios.log(), old, advantages, CLIP, dual_clip=2.0)
    assert total.item() == pytest.approx(2.0 - 1.2 + 0.9, abs=1e-6)


def test_policy_loss_is_a_sum_over_tokens() -> None:
    new, old = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.0, -3.0])
    assert policy_loss(new, old, torch.tensor([1.0, 2.0, -4.0]), CLIP).item() == 1.0  # -(1 + 2 - 4)


def test_policy_gradient_at_ratio_one_is_reinforce() -> None:
    torch.manual_seed(0)
    logits_V = torch.randn(5, dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([0.7], dtype=torch.float64)
    logprob = logits_V.log_softmax(0)[2:3]
    policy_loss(logprob, logprob.detach(), advantage, CLIP).backward()
    # d log softmax_2 / d logits = onehot_2 - softmax
    expected = -0.7 * (torch.eye(5, dtype=torch.float64)[2] - logits_V.detach().softmax(0))
    torch.testing.assert_close(logits_V.grad, expected, rtol=1e-12, atol=1e-12)


def value_and_gradient(
    new_value: float, value: float, target: float, clip_range: float | None = CLIP
) -> tuple[float, float]:
    new = torch.tensor([new_value], dtype=torch.float64, requires_grad=True)
    loss = value_loss(new, *(torch.tensor([each], dtype=torch.float64) for each in (value, target)), clip_range)
    loss.backward()
    assert new.grad is not None
    return loss.item(), new.grad.item()


@pytest.mark.parametrize(
    ("new_value", "value", "target", "loss", "gradient"),
    [
        # within the clip range: half the squared error
        (1.1, 1.0, 2.0, 0.405, -0.9),  # 0.9^2 / 2
        (1.1, 1.0, 0.0, 0.605, 1.1),
        # moved up by more than 0.2 towards the target: the clipped error (1.2 - 2) is the larger, no gradient
        (1.5, 1.0, 2.0, 0.32, 0.0),
        # moved up by more than 0.2 away from the target: the plain error is the larger, pulled back
        (1.5, 1.0, 0.0, 1.125, 1.5),
        # moved down by more than 0.2 towards the target: (0.8 - 0), no gradient
        (0.5, 1.0, 0.0, 0.32, 0.0),
        # moved down by more than 0.2 away from the target: (0.5 - 2)^2 / 2, pulled back
        (0.5, 1.0, 2.0, 1.125, -1.5),
    ],
)
def test_value_loss_clips_only_what_would_move_further(
    new_value: float, value: float, target: float, loss: float, gradient: float
) -> None:
    assert value_and_gradient(new_value, value, target) == pytest.approx((loss, gradient), abs=1e-12)


@pytest.mark.parametrize(
    ("new_value", "target", "loss", "gradient"),
    [(1.5, 2.0, 0.125, -0.5), (1.5, 0.0, 1.125, 1.5), (0.5, 0.0, 0.125, 0.5)],
)
def test_without_a_clip_range_values_move_freely(new_value: float, target: float, loss: float, gradient: float) -> None:
    assert value_and_gradient(new_value, 1.0, target, None) == pytest.approx((loss, gradient), abs=1e-12)


def test_value_loss_is_half_the_sum_over_tokens() -> None:
    values, returns = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 5.0])
    assert value_loss(values, values, returns, CLIP).item() == 5.0  # (1 + 9) / 2


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_no_tokens_cost_nothing(loss: object) -> None:
    nothing: Tensor = torch.empty(0, requires_grad=True)
    total = loss(nothing, nothing.detach(), nothing.detach(), CLIP)  # type: ignore[operator]
    total.backward()
    assert total.item() == 0.0


def test_what_each_kl_estimator_pulls_towards_in_the_loss() -> None:
    """The policy's expectation of d estimate / d logits: nothing for k1, KL(pi || ref) for k2, KL(ref || pi) for k3."""
    torch.manual_seed(0)
    logits_V = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ref_V = torch.randn(5, dtype=torch.float64).log_softmax(0)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits_V)[0]

    def expected(estimator: str) -> Tensor:
        policy_V = logits_V.log_softmax(0)
        return gradient((policy_V.detach().exp() * kl_estimate(policy_V, ref_V, estimator)).sum())

    policy_V = logits_V.log_softmax(0)
    torch.testing.assert_close(expected("k1"), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(expected("k2"), gradient((policy_V.exp() * (policy_V - ref_V)).sum()))
    policy_V = logits_V.log_softmax(0)
    torch.testing.assert_close(expected("k3"), gradient((ref_V.exp() * (ref_V - policy_V)).sum()))
