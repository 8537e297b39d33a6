"""Scores and loss of the reward model, inside TRL's RewardTrainer.

Legend: B sequences or pairs, S longest, N packed tokens, D hidden size.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from trl import RewardTrainer

from data.encoded import EncodedPreference
from stages.core import ranks
from stages.core.calibration import JudgedPair, reward_figures
from stages.core.models import backbone
from stages.core.padding import pad_right
from stages.core.pairs import judged_pairs, pair_samples
from stages.core.passes import packed_hidden_at
from stages.core.sequences import PackedBatch
from stages.core.trl_training import StageTrainer
from stages.core.tuning import inner_model
from stages.rm.loss import preference_loss


def last_token_scores(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    packing: bool,
    prompts: Sequence[int] | None = None,
    precision: AbstractContextManager[object] | None = None,
    multiple: int = 1,
) -> Tensor:
    """score_B: the head at each sequence's last token, which is known by its place, never by looking for padding.

    `precision` is the autocast context of the backbone; the head always runs in float32. A packed pass takes a multiple
    of `multiple` tokens, and holds a prompt once that several sequences begin with: `prompts` are their lengths.
    """
    inner = inner_model(model)
    device = next(model.parameters()).device
    with precision or nullcontext():
        if packing:
            packed = PackedBatch.of(sequences, device, prompts=prompts)
            last_BD = packed_hidden_at(backbone(inner), packed, packed.last_B, multiple=multiple)
        else:
            tokens_BS, mask_BS = pad_right(sequences, device)
            output = backbone(inner)(input_ids=tokens_BS, attention_mask=mask_BS, use_cache=False)
            rows_B = torch.arange(len(sequences), device=device)
            last_BD = output.last_hidden_state[rows_B, mask_BS.sum(1) - 1]
    return inner.score(last_BD.float())[:, 0]


def pair_losses(
    scores_2B: tuple[Tensor, Tensor], rows: Sequence[EncodedPreference], *, centering: float
) -> tuple[Tensor, Tensor]:
    """loss_B of each pair, and the pairs' weights."""
    chosen_B, rejected_B = scores_2B
    losses_B = preference_loss(
        chosen_B,
        rejected_B,
        p_chosen_B=chosen_B.new_tensor([row.p_chosen for row in rows]),
        margin_B=chosen_B.new_tensor([row.margin for row in rows]),
        centering=centering,
    )
    return losses_B, chosen_B.new_tensor([row.weight for row in rows])


class RmTrainer(StageTrainer, RewardTrainer):
    """TRL's RewardTrainer with margins, soft labels, weights and centering: weighted mean over the whole batch."""

    def scores(self, model: nn.Module, rows: Sequence[EncodedPreference]) -> tuple[Tensor, Tensor]:
        """Scores of the chosen and of the rejected sides, from one forward pass."""
        scores_2B = last_token_scores(
            model,
            [row.chosen for row in rows] + [row.rejected for row in rows],
            packing=self.run.context.shared.packing,
            prompts=[row.prompt_length for row in rows] * 2,
            precision=self.accelerator.autocast(),
            multiple=self.multiple,
        )
        chosen_B, rejected_B = scores_2B.chunk(2)
        return chosen_B, rejected_B

    def summed_loss(self, model: nn.Module, rows: Sequence[EncodedPreference]) -> Tensor:
        """Weighted sum of the pairs' losses."""
        losses_B, weight_B = pair_losses(self.scores(model, rows), rows, centering=self.run.context.config.centering)
        return (losses_B * weight_B).sum()

    def holdout_figures(self, step: int) -> dict[str, float]:
        """The training loss on the holdout, and what `stages.core.calibration` says of the scores."""
        parts: list[tuple[float, float]] = []
        own: list[JudgedPair] = []
        for rows in self.holdout_passes():
            scores = self.scores(self.model, rows)
            losses_B, weight_B = pair_losses(scores, rows, centering=self.run.context.config.centering)
            parts.append(((losses_B * weight_B).sum().item(), weight_B.sum().item()))
            own += judged_pairs(scores, rows)
        totals, weights = zip(*ranks.gather_lists(parts), strict=True)
        pairs = ranks.gather_lists(own)
        self.run.context.metrics.samples(step, list(pair_samples(self.run.encoder, self.run.holdout, pairs)))
        figures = {f"eval/{name}": value for name, value in reward_figures(pairs).items()}
        return {"eval/loss": sum(totals) / sum(weights), **figures}
