"""Scores and log-probabilities → per-token rewards → advantages and returns.

`mask_BR` counts the tokens that train: a response that is left out of the loss has no True in it, gets advantage 0, and
moves nobody else's. Advantages are constants of the loss that averages over all tokens of a minibatch.

Legend: B sequences, R padded response, Q prompts with K samples each (B = QK). Masks are bool, True counts; padded
positions hold 0.
"""

import torch
from torch import Tensor

from stages.core.ops import masked_whiten

# As in TRL: differences between a prompt's scores far below it are not blown up to 1.
GRPO_EPSILON = 1e-4


def token_rewards(score_B: Tensor, kl_BR: Tensor, mask_BR: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * kl_t, plus the score at the last response token: reward_BR (Ziegler et al. 2019, eq. 2).

    Their sum over a response is score - kl_coef * KL. The end token is part of the response and carries the score. TRL
    1.12 gives an ended response one slot more, after the end token, for the score and for a value of its own; where the
    tokenizer pads with the end token, that slot is the end token's own, and the policy is never trained to say it.
    """
    reward_BR = torch.where(mask_BR, -kl_coef * kl_BR, 0.0)
    last_B = mask_BR.sum(1) - 1
    is_last_BR = torch.arange(mask_BR.shape[1], device=mask_BR.device) == last_B[:, None]
    return reward_BR + torch.where(is_last_BR, score_B[:, None], 0.0)


def gae(
    reward_BR: Tensor,
    values_BR: Tensor,
    mask_BR: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    after_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, BR each (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lambda * A_{t+1};  return_t = A_t + V_t.
    `after_B` is the value after each response's last token: 0 where the response ended by itself, the critic's where it
    was cut off (partial-episode bootstrapping: Pardo et al. 2018, arXiv 1712.00378). Without it all are 0, as in
    InstructGPT-style work. So TRL 1.12 treats a response that was cut off, but it goes on from the critic's V after an
    end token: its last advantage has gamma * V + gamma * lambda * (score - V) where ours has the score, which is the
    same at gamma = lambda = 1.
    """
    advantages_BR = torch.zeros_like(reward_BR)
    end_B = torch.zeros_like(reward_BR[:, 0]) if after_B is None else after_B
    next_value_B = end_B
    next_advantage_B = torch.zeros_like(end_B)
    for place in reversed(range(reward_BR.shape[1])):
        counts_B = mask_BR[:, place]
        delta_B = reward_BR[:, place] + gamma * next_value_B - values_BR[:, place]
        advantage_B = delta_B + gamma * gae_lambda * next_advantage_B
        next_advantage_B = torch.where(counts_B, advantage_B, 0.0)
        next_value_B = torch.where(counts_B, values_BR[:, place], end_B)
        advantages_BR[:, place] = next_advantage_B
    returns_BR = torch.where(mask_BR, advantages_BR + values_BR, 0.0)
    return advantages_BR, returns_BR


def grpo(reward_BR: Tensor, mask_BR: Tensor, samples: int) -> Tensor:
    """Advantages BR: a response's reward minus the mean of its prompt's samples, over their standard deviation.

    A_{i,t} = (R_i - mean(R)) / (std(R) + 1e-4), the same on every token (Shao et al. 2024, arXiv 2402.03300, sec.
    4.1.2, outcome supervision). R_i sums the response's token rewards, so it carries the KL where rewards do; paper and
    TRL's GRPOTrainer put the KL into the loss. The deviation is the unbiased one, as in TRL, which leaves out of a
    group what cannot be scored as we do what does not train. A response alone in its group, or among equals, gets 0.
    """
    reward_QK, counts_QK = _grouped(reward_BR, mask_BR, samples)
    counted_Q1 = counts_QK.sum(1, keepdim=True)
    mean_Q1 = reward_QK.sum(1, keepdim=True) / counted_Q1.clamp(min=1)
    centred_QK = torch.where(counts_QK, reward_QK - mean_Q1, 0.0)
    variance_Q1 = centred_QK.square().sum(1, keepdim=True) / (counted_Q1 - 1).clamp(min=1)
    return _on_every_token(centred_QK / (variance_Q1.sqrt() + GRPO_EPSILON), reward_BR, mask_BR)


def rloo(reward_BR: Tensor, mask_BR: Tensor, samples: int) -> Tensor:
    """Advantages BR: a response's reward minus the mean reward of its prompt's other samples.

    A_i = R_i - sum_{j != i} R_j / (K - 1), the same on every token (Ahmadian et al. 2024, arXiv 2402.14740: the RLOO
    estimator of Kool et al. 2019 with R_i = score_i - beta * KL_i). The paper and TRL's RLOOTrainer treat a response as
    one action; this loop clips a ratio a token. A response alone in its group gets 0, as in TRL.
    """
    reward_QK, counts_QK = _grouped(reward_BR, mask_BR, samples)
    others_Q1 = counts_QK.sum(1, keepdim=True) - 1
    baseline_QK = (reward_QK.sum(1, keepdim=True) - reward_QK) / others_Q1.clamp(min=1)
    advantage_QK = torch.where(counts_QK & (others_Q1 > 0), reward_QK - baseline_QK, 0.0)
    return _on_every_token(advantage_QK, reward_BR, mask_BR)


def reinforce_plus_plus(reward_BR: Tensor, mask_BR: Tensor, gamma: float) -> Tensor:
    """Advantages BR: discounted rewards to go, whitened over all response tokens of the global batch.

    A_t = r_t + gamma * A_{t+1}, then (A - mean) / std (Hu 2025, arXiv 2501.03262, "global advantage normalization"):
    with gamma 1 and the KL in the reward, score minus beta times the k1 of the tokens from t on. That is `gae` with
    lambda 1 and a critic that says 0. TRL has none; its GRPOTrainer with scale_rewards="batch" normalises responses.
    """
    to_go_BR, _ = gae(reward_BR, torch.zeros_like(reward_BR), mask_BR, gamma=gamma, gae_lambda=1.0)
    return masked_whiten(to_go_BR, mask_BR)


def _grouped(reward_BR: Tensor, mask_BR: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Whole rewards QK of the responses, 0 of those that do not count, and which count QK.

    In float64, where the mean of equal float32 rewards is that reward exactly: equals get 0, not a rounding error over
    a tiny deviation.
    """
    reward_B = torch.where(mask_BR, reward_BR, 0.0).double().sum(1)
    return reward_B.view(-1, samples), mask_BR.any(1).view(-1, samples)


def _on_every_token(advantage_QK: Tensor, reward_BR: Tensor, mask_BR: Tensor) -> Tensor:
    return torch.where(mask_BR, advantage_QK.flatten().to(reward_BR.dtype)[:, None], 0.0)
