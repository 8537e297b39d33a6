"""State that moves from update to update beside the weights: the KL coefficient and the running score statistics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stages.ppo.config import KlConfig, OverlongConfig, ScoreConfig

KL_ERROR_CLIP = 0.2


@dataclass
class KlController:
    """The coefficient beta: fixed, or moved towards a target KL."""

    config: KlConfig
    coef: float

    def update(self, kl_per_response: float) -> None:
        """beta <- beta * (1 + K * clip(kl / target - 1, +-0.2)) (Ziegler et al. 2019, arXiv 1909.08593, sec. 2.2).

        The KL is the policy's over all that it sampled, also what the loss leaves out: a selection would be biased.
        """
        if self.config.target is not None:
            error = min(max(kl_per_response / self.config.target - 1, -KL_ERROR_CLIP), KL_ERROR_CLIP)
            self.coef *= 1 + self.config.gain * error


def overlong_penalty(length: int, response_length: int, config: OverlongConfig) -> float:
    """What a response of `length` tokens, its end token included, loses for coming near `response_length`.

    0 up to response_length - buffer, then linear up to the penalty at response_length (DAPO's soft overlong punishment:
    Yu et al. 2025, arXiv 2503.14476, eq. 13, whose penalty is 1).
    """
    if config.buffer == 0:
        return 0.0
    return config.penalty * max(length - (response_length - config.buffer), 0) / config.buffer


@dataclass
class ScoreShaper:
    """Turns raw scores into what the policy is rewarded with; keeps the mean and variance of all scores so far."""

    config: ScoreConfig
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared differences from the mean (Welford 1962)

    def shape(
        self, scores: Sequence[float], finished: Sequence[bool], overlong: Sequence[float], trains: Sequence[bool]
    ) -> list[float]:
        """Shaped scores of one batch of responses, in this order.

        1. The missing-EOS penalty is taken off what did not finish (Huang et al. 2024, arXiv 2403.17031, detail 4).
        2. `overlong`, each response's penalty of `overlong_penalty`, is taken off too: a response may pay both.
        3. The running mean is removed and the running standard deviation divided by. Both count the scores after the
           penalties, this batch's included, of the responses that train only.
        4. What is left is clipped. TRL does the first step only.
        """
        missing = self.config.missing_eos_penalty
        rows = zip(scores, finished, overlong, strict=True)
        shaped = [score - (0.0 if ended else missing) - penalty for score, ended, penalty in rows]
        if self.config.normalize:
            for score, counts in zip(shaped, trains, strict=True):
                if counts:
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
