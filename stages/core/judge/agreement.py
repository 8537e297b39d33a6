"""How far two raters agree: the share, and Cohen's kappa with its interval."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

_Z = 1.959963984540054  # the normal distribution's 97.5 % point: intervals hold 95 %


@dataclass(frozen=True)
class Agreement:
    """Agreement on `count` items. kappa is None where chance alone explains everything: both raters said one thing."""

    count: int
    share: float
    kappa: float | None
    low: float | None  # 95 % interval of kappa
    high: float | None


def agreement(ratings: Sequence[tuple[Hashable, Hashable]]) -> Agreement:
    """Agreement of two raters on the same items, one tuple an item (Cohen 1960).

    kappa = (p_o - p_e) / (1 - p_e), with p_o the share that agrees and p_e what the raters' own shares of each label
    give by chance. The interval is kappa +- 1.96 standard errors by Fleiss, Cohen and Everitt (1969), within [-1, 1].
    """
    count = len(ratings)
    if not count:
        return Agreement(0, math.nan, None, None, None)
    cells = {labels: seen / count for labels, seen in Counter(ratings).items()}
    first, second = (_shares([labels[side] for labels in ratings]) for side in (0, 1))
    observed = sum(share for (one, other), share in cells.items() if one == other)
    expected = sum(share * second.get(label, 0.0) for label, share in first.items())
    if expected == 1:
        return Agreement(count, observed, None, None, None)
    kappa = (observed - expected) / (1 - expected)
    spread = -((observed * expected - 2 * expected + observed) ** 2)
    for (one, other), share in cells.items():
        if one == other:
            spread += share * (1 - expected - (first[one] + second[one]) * (1 - observed)) ** 2
        else:
            spread += share * (1 - observed) ** 2 * (second.get(one, 0.0) + first.get(other, 0.0)) ** 2
    error = math.sqrt(max(spread, 0.0) / count) / (1 - expected) ** 2
    return Agreement(count, observed, kappa, max(-1.0, kappa - _Z * error), min(1.0, kappa + _Z * error))


def _shares(labels: Sequence[Hashable]) -> dict[Hashable, float]:
    return {label: seen / len(labels) for label, seen in Counter(labels).items()}
