"""The sampler is not quite the trainer: by how much, and what weight that gives a token.

Legend: B responses, R longest response, M response tokens that train, one after the other.
"""

import torch
from torch import Tensor

from stages.core.ops import kl_estimate
from stages.core.rollout.protocol import EngineError
from stages.ppo.experience import Experience


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi(token) / mu(token), cap) of each token: pi the trainer before the update, mu whoever sampled it.

    Truncated importance sampling (Ionides 2008; Yao et al. 2025, Your efficient RL framework secretly brings you
    off-policy RL training): a constant to the gradient. The ratio that PPO clips is new / pi, so new / mu is covered by
    their product, as in decoupled PPO (Hilton et al. 2021, 2110.00641). TRL 1.16's `token_truncate` is this, with a
    cap of 3; its default is one weight a sequence, whose spread grows with the length.
    """
    return torch.exp(logprobs - sampler_logprobs).clamp(max=cap).detach()


def importance_figures(experience: Experience, cap: float | None) -> dict[str, float]:
    """Mean and largest weight over the tokens that train, and the share cut to the cap; nothing without weights."""
    mask_BR, sampler_logprobs_BR = experience.loss_mask_BR, experience.sampler_logprobs_BR
    if cap is None or sampler_logprobs_BR is None or not bool(mask_BR.any()):
        return {}
    logprobs_M, sampler_logprobs_M = experience.logprobs_BR[mask_BR], sampler_logprobs_BR[mask_BR]
    weights_M = importance_weights(logprobs_M, sampler_logprobs_M, cap)
    return {
        "importance/mean": float(weights_M.mean()),
        "importance/max": float(weights_M.max()),
        "importance/truncated": float((torch.exp(logprobs_M - sampler_logprobs_M) > cap).float().mean()),
    }


def sampler_kl(sampler_logprobs_M: Tensor, logprobs_M: Tensor) -> float:
    """KL(sampler || trainer) in nats, the mean of k3 over tokens that the sampler drew from the same weights."""
    return float(kl_estimate(sampler_logprobs_M.double(), logprobs_M.double(), "k3").mean())


def check_sampler(kl: float, bound: float, version: int) -> dict[str, float]:
    """The figure of a log. Raises EngineError where sampler and trainer are too far apart, or not finite."""
    if not kl <= bound:
        raise EngineError(
            f"rollout engine: kl/sampler_trainer={kl:.3g} nats per token with policy version {version}, above "
            f"ppo.rollout.max_sampler_kl={bound:g}: what samples is not what trains; compare dtypes, try "
            "engine=native, or raise the bound"
        )
    return {"kl/sampler_trainer": kl}
