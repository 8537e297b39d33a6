"""How far a reward model's scores can be believed, in plain numbers.

A pair is told by its score difference (chosen minus rejected), the probability that chosen is the better one, and the
two response lengths.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
SIMILAR_LENGTH = 0.1  # lengths within a tenth of the longer one count as similar
CALIBRATION_BINS = 10


@dataclass(frozen=True)
class JudgedPair:
    """One pair of the holdout with its scores."""

    chosen_score: float
    rejected_score: float
    chosen_tokens: int
    rejected_tokens: int
    p_chosen: float = 1.0

    @property
    def difference(self) -> float:
        """Score of chosen minus score of rejected."""
        return self.chosen_score - self.rejected_score

    @property
    def correct(self) -> float | None:
        """1 where the scores prefer the likelier side, 0.5 where they tie, else 0; None where the label itself ties."""
        if self.p_chosen == 0.5:
            return None
        towards_likelier = self.difference if self.p_chosen > 0.5 else -self.difference
        return 0.5 if towards_likelier == 0 else float(towards_likelier > 0)

    @property
    def length_bucket(self) -> str:
        """Whether the likelier side is the longer one, the shorter one, or neither."""
        longer = max(self.chosen_tokens, self.rejected_tokens)
        gap = self.chosen_tokens - self.rejected_tokens
        if abs(gap) <= SIMILAR_LENGTH * longer:
            return "similar"
        return "longer" if (gap > 0) == (self.p_chosen > 0.5) else "shorter"


def wilson_interval(correct: float, total: int, z: float = Z_95) -> tuple[float, float]:
    """The interval of a share `correct / total` (Wilson 1927): never leaves [0, 1], usable for small totals."""
    share = correct / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def expected_calibration_error(differences: Sequence[float], p_chosen: Sequence[float]) -> float:
    """Mean gap between stated confidence and share correct, over bins weighted by size (Guo et al. 2017, 1706.04599).

    The confidence in the preferred side is sigmoid(|difference|), between 1/2 and 1, cut into ten bins of equal width;
    a soft label counts with the probability it gives to the preferred side.
    """
    bins: dict[int, list[tuple[float, float]]] = {}
    for difference, probability in zip(differences, p_chosen, strict=True):
        confidence = 1 / (1 + math.exp(-abs(difference)))
        truth = 0.5 if difference == 0 else probability if difference > 0 else 1 - probability
        place = min(int((confidence - 0.5) * 2 * CALIBRATION_BINS), CALIBRATION_BINS - 1)
        bins.setdefault(place, []).append((confidence, truth))
    gaps = (abs(sum(confidence - truth for confidence, truth in members)) for members in bins.values())
    return sum(gaps) / len(differences)


def correlation(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Pearson's r; None where one side does not vary or there are fewer than two values."""
    if len(left) < 2 or len(set(left)) == 1 or len(set(right)) == 1:
        return None
    return statistics.correlation(left, right)


def reward_figures(pairs: Sequence[JudgedPair]) -> dict[str, float]:
    """The diagnostics of a non-empty holdout, by metric name; what is undefined on it is left out.

    `accuracy` with its 95 % interval, `accuracy_longer|similar|shorter` by whether the better response is longer,
    `calibration_error`, `score_mean`, `score_std` (over both sides), `score_length_correlation`, `margin_mean`.
    """
    scores = [score for pair in pairs for score in (pair.chosen_score, pair.rejected_score)]
    lengths = [float(count) for pair in pairs for count in (pair.chosen_tokens, pair.rejected_tokens)]
    figures = {
        "score_mean": statistics.fmean(scores),
        "score_std": statistics.pstdev(scores),
        "margin_mean": statistics.fmean(pair.difference for pair in pairs),
        "calibration_error": expected_calibration_error(
            [pair.difference for pair in pairs], [pair.p_chosen for pair in pairs]
        ),
    }
    correct = [pair.correct for pair in pairs if pair.correct is not None]
    if correct:
        low, high = wilson_interval(sum(correct), len(correct))
        figures |= {"accuracy": statistics.fmean(correct), "accuracy_low": low, "accuracy_high": high}
    for bucket in ("longer", "similar", "shorter"):
        members = [pair.correct for pair in pairs if pair.correct is not None and pair.length_bucket == bucket]
        if members:
            figures[f"accuracy_{bucket}"] = statistics.fmean(members)
            figures[f"pairs_{bucket}"] = float(len(members))
    if (r := correlation(scores, lengths)) is not None:
        figures["score_length_correlation"] = r
    return figures
