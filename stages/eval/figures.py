"""Means with 95 % intervals, in plain numbers."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from stages.core.calibration import Z_95


@dataclass(frozen=True)
class Mean:
    """A mean and the half width of its 95 % interval (normal approximation); None for fewer than two values."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """The mean of at least one value, half = 1.96 x standard deviation / sqrt(count); NaN is no value."""
        values = [value for value in values if not math.isnan(value)]
        half = Z_95 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), half, len(values))

    @classmethod
    def of_difference(cls, values: Sequence[float], others: Sequence[float]) -> "Mean":
        """The mean of `values - others`, paired: what both have in common does not widen the interval."""
        return cls.of([value - other for value, other in zip(values, others, strict=True)])

    def figures(self) -> dict[str, float | int | None]:
        """For machines: mean, half, low, high, count."""
        low, high = (None, None) if self.half is None else (self.mean - self.half, self.mean + self.half)
        return {**asdict(self), "low": low, "high": high}

    def text(self, *, sign: bool = False) -> str:
        """For a table cell: `0.512 ± 0.031`."""
        shown = f"{self.mean:+.3f}" if sign else f"{self.mean:.3f}"
        return shown if self.half is None else f"{shown} ± {self.half:.3f}"
