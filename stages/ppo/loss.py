"""PPO's losses, summed over response tokens: the caller divides by the tokens of the whole minibatch.

Legend: M response tokens of a microbatch, one after the other.
"""

import torch
from torch import Tensor


def policy_loss(
    new_logprobs_M: Tensor,
    logprobs_M: Tensor,
    advantages_M: Tensor,
    clip_range: float,
    *,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    weights_M: Tensor | None = None,
) -> Tensor:
    """Sum over tokens of -min(ratio * A, clip(ratio, 1 - e, 1 + e_high) * A) (Schulman et al. 2017, 1707.06347, eq. 7).

    `clip_range_high` (default: `clip_range`) frees the upper side, as DAPO's clip-higher does (Yu et al. 2025,
    2503.14476, sec. 3.1). Where A < 0 that minimum has no lower bound; `dual_clip` c gives it one: max(min(...), c * A)
    (Ye et al. 2020, 1912.09729, eq. 5). `weights_M` weigh each token where somebody else sampled (see importance.py).
    TRL 1.12 takes the mean over each microbatch, then the mean of these means: a token weighs more the fewer there are
    beside it.
    """
    ratio_M = torch.exp(new_logprobs_M - logprobs_M)
    clipped_M = ratio_M.clamp(1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high))
    objective_M = torch.minimum(ratio_M * advantages_M, clipped_M * advantages_M)
    if dual_clip is not None:
        bounded_M = torch.maximum(objective_M, dual_clip * advantages_M)
        objective_M = torch.where(advantages_M < 0, bounded_M, objective_M)
    if weights_M is not None:
        objective_M = objective_M * weights_M
    return -objective_M.sum()


def value_loss(new_values_M: Tensor, values_M: Tensor, returns_M: Tensor, clip_range: float | None) -> Tensor:
    """Sum over tokens of max((V - R)^2, (clip(V, V_old +- e) - R)^2) / 2 (Huang et al. 2024, 2403.17031, detail 11).

    Without a clip range it is (V - R)^2 / 2. TRL 1.12 counts the slot after an end token too, where R is the score.
    """
    squares_M = (new_values_M - returns_M).square()
    if clip_range is not None:
        clipped_M = values_M + (new_values_M - values_M).clamp(-clip_range, clip_range)
        squares_M = torch.maximum(squares_M, (clipped_M - returns_M).square())
    return squares_M.sum() / 2
