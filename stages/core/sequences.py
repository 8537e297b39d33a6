"""Token sequences packed into one row, ready for a model; the one place that packs.

Legend: B sequences, N packed tokens, M response tokens of all sequences one after the other, R longest response.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.attention import Layout, pack_layout
from stages.core.documents import Document, one_by_one


@dataclass(frozen=True)
class PackedBatch:
    """B sequences in one row of N tokens."""

    tokens_1N: Tensor
    position_ids_1N: Tensor  # restart at 0 in each sequence
    layout: Layout
    last_B: Tensor  # where each sequence's last token stands
    documents: tuple[Document, ...]  # where all of them stand

    @classmethod
    def of(
        cls, sequences: Sequence[Sequence[int]], device: torch.device, *, prompts: Sequence[int] | None = None
    ) -> "PackedBatch":
        """The packed batch of B non-empty sequences of token ids.

        `prompts`, how many tokens of each are its prompt: those with the same prompt hold it once. Nothing before them
        is different, so neither is what a model makes of it.
        """
        if prompts is None:
            documents = one_by_one([len(sequence) for sequence in sequences])
        else:
            documents = _sharing(sequences, prompts)
        pairs = list(zip(sequences, documents, strict=True))
        tokens_N = torch.tensor([token for sequence, document in pairs for token in sequence[document.borrowed :]])
        positions_N = torch.cat([torch.arange(document.borrowed, document.length) for document in documents])
        return cls(
            tokens_1N=tokens_N[None].to(device),
            position_ids_1N=positions_N[None].to(device),
            layout=pack_layout(documents, device),
            last_B=torch.stack([document.places()[-1] for document in documents]).to(device),
            documents=tuple(documents),
        )


def _sharing(sequences: Sequence[Sequence[int]], prompts: Sequence[int]) -> list[Document]:
    """The sequences one behind the other, without prompts that stood there before."""
    homes: dict[tuple[int, ...], int] = {}
    documents: list[Document] = []
    start = 0
    for sequence, length in zip(sequences, prompts, strict=True):
        prompt = tuple(sequence[:length])
        borrowed = length if prompt in homes else 0
        documents.append(Document(len(sequence), start, borrowed, homes.setdefault(prompt, start)))
        start += len(sequence) - borrowed
    return documents


@dataclass(frozen=True)
class ResponseBatch:
    """B prompts with their responses, packed; the response tokens of all sequences are M in number.

    Worked example: prompts [7 8], [9] with responses [1 2], [3] pack to tokens 7 8 1 2 9 3; `before_M` is 1 2 4 (the
    positions whose output predicts a response token), `targets_M` is 1 2 3. A second response [5] to [7 8] borrows that
    prompt: the tokens become 7 8 1 2 9 3 5, and its `before_M` is 1 again.
    """

    packed: PackedBatch
    before_M: Tensor  # packed position just before each response token: the one-position shift happens here only
    targets_M: Tensor
    lengths: tuple[int, ...]  # response tokens of each sequence

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        device: torch.device,
        *,
        share_prompts: bool = True,
    ) -> "ResponseBatch":
        """The batch of B prompts, each followed by its response (one token at least)."""
        sequences = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        lengths = [len(prompt) for prompt in prompts]
        packed = PackedBatch.of(sequences, device, prompts=lengths if share_prompts else None)
        before = [
            document.places()[length - 1 : -1] for document, length in zip(packed.documents, lengths, strict=True)
        ]
        return cls(
            packed=packed,
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
