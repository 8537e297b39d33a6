"""The small numerical pieces of RLHF, one named function each, plain tensors in and out.

Legend: B sequences, R padded response. A mask is bool, True counts. Padded positions hold 0 and never matter.
"""

import torch
from torch import Tensor

WHITEN_EPSILON = 1e-8


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `values` where `mask` is True; 0 where it is True nowhere."""
    kept = torch.where(mask, values, 0.0)
    return kept.sum() / mask.sum().clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor) -> Tensor:
    """`values` with mean 0 and standard deviation 1 over the positions where `mask` is True, 0 elsewhere.

    The mean is removed and the variance is the unbiased one (divided by n - 1), as in TRL's masked_whiten with
    shift_mean=True; torchtune's flag of that name adds the mean back.
    """
    count = mask.sum()
    centred = torch.where(mask, values - masked_mean(values, mask), 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + WHITEN_EPSILON)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimates of KL(policy || reference) in nats, from tokens sampled by the policy.

    With d = log pi - log pi_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (Schulman, "Approximating KL
    divergence", 2020). k1 and k3 are unbiased; k2 and k3 are never negative. TRL 1.12 marks
    padding by log-probabilities of 1 on both sides, which cancel here; ours are 0.
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"no KL estimator {estimator!r}")


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over True positions: 1 is a perfect critic, 0 a constant one.

    0 where the mask is True nowhere.
    """
    if not bool(mask.any()):
        return torch.zeros(())
    residual = (returns - values)[mask]
    spread = returns[mask].var(correction=0)
    return 1 - residual.var(correction=0) / spread.clamp(min=WHITEN_EPSILON)
