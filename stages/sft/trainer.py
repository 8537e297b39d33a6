"""The loss of supervised fine-tuning, inside TRL's SFTTrainer.

Legend: B sequences, S longest, N packed tokens, M tokens to learn, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trl import SFTTrainer

from data.encoded import EncodedDemonstration
from stages.core import ranks
from stages.core.models import backbone
from stages.core.padding import pad_right
from stages.core.passes import packed_inputs, rounded_up
from stages.core.sequences import PackedBatch
from stages.core.supervised_run import Measured
from stages.core.trim import trimmed
from stages.core.trl_training import StageTrainer
from stages.core.tuning import inner_model

LARGEST_EXPONENT = 700.0  # exp of more is not a float


@dataclass(frozen=True)
class LossPlaces:
    """Where the tokens to learn stand: which row, the place just before (whose output predicts it), and the token."""

    row_M: Tensor
    before_M: Tensor
    target_M: Tensor

    @classmethod
    def of(cls, rows: Sequence[EncodedDemonstration]) -> "LossPlaces":
        """The places of all rows. The one-position shift happens here only; a row's first token has none before it."""
        places = [
            (number, place - 1, row.tokens[place])
            for number, row in enumerate(rows)
            for place in range(1, len(row.tokens))
            if row.loss_mask[place]
        ]
        row_M, before_M, target_M = torch.tensor(places, dtype=torch.long).reshape(-1, 3).unbind(1)
        return cls(row_M, before_M, target_M)


def measure(rows: Sequence[EncodedDemonstration]) -> Measured[EncodedDemonstration]:
    """What these rows hold; each token to learn weighs the same."""
    tokens = sum(len(row.tokens) for row in rows)
    return Measured(rows, tokens=tokens, weight=float(sum(sum(row.loss_mask[1:]) for row in rows)))


def summed_nll(model: nn.Module, rows: Sequence[EncodedDemonstration], *, packing: bool, multiple: int = 1) -> Tensor:
    """Negative log-likelihood, in nats, of all tokens to learn, summed (float32).

    Packed, every row is a document of its own, logits are computed at the M needed places only, and the pass takes a
    multiple of `multiple` tokens.
    """
    places = LossPlaces.of(rows)
    sequences = [row.tokens for row in rows]
    device = next(model.parameters()).device
    target_M = places.target_M.to(device)
    if packing:
        packed = PackedBatch.of(sequences, device)
        starts_B = torch.tensor([0, *(len(sequence) for sequence in sequences[:-1])]).cumsum(0)
        before_M = (starts_B[places.row_M] + places.before_M).to(device)
        keep = rounded_up(before_M, packed, multiple=multiple)
        with trimmed(backbone(inner_model(model)), keep):
            output = model(**packed_inputs(packed, multiple=multiple), logits_to_keep=keep)
        logits_MV = output.logits[0, : len(before_M)]
    else:
        tokens_BS, mask_BS = pad_right(sequences, device)
        logits_BSV = model(input_ids=tokens_BS, attention_mask=mask_BS, use_cache=False).logits
        logits_MV = logits_BSV[places.row_M.to(device), places.before_M.to(device)]
    return cross_entropy(logits_MV.float(), target_M, reduction="sum")


class SftTrainer(StageTrainer, SFTTrainer):
    """TRL's SFTTrainer on rows that are tokens already: mean over all tokens to learn of the whole batch."""

    def summed_loss(self, model: nn.Module, rows: Sequence[EncodedDemonstration]) -> Tensor:
        """Summed negative log-likelihood."""
        with self.accelerator.autocast():
            return summed_nll(model, rows, packing=self.run.context.shared.packing, multiple=self.multiple)

    def holdout_figures(self, step: int) -> dict[str, float]:
        """Mean negative log-likelihood a token to learn, and its exponential."""
        own = [(self.summed_loss(self.model, rows).item(), measure(rows).weight) for rows in self.holdout_passes()]
        totals, weights = zip(*ranks.gather_lists(own), strict=True)
        loss = sum(totals) / sum(weights)
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, LARGEST_EXPONENT))}
