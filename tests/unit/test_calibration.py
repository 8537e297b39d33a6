"""The reward model's diagnostics against values worked by hand."""

import math

import pytest

from stages.core.calibration import (
    JudgedPair,
    correlation,
    expected_calibration_error,
    reward_figures,
    wilson_interval,
)


def pair(difference: float, *, chosen_tokens: int = 10, rejected_tokens: int = 10, p_chosen: float = 1.0) -> JudgedPair:
    return JudgedPair(difference, 0.0, chosen_tokens, rejected_tokens, p_chosen)


def test_wilson_interval_of_eight_in_ten() -> None:
    # z^2 = 3.8415; centre = (0.8 + 0.19207) / 1.38415 = 0.71674;
    # half = 1.95996 * sqrt(0.016 + 0.0096036) / 1.38415 = 0.22657
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.49016, abs=2e-5)
    assert high == pytest.approx(0.94331, abs=2e-5)


def test_wilson_interval_stays_within_zero_and_one() -> None:
    low, high = wilson_interval(0, 5)
    assert low == pytest.approx(0.0, abs=1e-12)
    assert high == pytest.approx(3.8415 / (5 + 3.8415), abs=1e-4)  # z^2 / (n + z^2)
    assert wilson_interval(5, 5)[1] == pytest.approx(1.0)


def test_calibration_error_of_two_bins() -> None:
    # sigmoid(ln 3) = 0.75 falls into bin 5 of ten over [0.5, 1]: three of four right, gap 0.
    # sigmoid(ln 9) = 0.9 falls into bin 8 (8.0 in floats or just below): one of two right, gap 0.4.
    third, ninth = math.log(3) + 1e-6, math.log(9) + 1e-6
    differences = [third, third, third, -third, ninth, -ninth]
    assert expected_calibration_error(differences, [1.0] * 6) == pytest.approx(2 / 6 * 0.4, abs=1e-5)


def test_calibration_error_does_not_depend_on_which_side_comes_first() -> None:
    assert expected_calibration_error([2.0, -1.0], [1.0, 0.0]) == expected_calibration_error([-2.0, 1.0], [0.0, 1.0])


def test_calibration_error_with_soft_labels() -> None:
    # Confidence 0.75 in chosen, which is better with probability 0.75: calibrated. In rejected: truth 0.25, gap 0.5.
    assert expected_calibration_error([math.log(3)], [0.75]) == pytest.approx(0.0, abs=1e-9)
    assert expected_calibration_error([-math.log(3)], [0.75]) == pytest.approx(0.5)


def test_calibration_error_of_great_differences_is_finite() -> None:
    assert expected_calibration_error([800.0, -800.0], [1.0, 1.0]) == pytest.approx(0.5)


def test_accuracy_counts_ties_half() -> None:
    figures = reward_figures([pair(1.0), pair(2.0), pair(0.0), pair(-1.0)])
    assert figures["accuracy"] == pytest.approx(2.5 / 4)
    assert (figures["accuracy_low"], figures["accuracy_high"]) == pytest.approx(wilson_interval(2.5, 4))


def test_soft_labels_turn_the_better_side() -> None:
    # Probability 0.2: rejected is the likelier side, so a negative difference is right; 0.5 has no right answer.
    figures = reward_figures([pair(-1.0, p_chosen=0.2), pair(1.0, p_chosen=0.2), pair(1.0, p_chosen=0.5)])
    assert figures["accuracy"] == pytest.approx(0.5)


def test_accuracy_by_length() -> None:
    figures = reward_figures(
        [
            pair(1.0, chosen_tokens=20, rejected_tokens=10),
            pair(-1.0, chosen_tokens=20, rejected_tokens=10),
            pair(-1.0, chosen_tokens=10, rejected_tokens=20),
            pair(1.0, chosen_tokens=19, rejected_tokens=20),  # within a tenth of 20
            pair(-1.0, chosen_tokens=10, rejected_tokens=20, p_chosen=0.1),  # the better side is the longer, rejected
        ]
    )
    assert figures["accuracy_longer"] == pytest.approx(2 / 3)
    assert figures["pairs_longer"] == 3
    assert figures["accuracy_similar"] == 1.0
    assert figures["accuracy_shorter"] == 0.0


def test_scores_mean_spread_and_correlation_with_length() -> None:
    pairs = [JudgedPair(3.0, 1.0, 30, 10), JudgedPair(2.0, 2.0, 20, 20)]
    figures = reward_figures(pairs)
    assert figures["score_mean"] == 2.0
    assert figures["score_std"] == pytest.approx(math.sqrt(0.5))  # deviations 1, -1, 0, 0
    assert figures["margin_mean"] == 1.0
    assert figures["score_length_correlation"] == pytest.approx(1.0)


def test_correlation_by_hand() -> None:
    # deviations -1 0 1 and -1 1 0: covariance sum 1, squares 2 and 2
    assert correlation([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]) == pytest.approx(0.5)
    assert correlation([1.0, 1.0], [1.0, 2.0]) is None
    assert correlation([1.0], [1.0]) is None
