"""Log-probabilities of chosen tokens, without a tensor of all tokens x vocabulary.

Legend: M chosen tokens, V vocabulary, D hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**25  # at most this many logits at once: 128 MiB in float32


def token_logprobs(hidden_MD: Tensor, head: nn.Module, targets_M: Tensor, temperature: float) -> Tensor:
    """Log-probability (nats, float32) of each target under softmax(head(hidden) / temperature).

    Long inputs run in chunks whose logits are computed again in the backward pass instead of being kept.
    """

    def chunk(part_MD: Tensor, part_M: Tensor) -> Tensor:
        logits_MV = head(part_MD).float() / temperature
        return logits_MV.gather(1, part_M[:, None])[:, 0] - logits_MV.logsumexp(1)

    return _in_chunks(chunk, hidden_MD, targets_M, head)


def token_logprobs_and_entropy(
    hidden_MD: Tensor, head: nn.Module, targets_M: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and the entropy (nats, float32, M) of the whole softmax at each place, from the same chunks."""

    def chunk(part_MD: Tensor, part_M: Tensor) -> Tensor:
        all_MV = (head(part_MD).float() / temperature).log_softmax(1)
        return torch.stack([all_MV.gather(1, part_M[:, None])[:, 0], -(all_MV.exp() * all_MV).sum(1)], dim=1)

    logprobs_M, entropy_M = _in_chunks(chunk, hidden_MD, targets_M, head).unbind(1)
    return logprobs_M, entropy_M


def _in_chunks(
    chunk: Callable[[Tensor, Tensor], Tensor], hidden_MD: Tensor, targets_M: Tensor, head: nn.Module
) -> Tensor:
    """`chunk` of all rows, so many at a time that their logits are at most CHUNK_LOGITS, with or without gradients."""
    rows = max(1, CHUNK_LOGITS // head.weight.shape[0])
    if len(targets_M) <= rows:
        return chunk(hidden_MD, targets_M)
    parts = zip(hidden_MD.split(rows), targets_M.split(rows), strict=True)
    return torch.cat([checkpoint(chunk, part_MD, part_M, use_reentrant=False) for part_MD, part_M in parts])
