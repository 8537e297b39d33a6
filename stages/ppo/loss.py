"""PPO's two losses, summed over response tokens: the caller divides by the tokens of the whole minibatch.

Legend: M response tokens of a microbatch, one after the other.
"""

import torch
from torch import Tensor


def policy_loss(new_logprobs_M: Tensor, logprobs_M: Tensor, advantages_M: Tensor, clip_range: float) -> Tensor:
    """Sum over tokens of -min(ratio * A, clip(ratio, 1 - e, 1 + e) * A) (Schulman et al. 2017, 1707.06347, eq. 7)."""
    ratio_M = torch.exp(new_logprobs_M - logprobs_M)
    clipped_M = ratio_M.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio_M * advantages_M, clipped_M * advantages_M).sum()


def value_loss(new_values_M: Tensor, values_M: Tensor, returns_M: Tensor, clip_range: float) -> Tensor:
    """Sum over tokens of max((V - R)^2, (clip(V, V_old +- e) - R)^2) / 2 (Huang et al. 2024, 2403.17031, detail 11)."""
    clipped_M = values_M + (new_values_M - values_M).clamp(-clip_range, clip_range)
    return torch.maximum((new_values_M - returns_M).square(), (clipped_M - returns_M).square()).sum() / 2
