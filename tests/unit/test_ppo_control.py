"""The KL controller and the score shaper, step by step by hand."""

import math
import statistics

import pytest

from stages.ppo.config import KlConfig, ScoreConfig
from stages.ppo.control import KlController, ScoreShaper


def test_a_fixed_coefficient_stays() -> None:
    controller = KlController(KlConfig(coef=0.05), 0.05)
    for kl in (0.0, 5.0, 1000.0, -3.0):
        controller.update(kl)
    assert controller.coef == 0.05


@pytest.mark.parametrize(
    ("kl", "coef"),
    [
        (4.0, 0.1),  # on target: unchanged
        (4.4, 0.102),  # 10 % above: 0.1 * (1 + 0.2 * 0.1)
        (3.6, 0.098),  # 10 % below
        (400.0, 0.104),  # the error is clipped to +0.2: 0.1 * (1 + 0.2 * 0.2)
        (0.0, 0.096),  # and to -0.2
        (-50.0, 0.096),
    ],
)
def test_the_adaptive_coefficient_follows_the_clipped_relative_error(kl: float, coef: float) -> None:
    controller = KlController(KlConfig(coef=0.1, target=4.0, gain=0.2), 0.1)
    controller.update(kl)
    assert controller.coef == pytest.approx(coef, rel=1e-12)


def test_scores_pass_unchanged_by_default() -> None:
    shaper = ScoreShaper(ScoreConfig())
    assert shaper.shape([1.5, -2.0, 1e6], [True, False, True]) == [1.5, -2.0, 1e6]


def test_a_missing_end_costs_the_penalty() -> None:
    shaper = ScoreShaper(ScoreConfig(missing_eos_penalty=1.0))
    assert shaper.shape([2.0, 2.0], [True, False]) == [2.0, 1.0]


def test_clipping_comes_last_on_both_sides() -> None:
    shaper = ScoreShaper(ScoreConfig(clip=1.0, missing_eos_penalty=0.5))
    assert shaper.shape([3.0, 1.2, -3.0, 0.1], [True, False, True, True]) == pytest.approx([1.0, 0.7, -1.0, 0.1])


def test_normalisation_uses_all_scores_so_far() -> None:
    shaper = ScoreShaper(ScoreConfig(normalize=True))
    first, second = [1.0, 2.0, 6.0], [0.0, 11.0]
    # after three: mean 3, unbiased variance 7
    assert shaper.shape(first, [True] * 3) == pytest.approx([(each - 3) / math.sqrt(7) for each in first])
    mean, deviation = statistics.fmean(first + second), statistics.stdev(first + second)
    assert shaper.shape(second, [True] * 2) == pytest.approx([(each - mean) / deviation for each in second])


def test_normalisation_sees_the_penalty() -> None:
    shaper = ScoreShaper(ScoreConfig(normalize=True, missing_eos_penalty=4.0))
    # scores become 5 and 1: mean 3, deviation sqrt(8)
    assert shaper.shape([5.0, 5.0], [True, False]) == pytest.approx([2 / math.sqrt(8), -2 / math.sqrt(8)])


@pytest.mark.parametrize("scores", [[4.0], [4.0, 4.0, 4.0]])
def test_normalisation_of_equal_scores_is_zero(scores: list[float]) -> None:
    assert ScoreShaper(ScoreConfig(normalize=True)).shape(scores, [True] * len(scores)) == [0.0] * len(scores)


def test_normalisation_is_stable_far_from_zero() -> None:
    shaper = ScoreShaper(ScoreConfig(normalize=True))
    shaped = shaper.shape([1e9 + 1, 1e9 + 2, 1e9 + 3], [True] * 3)
    assert shaped == pytest.approx([-1.0, 0.0, 1.0], abs=1e-6)
