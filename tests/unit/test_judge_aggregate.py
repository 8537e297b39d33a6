"""Labels from verdicts, worked by hand."""

import pytest

from stages.core.judge.aggregate import both_orders, by_points, vote


@pytest.mark.parametrize(
    ("as_given", "swapped", "tie", "soft", "drop"),
    [
        (1.0, 0.0, 1.0, 1.0, 1.0),  # A, then B: the first both times
        (0.0, 1.0, 0.0, 0.0, 0.0),  # the second both times
        (1.0, 1.0, 0.5, 0.5, None),  # A both times: it goes by the place
        (0.5, 0.5, 0.5, 0.5, 0.5),  # a tie both times is agreement
        (1.0, 0.5, 0.5, 0.75, None),  # the first, then a tie
        (0.5, 1.0, 0.5, 0.25, None),  # a tie, then the second
        (0.9, 0.3, 0.8, 0.8, 0.8),  # probabilities 0.9 and 0.7 for the first
        (0.9, 0.8, 0.5, 0.55, None),  # 0.9 and 0.2
    ],
)
def test_both_orders(as_given: float, swapped: float, tie: float, soft: float, drop: float | None) -> None:
    assert both_orders(as_given, swapped, "tie") == pytest.approx(tie)
    assert both_orders(as_given, swapped, "soft") == pytest.approx(soft)
    assert both_orders(as_given, swapped, "drop") == pytest.approx(drop)


@pytest.mark.parametrize(
    ("labels", "tie", "soft", "drop"),
    [
        ([0.8], 0.8, 0.8, 0.8),  # one judge's label is taken as it is
        ([1.0, 1.0, 0.0], 1.0, 2 / 3, 1.0),
        ([1.0, 0.0], 0.5, 0.5, None),
        ([0.0, 0.0, 0.5, None], 0.0, 1 / 6, 0.0),  # 2 of the 3 who do not abstain
        ([1.0, 0.0, 0.5], 0.5, 0.5, None),
        ([0.5, 0.5, 1.0], 0.5, 2 / 3, 0.5),  # a tie is a side too
        ([None, None], None, None, None),
        ([0.6, 0.7, 0.1], 1.0, 1.4 / 3, 1.0),
    ],
)
def test_votes(labels: list[float | None], tie: float | None, soft: float | None, drop: float | None) -> None:
    assert vote(labels, "tie") == pytest.approx(tie)
    assert vote(labels, "soft") == pytest.approx(soft)
    assert vote(labels, "drop") == pytest.approx(drop)


def test_points() -> None:
    assert [by_points(7, 3), by_points(3, 7), by_points(5, 5)] == [1.0, 0.0, 0.5]
