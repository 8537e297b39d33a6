"""The KL controller and the score shaper, step by step by hand."""

import math
import statistics
from collections.abc import Sequence

import pytest

from stages.ppo.config import KlConfig, OverlongConfig, ScoreConfig
from stages.ppo.control import KlController, ScoreShaper, overlong_penalty


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


def shape(
    shaper: ScoreShaper,
    scores: Sequence[float],
    finished: Sequence[bool] | None = None,
    overlong: Sequence[float] | None = None,
    trains: Sequence[bool] | None = None,
) -> list[float]:
    """The shaped scores where, unless said otherwise, all finished, none is overlong and all train."""
    count = len(scores)
    return shaper.shape(scores, finished or [True] * count, overlong or [0.0] * count, trains or [True] * count)


def test_scores_pass_unchanged_by_default() -> None:
    assert shape(ScoreShaper(ScoreConfig()), [1.5, -2.0, 1e6], [True, False, True]) == [1.5, -2.0, 1e6]


def test_a_missing_end_costs_the_penalty() -> None:
    assert shape(ScoreShaper(ScoreConfig(missing_eos_penalty=1.0)), [2.0, 2.0], [True, False]) == [2.0, 1.0]


def test_an_overlong_response_pays_its_penalty_beside_the_missing_end() -> None:
    shaper = ScoreShaper(ScoreConfig(missing_eos_penalty=1.0))
    assert shape(shaper, [2.0, 2.0, 2.0], [True, True, False], [0.0, 0.25, 0.5]) == [2.0, 1.75, 0.5]


def test_clipping_comes_last_on_both_sides() -> None:
    shaper = ScoreShaper(ScoreConfig(clip=1.0, missing_eos_penalty=0.5))
    shaped = shape(shaper, [3.0, 1.2, -3.0, 0.1, 3.0], [True, False, True, True, True], [0, 0, 0, 0, 2.75])
    assert shaped == pytest.approx([1.0, 0.7, -1.0, 0.1, 0.25])


def test_normalisation_uses_all_scores_so_far() -> None:
    shaper = ScoreShaper(ScoreConfig(normalize=True))
    first, second = [1.0, 2.0, 6.0], [0.0, 11.0]
    # after three: mean 3, unbiased variance 7
    assert shape(shaper, first) == pytest.approx([(each - 3) / math.sqrt(7) for each in first])
    mean, deviation = statistics.fmean(first + second), statistics.stdev(first + second)
    assert shape(shaper, second) == pytest.approx([(each - mean) / deviation for each in second])


@pytest.mark.parametrize(("finished", "overlong"), [([True, False], [0.0, 0.0]), ([True, True], [0.0, 4.0])])
def test_normalisation_sees_the_penalties(finished: list[bool], overlong: list[float]) -> None:
    shaper = ScoreShaper(ScoreConfig(normalize=True, missing_eos_penalty=4.0))
    # scores become 5 and 1: mean 3, deviation sqrt(8)
    assert shape(shaper, [5.0, 5.0], finished, overlong) == pytest.approx([2 / math.sqrt(8), -2 / math.sqrt(8)])


@pytest.mark.parametrize("scores", [[4.0], [4.0, 4.0, 4.0]])
def test_normalisation_of_equal_scores_is_zero(scores: list[float]) -> None:
    assert shape(ScoreShaper(ScoreConfig(normalize=True)), scores) == [0.0] * len(scores)


def test_normalisation_is_stable_far_from_zero() -> None:
    shaped = shape(ScoreShaper(ScoreConfig(normalize=True)), [1e9 + 1, 1e9 + 2, 1e9 + 3])
    assert shaped == pytest.approx([-1.0, 0.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("garbage", [7.0, 1e30])
def test_scores_of_responses_that_do_not_train_are_not_counted(garbage: float) -> None:
    counted, whole = ScoreShaper(ScoreConfig(normalize=True)), ScoreShaper(ScoreConfig(normalize=True))
    shaped = shape(counted, [1.0, garbage, 2.0, 6.0], trains=[True, False, True, True])
    assert [shaped[0], *shaped[2:]] == shape(whole, [1.0, 2.0, 6.0])
    assert counted == whole
    assert (counted.count, counted.mean, counted.squares) == (3, 3.0, 14.0)


def test_a_batch_of_which_nothing_trains_counts_nothing() -> None:
    shaper = ScoreShaper(ScoreConfig(normalize=True))
    assert shape(shaper, [3.0, 4.0], trains=[False, False]) == [3.0, 4.0]
    assert shaper == ScoreShaper(ScoreConfig(normalize=True))


@pytest.mark.parametrize(("length", "penalty"), [(1, 0.0), (12, 0.0), (13, 0.5), (14, 1.0), (15, 1.5), (16, 2.0)])
def test_the_overlong_penalty_grows_linearly_over_the_buffer(length: int, penalty: float) -> None:
    # at most 16 tokens, the last 4 are the buffer: 12 is free, 16 costs all of it
    assert overlong_penalty(length, 16, OverlongConfig(buffer=4, penalty=2.0)) == penalty


def test_without_a_buffer_nothing_is_overlong() -> None:
    assert [overlong_penalty(length, 16, OverlongConfig()) for length in (1, 15, 16)] == [0.0] * 3
