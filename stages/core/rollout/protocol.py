"""What a rollout engine is given and what it gives back, whichever engine it is."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Nothing is cut from the distribution, so log-probabilities stay those of the policy."""

    max_new_tokens: int
    temperature: float
    end_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """One sampled response, its end token included, with the log-probability of each token in nats."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool  # False: cut at max_new_tokens
    values: tuple[float, ...] | None = None  # a critic's, of the state before each token, where the engine read them
    version: int = 0  # of the policy that sampled it, as `sync` named it


class EngineError(Exception):
    """A rollout engine failed: it died, hung, or answered what cannot be used. One line that names it."""


class RolloutEngine(Protocol):
    """Samples responses from the policy as it was handed over last."""

    def sync(self, version: int) -> None:
        """Hands over the policy as it is now; completions from here on carry `version`."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """For each prompt one completion a seed; a seed fixes its completion whoever shares the batch."""
        ...

    def close(self) -> None:
        """Releases what the engine holds."""
        ...


def rollout_seed(run_seed: int, purpose: str, update: int, prompt: int, sample: int) -> int:
    """A 63-bit seed that depends on these five values alone, so that a resumed run draws the same responses."""
    text = f"{run_seed}/{purpose}/{update}/{prompt}/{sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
