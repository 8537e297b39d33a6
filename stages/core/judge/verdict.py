"""From a judge's words to a verdict. What cannot be read is a fault with a name, never a verdict by default."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from stages.core.judge.config import Mode
from stages.core.judge.prompts import LEAST, MOST

Verdict = str | float
"""Pairwise: "A", "B" or "tie", or the probability that A is better; pointwise: points."""

_LABELS = {"a": "A", "b": "B", "tie": "tie"}
_FOR_FIRST = {"A": 1.0, "tie": 0.5, "B": 0.0}
_BARE = re.compile(
    r"(?:(?:final )?(?:verdict|answer|score)\s*(?:is)?\s*:?\s*)?[\[\"'*(]*(A|B|tie|\d+(?:\.\d+)?)[\])\"'*.]*", re.I
)


class Unusable(Exception):
    """An answer without a verdict: the cause, in a word or two, and the words themselves."""

    def __init__(self, cause: str, *, words: str = "") -> None:
        super().__init__(cause)
        self.words = words


def read_verdict(text: str, mode: Mode) -> Verdict:
    """The verdict in an answer: of a JSON object, alone or among words, or the bare label on a line of its own.

    Raises Unusable where there is none, and where two disagree.
    """
    if not text.strip():
        raise Unusable("empty answer")
    name = "verdict" if mode == "pairwise" else "score"
    objects = list(_objects(text))
    found = [_checked(each[name], mode) for each in objects if name in each]
    if objects and not found:
        raise Unusable(f"JSON without {name}")
    if not found:
        last = text.strip().splitlines()[-1].strip()
        bare = _BARE.fullmatch(last)
        if bare is None:
            raise Unusable("truncated answer" if text.lstrip().startswith(("{", "```")) else "no verdict in the answer")
        found = [_checked(bare[1] if mode == "pairwise" else _number(bare[1]), mode)]
    if len(set(found)) > 1:
        raise Unusable("several verdicts in one answer")
    return found[0]


def for_first(verdict: Verdict) -> float:
    """How much a pairwise verdict prefers the response that was shown first: 1, 0.5 or 0, or a probability."""
    return _FOR_FIRST[verdict] if isinstance(verdict, str) else float(verdict)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, those inside others left out."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_without_repeats)
    place = text.find("{")
    while place >= 0:
        try:
            found, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            yield found
        place = text.find("{", end)


def _refuse_constant(name: str) -> float:
    raise Unusable(f"{name} where a verdict is needed")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise Unusable("a key twice in one answer")
    return fields


def _checked(value: object, mode: Mode) -> Verdict:
    if mode == "pairwise":
        label = _LABELS.get(value.strip().lower()) if isinstance(value, str) else None
        if label is None:
            raise Unusable(f"verdict {_shown(value)} is none of A, B, tie")
        return label
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not LEAST <= value <= MOST:  # type: ignore[operator]
        raise Unusable(f"score {_shown(value)} is no number from {LEAST} to {MOST}")
    return float(value)  # type: ignore[arg-type]


def _number(text: str) -> object:
    return float(text) if text[0].isdigit() else text


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:40]}…"
