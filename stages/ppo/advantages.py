"""Scores and log-probabilities → per-token rewards → advantages and returns.

Legend: B sequences, R padded response. Masks are bool, True counts; padded positions hold 0.
"""

import torch
from torch import Tensor


def token_rewards(score_B: Tensor, kl_BR: Tensor, mask_BR: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * kl_t, plus the score at the last response token: reward_BR (Ziegler et al. 2019, eq. 2).

    Their sum over a response is score - kl_coef * KL. TRL puts the score on the slot after the end token; here the end
    token is part of the response and carries it.
    """
    reward_BR = torch.where(mask_BR, -kl_coef * kl_BR, 0.0)
    last_B = mask_BR.sum(1) - 1
    is_last_BR = torch.arange(mask_BR.shape[1], device=mask_BR.device) == last_B[:, None]
    return reward_BR + torch.where(is_last_BR, score_B[:, None], 0.0)


def gae(
    reward_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, BR each (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lambda * A_{t+1};  return_t = A_t + V_t.
    The value after the last token is 0, also where the response was cut off, as in InstructGPT-style work.
    """
    advantages_BR = torch.zeros_like(reward_BR)
    next_value_B = torch.zeros_like(reward_BR[:, 0])
    next_advantage_B = torch.zeros_like(next_value_B)
    for place in reversed(range(reward_BR.shape[1])):
        counts_B = mask_BR[:, place]
        delta_B = reward_BR[:, place] + gamma * next_value_B - values_BR[:, place]
        advantage_B = delta_B + gamma * gae_lambda * next_advantage_B
        next_advantage_B = torch.where(counts_B, advantage_B, 0.0)
        next_value_B = torch.where(counts_B, values_BR[:, place], 0.0)
        advantages_BR[:, place] = next_advantage_B
    returns_BR = torch.where(mask_BR, advantages_BR + values_BR, 0.0)
    return advantages_BR, returns_BR
