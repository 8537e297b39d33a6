"""What the stages on preference pairs share: weighed pairs, and pairs with their scores as figures and text.

Legend: B pairs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from data.chat import ChatEncoder
from data.encoded import EncodedPreference
from stages.core.calibration import JudgedPair
from stages.core.supervised_run import Measured

SAMPLED_PAIRS = 4  # shown in samples.jsonl at each evaluation


def measure(rows: Sequence[EncodedPreference]) -> Measured[EncodedPreference]:
    """What these pairs hold."""
    tokens = sum(len(row.chosen) + len(row.rejected) for row in rows)
    return Measured(rows, tokens=tokens, weight=sum(row.weight for row in rows))


def judged_pairs(scores_2B: tuple[Tensor, Tensor], rows: Sequence[EncodedPreference]) -> list[JudgedPair]:
    """The pairs with their scores and response lengths, for the diagnostics."""
    return [
        JudgedPair(
            chosen_score,
            rejected_score,
            chosen_tokens=len(row.chosen) - row.prompt_length,
            rejected_tokens=len(row.rejected) - row.prompt_length,
            p_chosen=row.p_chosen,
        )
        for chosen_score, rejected_score, row in zip(scores_2B[0].tolist(), scores_2B[1].tolist(), rows, strict=True)
    ]


def pair_samples(
    encoder: ChatEncoder, rows: Sequence[EncodedPreference], pairs: Sequence[JudgedPair]
) -> Iterator[dict[str, Any]]:
    """Both sides of the first few pairs as lines of samples.jsonl."""
    for row, pair in zip(rows[:SAMPLED_PAIRS], pairs[:SAMPLED_PAIRS], strict=True):
        prompt = encoder.tokenizer.decode(row.chosen[: row.prompt_length], skip_special_tokens=True)
        sides = [(row.chosen, pair.chosen_score, "chosen"), (row.rejected, pair.rejected_score, "rejected")]
        for tokens, score, label in sides:
            yield {
                "prompt": prompt,
                "response": encoder.decode_response(tokens[row.prompt_length :]),
                "score": score,
                "label": label,
                "origin": row.origin,
            }
