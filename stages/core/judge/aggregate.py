"""From single verdicts to one label: both orders of one judge, then the vote of several."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from stages.core.judge.config import Disagreement

Side = Literal["first", "second", "tie"]


def both_orders(as_given: float, swapped: float, on_disagreement: Disagreement) -> float | None:
    """The probability that the first response is better, from a judge's two verdicts; None is no label.

    `as_given` and `swapped` say how much each verdict prefers the response it was *shown* first. Where the two do not
    come to the same: a tie, their mean (Lee et al. 2023, section 2.1), or no label. Verdicts that are probabilities
    agree where they prefer the same response; their mean is the label then too.
    """
    first, second = as_given, 1.0 - swapped
    if side(first) == side(second) or on_disagreement == "soft":
        return (first + second) / 2
    return 0.5 if on_disagreement == "tie" else None


def by_points(first: float, second: float) -> float:
    """The label that two pointwise grades come to: the higher wins, equal ones tie."""
    return 1.0 if first > second else 0.0 if first < second else 0.5


def vote(labels: Sequence[float | None], on_disagreement: Disagreement) -> float | None:
    """The label that several judges come to; None where all abstain or, with `drop`, none has more than half.

    With `soft` it is the mean. Otherwise the side for which more than half of those who do not abstain are, a tie being
    a side too; without such a majority a tie, or no label. One judge's label is taken as it is.
    """
    given = [label for label in labels if label is not None]
    if not given:
        return None
    if len(given) == 1 or on_disagreement == "soft":
        return sum(given) / len(given)
    winner, count = Counter(side(label) for label in given).most_common(1)[0]
    if 2 * count > len(given):
        return {"first": 1.0, "second": 0.0, "tie": 0.5}[winner]
    return 0.5 if on_disagreement == "tie" else None


def side(label: float) -> Side:
    """Which response a label prefers."""
    return "first" if label > 0.5 else "second" if label < 0.5 else "tie"
