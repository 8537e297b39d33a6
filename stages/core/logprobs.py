"""Log-probabilities of chosen tokens, without a tensor of all tokens x vocabulary.

Legend: M chosen tokens, V vocabulary, D hidden size.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**25  # at most this many logits at once: 128 MiB in float32


def token_logprobs(hidden_MD: Tensor, head: nn.Module, targets_M: Tensor, temperature: float) -> Tensor:
    """Log-probability (nats, float32) of each target under softmax(head(hidden) / temperature).

    Long inputs run in chunks whose logits are computed again in the backward pass instead of being kept.
    """

    def chunk_logprobs(part_MD: Tensor, part_M: Tensor) -> Tensor:
        logits_MV = head(part_MD).float() / temperature
        return logits_MV.gather(1, part_M[:, None])[:, 0] - logits_MV.logsumexp(1)

    rows = max(1, CHUNK_LOGITS // head.weight.shape[0])
    if len(targets_M) <= rows:
        return chunk_logprobs(hidden_MD, targets_M)
    parts = zip(hidden_MD.split(rows), targets_M.split(rows), strict=True)
    return torch.cat([checkpoint(chunk_logprobs, part_MD, part_M, use_reentrant=False) for part_MD, part_M in parts])
