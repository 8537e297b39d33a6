"""Two responses to one prompt, waiting for a label: as a config gives them, and as preferences.jsonl has them."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.artifacts import sha256_json
from data.parse import read_text
from data.rows import Message, Preference, Prompt, Refusal, RowError, Text
from data.sources import SourceConfig, read_source, shortened

_HUMAN = {"a": 1.0, "1": 1.0, "b": 0.0, "2": 0.0, "tie": 0.5, "0": 0.5}


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt; `known` is how surely a person, or a canary's maker, prefers the first."""

    prompt: Text
    first: Text
    second: Text
    origin: str = ""
    known: float | None = None
    canary: bool = False

    @property
    def id(self) -> str:
        """Hex sha256 of prompt and responses, in their order."""
        return sha256_json([self.prompt, self.first, self.second])

    @property
    def responses(self) -> tuple[str, str]:
        """Both responses as a judge or a person reads them."""
        return shown(self.first), shown(self.second)

    def swapped(self, seed: int) -> bool:
        """Whether the second one is shown first where only one order is: a coin by seed and pair."""
        return hashlib.sha256(f"{seed} {self.id}".encode()).digest()[0] % 2 == 1

    def preference(self, label: float, *, source: str, ledger: Sequence[int]) -> dict[str, Any]:
        """The row of preferences.jsonl: the likelier response is the chosen one; of a tie, the first."""
        better, worse = (self.first, self.second) if label >= 0.5 else (self.second, self.first)
        return {
            "prompt": self.prompt,
            "chosen": better,
            "rejected": worse,
            "p_chosen": max(label, 1.0 - label),
            "source": source,
            "ledger_ids": list(ledger),
            "origin": self.origin,
        }


def shown(response: Text) -> str:
    """A response as one text; several turns with their roles."""
    if isinstance(response, str):
        return response
    if len(response) == 1:
        return response[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in response)


def as_response(prompt: Text, response: str) -> Text:
    """A sampled response in the form of its prompt: text, or an assistant's turn."""
    return response if isinstance(prompt, str) else [Message(role="assistant", content=response)]


def read_pairs(sources: Sequence[SourceConfig], *, run_folder: Path) -> tuple[list[Pair], list[Refusal]]:
    """The pairs in the sources, each once, and the rows that hold none."""
    pairs: dict[str, Pair] = {}
    refused: list[Refusal] = []
    for source in sources:
        rows = read_source(Prompt, source, run_folder=run_folder)
        if any("responses" in row.extra for row in rows.rows):
            refused += rows.refused
            for row in rows.rows:
                try:
                    pair = _given(row)
                except RowError as error:
                    refused.append(Refusal(row.origin, str(error), shortened({"prompt": row.prompt, **row.extra})))
                    continue
                pairs.setdefault(pair.id, pair)
        else:
            preferences = read_source(Preference, source, run_folder=run_folder)
            refused += preferences.refused
            pairs |= {pair.id: pair for pair in map(known_pair, preferences.rows) if pair.id not in pairs}
    return list(pairs.values()), refused


def known_pair(row: Preference, *, canary: bool = False) -> Pair:
    """A labelled row with its sides in an order that says nothing."""
    digest = hashlib.sha256(sha256_json([row.prompt, row.chosen, row.rejected]).encode()).digest()
    if digest[0] % 2:
        return Pair(row.prompt, row.rejected, row.chosen, row.origin, 1.0 - row.p_chosen, canary)
    return Pair(row.prompt, row.chosen, row.rejected, row.origin, row.p_chosen, canary)


def _given(row: Prompt) -> Pair:
    responses = row.extra.get("responses")
    if not isinstance(responses, list) or len(responses) != 2:
        raise RowError("responses is not a list of two")
    first, second = (read_text(response, "responses") for response in responses)
    return Pair(row.prompt, first, second, row.origin, _human(row.extra.get("label")))


def _human(value: object) -> float | None:
    if value is None or value == "":
        return None
    known = None if isinstance(value, bool) else _HUMAN.get(str(value).strip().lower())
    if known is None:
        raise RowError(f"label={value!r:.40} is none of A, B, tie (or 1, 2, 0)")
    return known


def shuffled_canaries(pairs: Sequence[Pair], count: int, *, seed: int) -> list[Pair]:
    """Up to `count` responses of at least six words, each beside itself with its words shuffled."""
    rng = random.Random(f"canaries {seed}")
    canaries: list[Pair] = []
    for pair in rng.sample(list(pairs), len(pairs)):
        if len(canaries) == count:
            break
        words = pair.responses[0].split()
        mixed = rng.sample(words, len(words))
        if len(words) < 6 or mixed == words:
            continue
        spoiled = as_response(pair.prompt, " ".join(mixed))
        row = Preference(pair.prompt, pair.first, spoiled, origin=f"canary of {pair.origin}")
        canaries.append(known_pair(row, canary=True))
    return canaries


def mixed_in(pairs: Sequence[Pair], canaries: Sequence[Pair]) -> list[Pair]:
    """The pairs in their order, with the canaries spread evenly among them."""
    order = [(float(place), pair) for place, pair in enumerate(pairs)]
    step = len(pairs) / max(len(canaries), 1)
    order += [(step * (place + 0.5) - 0.25, pair) for place, pair in enumerate(canaries)]
    return [pair for _, pair in sorted(order, key=lambda each: each[0])]
