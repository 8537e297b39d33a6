"""Token sequences packed into one row, ready for a model; the one place that packs.

Legend: B sequences, N packed tokens, M response tokens of all sequences one after the other, R longest response.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.attention import Layout, pack_layout


@dataclass(frozen=True)
class PackedBatch:
    """B sequences in one row of N tokens."""

    tokens_1N: Tensor
    position_ids_1N: Tensor  # restart at 0 in each sequence
    layout: Layout
    last_B: Tensor  # where each sequence's last token stands

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], device: torch.device) -> "PackedBatch":
        """The packed batch of B non-empty sequences of token ids."""
        lengths = [len(sequence) for sequence in sequences]
        tokens_N = torch.tensor([token for sequence in sequences for token in sequence])
        positions_N = torch.cat([torch.arange(length) for length in lengths])
        return cls(
            tokens_1N=tokens_N[None].to(device),
            position_ids_1N=positions_N[None].to(device),
            layout=pack_layout(lengths, device),
            last_B=(torch.tensor(lengths).cumsum(0) - 1).to(device),
        )


@dataclass(frozen=True)
class ResponseBatch:
    """B prompts with their responses, packed; the response tokens of all sequences are M in number.

    Worked example: prompts [7 8], [9] with responses [1 2], [3] pack to tokens 7 8 1 2 9 3; `before_M` is 1 2 4 (the
    positions whose output predicts a response token), `targets_M` is 1 2 3.
    """

    packed: PackedBatch
    before_M: Tensor  # packed position just before each response token: the one-position shift happens here only
    targets_M: Tensor
    lengths: tuple[int, ...]  # response tokens of each sequence

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
    ) -> "ResponseBatch":
        """The batch of B prompts, each followed by its response (one token at least)."""
        sequences = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        before: list[Tensor] = []
        start = 0
        for prompt, response in zip(prompts, responses, strict=True):
            before.append(torch.arange(len(response)) + start + len(prompt) - 1)
            start += len(prompt) + len(response)
        return cls(
            packed=PackedBatch.of(sequences, device),
            before_M=torch.cat(before).to(device),
            targets_M=torch.tensor([token for response in responses for token in response]).to(device),
            lengths=tuple(len(response) for response in responses),
        )


def split_by_budget(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `sizes` in consecutive groups that sum to at most `budget` (a larger one stands alone)."""
    groups: list[list[int]] = []
    used = 0
    for row, size in enumerate(sizes):
        if not groups or used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(row)
        used += size
    return groups
