"""A reward that anyone can recompute: how many words of a response are in the past tense, as `-ed` shows, 8 at most.

A count and not a share: of a share, three such words and an early end would be the best, and the benchmark would
measure ever shorter responses. A few tenths on what the small story models write.
"""

from collections.abc import Sequence
from typing import Any

MOST = 8


def score(prompts: Sequence[Any], responses: Sequence[str], rows: Sequence[Any]) -> list[float]:
    """One number from 0 to 8 a response."""
    counts: list[float] = []
    for response in responses:
        words = [word.strip(".,!?\"'").lower() for word in response.split()]
        counts.append(float(min(sum(word.endswith("ed") for word in words), MOST)))
    return counts
