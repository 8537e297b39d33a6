"""The numerical pieces of RLHF, against numbers worked out by hand."""

import math

import pytest
import torch

from stages.core.ops import explained_variance, kl_estimate, masked_mean, masked_whiten

NAN = float("nan")
VALUES = torch.tensor([[1.0, 2.0, 0.0], [6.0, 0.0, 0.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])
NOTHING = torch.zeros_like(MASK)


def with_garbage(values: torch.Tensor, garbage: float, mask: torch.Tensor = MASK) -> torch.Tensor:
    """`values` with `garbage` wherever the mask is False."""
    return torch.where(mask, values, garbage)


def test_masked_mean_counts_true_positions_only() -> None:
    assert masked_mean(VALUES, MASK).item() == 3.0  # (1 + 2 + 6) / 3


def test_masked_mean_of_nothing_is_zero() -> None:
    assert masked_mean(with_garbage(VALUES, NAN, NOTHING), NOTHING).item() == 0.0


def test_masked_whiten_removes_the_mean_and_divides_by_the_unbiased_deviation() -> None:
    # mean 3, squared differences 4 + 1 + 9 = 14, variance 14 / (3 - 1) = 7
    whitened = masked_whiten(VALUES, MASK)
    expected = torch.tensor([[-2.0, -1.0, 0.0], [3.0, 0.0, 0.0]]) / math.sqrt(7)
    torch.testing.assert_close(whitened, expected, rtol=1e-6, atol=1e-7)


def test_masked_whiten_matches_torch_statistics_of_the_kept_values() -> None:
    torch.manual_seed(0)
    values, mask = torch.randn(5, 7, dtype=torch.float64) * 3 + 2, torch.rand(5, 7) < 0.6
    kept = masked_whiten(values, mask)[mask]
    assert kept.mean().item() == pytest.approx(0, abs=1e-12)
    assert kept.std().item() == pytest.approx(1, abs=1e-8)


def test_masked_whiten_of_one_value_or_none_is_zero() -> None:
    one = torch.tensor([[True, False, False], [False, False, False]])
    assert torch.equal(masked_whiten(VALUES, one), torch.zeros(2, 3))
    assert torch.equal(masked_whiten(with_garbage(VALUES, NAN, NOTHING), NOTHING), torch.zeros(2, 3))


def test_masked_whiten_of_equal_values_is_zero() -> None:
    assert torch.equal(masked_whiten(torch.full((2, 3), 0.7), MASK), torch.zeros(2, 3))


@pytest.mark.parametrize("garbage", [NAN, math.inf, -1e30])
def test_masked_positions_change_nothing_bit_for_bit(garbage: float) -> None:
    dirty = with_garbage(VALUES, garbage)
    assert torch.equal(masked_mean(dirty, MASK), masked_mean(VALUES, MASK))
    assert torch.equal(masked_whiten(dirty, MASK), masked_whiten(VALUES, MASK))
    assert torch.equal(
        explained_variance(dirty, with_garbage(VALUES + 1, garbage), MASK),
        explained_variance(VALUES, VALUES + 1, MASK),
    )


@pytest.mark.parametrize("garbage", [NAN, math.inf])
def test_masked_positions_get_no_gradient_and_change_none(garbage: float) -> None:
    def gradient(values: torch.Tensor) -> torch.Tensor:
        leaf = values.clone().requires_grad_(True)
        (
            masked_mean(leaf, MASK) + masked_whiten(leaf, MASK).square().sum() + masked_whiten(leaf, MASK)[0, 0]
        ).backward()
        assert leaf.grad is not None
        return leaf.grad

    clean = gradient(VALUES)
    assert torch.equal(gradient(with_garbage(VALUES, garbage)), clean)
    assert torch.equal(clean[~MASK], torch.zeros(3))


def test_kl_estimators_by_hand() -> None:
    # d = log pi - log pi_ref = [ln 2, -ln 2]; k3 = exp(-d) - 1 + d = [1/2 - 1 + ln 2, 2 - 1 - ln 2]
    logprobs, ref_logprobs = torch.tensor([math.log(0.5), math.log(0.2)]), torch.tensor([math.log(0.25), math.log(0.4)])
    two = math.log(2)
    expected = {"k1": [two, -two], "k2": [two**2 / 2] * 2, "k3": [two - 0.5, 1 - two]}
    for estimator, values in expected.items():
        torch.testing.assert_close(kl_estimate(logprobs, ref_logprobs, estimator), torch.tensor(values))


def test_kl_estimators_average_to_the_kl_divergence() -> None:
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    exact = 0.7 * math.log(0.7 / 0.5) + 0.1 * math.log(0.1 / 0.3)
    for estimator in ("k1", "k3"):
        expectation = (policy * kl_estimate(policy.log(), reference.log(), estimator)).sum().item()
        assert expectation == pytest.approx(exact, abs=1e-12)


def test_k2_and_k3_are_never_negative_and_every_estimator_is_zero_at_equality() -> None:
    torch.manual_seed(0)
    logprobs, ref_logprobs = -torch.rand(1000) * 10, -torch.rand(1000) * 10
    for estimator in ("k1", "k2", "k3"):
        assert torch.equal(kl_estimate(logprobs, logprobs, estimator), torch.zeros(1000))
    for estimator in ("k2", "k3"):
        assert (kl_estimate(logprobs, ref_logprobs, estimator) >= 0).all()


def test_an_unknown_kl_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_explained_variance_by_hand() -> None:
    # returns 1, 2, 6: variance 14/3. values 1, 3, 5: residuals 0, -1, 1, variance 2/3. 1 - 2/14 = 6/7
    values = torch.tensor([[1.0, 3.0, 9.0], [5.0, 9.0, 9.0]])
    assert explained_variance(values, VALUES, MASK).item() == pytest.approx(6 / 7)
    assert explained_variance(VALUES, VALUES, MASK).item() == 1.0
    assert explained_variance(torch.full((2, 3), 4.0), VALUES, MASK).item() == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(with_garbage(VALUES, NAN, NOTHING), VALUES, NOTHING).item() == 0.0
