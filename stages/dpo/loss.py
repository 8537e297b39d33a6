"""DPO's loss. Legend: B pairs."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True)
class LogRatios:
    """log pi(response) - log pi_ref(response) of both sides of B pairs, in nats, summed over the response's tokens."""

    chosen_B: Tensor
    rejected_B: Tensor


def label_probability(p_chosen_B: Tensor, *, label_smoothing: float, robust: bool) -> Tensor:
    """The weight q_B of "chosen is the better", when a share e of the labels is wrong.

    Hedged, q = p (1 - e) + (1 - p) e: each label may be wrong ("conservative DPO", Mitchell 2023).
    Robust, q = (p - e) / (1 - 2e), which may exceed 1: the mean of the loss over noisy labels is then the loss of clean
    ones (Chowdhury et al. 2024, 2403.00409, eq. 12). For p = 1 these are the weights 1 - e and (1 - e) / (1 - 2e).
    """
    if robust:
        return (p_chosen_B - label_smoothing) / (1 - 2 * label_smoothing)
    return p_chosen_B * (1 - label_smoothing) + (1 - p_chosen_B) * label_smoothing


def dpo_loss(
    ratios: LogRatios,
    lengths_2B: tuple[Tensor, Tensor],
    *,
    kind: Literal["sigmoid", "ipo", "robust"],
    beta: float,
    label_B: Tensor,
) -> Tensor:
    """loss_B = q l(d) + (1 - q) l(-d), with the label's weight q and d the log-ratio of chosen minus that of rejected.

    sigmoid, robust: l(d) = -log sigmoid(beta d) (Rafailov et al. 2023, 2305.18290, eq. 7). ipo: l(d) = (d - 1/(2
    beta))^2 (Azar et al. 2023, 2310.12036, eq. 17, where beta is tau), log-ratios per token of each response
    (`lengths_2B`), as TRL has it by the authors' word.

    TRL's DPOTrainer has q = 1 in sigmoid and ipo, where it ignores label_smoothing, and no weights.
    """
    if kind == "ipo":
        d_B = ratios.chosen_B / lengths_2B[0] - ratios.rejected_B / lengths_2B[1]
        target = 1 / (2 * beta)
        return label_B * (d_B - target).square() + (1 - label_B) * (d_B + target).square()
    x_B = beta * (ratios.chosen_B - ratios.rejected_B)
    return label_B * softplus(-x_B) + (1 - label_B) * softplus(x_B)
