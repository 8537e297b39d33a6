"""The reward model's loss. Legend: B pairs."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def preference_loss(
    chosen_B: Tensor, rejected_B: Tensor, *, p_chosen_B: Tensor, margin_B: Tensor, centering: float
) -> Tensor:
    """loss_B: Bradley-Terry cross-entropy with margin and soft labels, plus the centering term.

    d = score_chosen - score_rejected, p = probability that chosen is the better, m = margin >= 0:

        x = d - sign(2p - 1) * m
        loss = -p * log sigmoid(x) - (1 - p) * log sigmoid(-x) + centering * (score_chosen + score_rejected)^2

    The margin is taken off in the preferred direction, and a tie (p = 1/2) has none; so the loss does not change when
    the two sides and p are swapped. p = 1 is Llama 2's eq. 2 (2307.09288), m = 0 the cross-entropy against soft labels
    (label smoothing in Wang et al. 2024, 2401.06080, sec. 2); centering is eq. 2 of Eisenstein et al. 2023
    (2312.09244). TRL's RewardTrainer has p = 1 only.
    """
    x_B = chosen_B - rejected_B - torch.sign(2 * p_chosen_B - 1) * margin_B
    return (
        binary_cross_entropy_with_logits(x_B, p_chosen_B, reduction="none")
        + centering * (chosen_B + rejected_B).square()
    )
