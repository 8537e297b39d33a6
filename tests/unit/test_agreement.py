"""Agreement of two raters: kappa by hand, its interval by the delta method."""

import math

import numpy as np
import pytest

from stages.core.judge.agreement import agreement


def ratings(table: list[list[int]]) -> list[tuple[int, int]]:
    return [
        (row, column) for row, counts in enumerate(table) for column, count in enumerate(counts) for _ in range(count)
    ]


def test_kappa_by_hand():
    """50 items: they agree on 35, so p_o = 0.7; by chance on 0.5 * 0.6 + 0.5 * 0.4 = 0.5; kappa = 0.2 / 0.5."""
    found = agreement(ratings([[20, 5], [10, 15]]))
    assert (found.count, found.share) == (50, 0.7)
    assert found.kappa == pytest.approx(0.4)


def test_kappa_of_those_who_always_and_who_never_agree():
    assert agreement([("A", "A"), ("B", "B")]).kappa == 1
    assert agreement([("A", "B"), ("B", "A")]).kappa == -1
    assert agreement([("A", "A"), ("A", "B"), ("B", "A"), ("B", "B")]).kappa == 0


def test_without_variety_or_items_there_is_no_kappa():
    one_label = agreement([("A", "A")] * 3)
    assert (one_label.share, one_label.kappa, one_label.low) == (1.0, None, None)
    none = agreement([])
    assert none.count == 0
    assert math.isnan(none.share)
    assert none.kappa is None


@pytest.mark.parametrize("table", [[[20, 5], [10, 15]], [[30, 4, 1], [6, 20, 3], [2, 5, 29]], [[40, 9], [6, 5]]])
def test_the_interval_is_that_of_the_delta_method(table):
    """Standard error = sqrt(g' (diag(p) - p p') g / n), with g the gradient of kappa by finite differences."""
    counts = np.array(table, dtype=float)
    share, size = counts / counts.sum(), len(table)

    def kappa(flat: np.ndarray) -> float:
        cells = flat.reshape(size, size)
        chance = cells.sum(axis=1) @ cells.sum(axis=0)
        return (np.trace(cells) - chance) / (1 - chance)

    flat = share.ravel()
    steps = 1e-6 * np.eye(len(flat))
    gradient = np.array([(kappa(flat + step) - kappa(flat - step)) / 2e-6 for step in steps])
    error = math.sqrt(gradient @ (np.diag(flat) - np.outer(flat, flat)) @ gradient / counts.sum())
    found = agreement(ratings(table))
    assert found.kappa == pytest.approx(kappa(flat))
    assert found.low == pytest.approx(found.kappa - 1.959964 * error, rel=1e-5)
    assert found.high == pytest.approx(found.kappa + 1.959964 * error, rel=1e-5)
