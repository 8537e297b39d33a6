"""A reward that anyone can recompute: the share of a response's words that are in the past tense, as `-ed` shows.

About 0.03 to 0.08 on what the small story models write; any policy that shifts a little mass to such words learns it.
"""

from collections.abc import Sequence
from typing import Any


def score(prompts: Sequence[Any], responses: Sequence[str], rows: Sequence[Any]) -> list[float]:
    """One number in [0, 1] a response; 0 where it has no word."""
    shares: list[float] = []
    for response in responses:
        words = [word.strip(".,!?\"'").lower() for word in response.split()]
        shares.append(sum(word.endswith("ed") for word in words) / max(len(words), 1))
    return shares
