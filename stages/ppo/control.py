"""State that moves from update to update beside the weights: the KL coefficient and the running score statistics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stages.ppo.config import KlConfig, ScoreConfig

KL_ERROR_CLIP = 0.2


@dataclass
class KlController:
    """The coefficient beta: fixed, or moved towards a target KL."""

    config: KlConfig
    coef: float

    def update(self, kl_per_response: float) -> None:
        """beta <- beta * (1 + K * clip(kl / target - 1, +-0.2)) (Ziegler et al. 2019, arXiv 1909.08593, sec. 2.2)."""
        if self.config.target is not None:
            error = min(max(kl_per_response / self.config.target - 1, -KL_ERROR_CLIP), KL_ERROR_CLIP)
            self.coef *= 1 + self.config.gain * error


@dataclass
class ScoreShaper:
    """Turns raw scores into what the policy is rewarded with; keeps the mean and variance of all scores so far."""

    config: ScoreConfig
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared differences from the mean (Welford 1962)

    def shape(self, scores: Sequence[float], finished: Sequence[bool]) -> list[float]:
        """Scores after the missing-EOS penalty, normalisation and clipping, in that order."""
        penalty = self.config.missing_eos_penalty
        shaped = [score - (0.0 if ended else penalty) for score, ended in zip(scores, finished, strict=True)]
        if self.config.normalize:
            for score in shaped:
                self._count(score)
            spread = math.sqrt(self.squares / max(self.count - 1, 1)) or 1.0
            shaped = [(score - self.mean) / spread for score in shaped]
        if self.config.clip is not None:
            shaped = [min(max(score, -self.config.clip), self.config.clip) for score in shaped]
        return shaped

    def _count(self, score: float) -> None:
        self.count += 1
        difference = score - self.mean
        self.mean += difference / self.count
        self.squares += difference * (score - self.mean)
