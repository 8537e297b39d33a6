"""Log-probabilities of both responses under policy and reference, and their loss, inside TRL's DPOTrainer.

Legend: B pairs, S longest, N packed tokens, M response tokens of all 2B sequences, D hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer

from data.encoded import EncodedPreference
from stages.core import ranks
from stages.core.calibration import reward_figures
from stages.core.logprobs import token_logprobs
from stages.core.models import backbone
from stages.core.padding import pad_right
from stages.core.pairs import judged_pairs, pair_samples
from stages.core.passes import packed_hidden_at
from stages.core.sequences import ResponseBatch
from stages.core.supervised_run import SupervisedRun
from stages.core.trl_training import StageTrainer
from stages.core.tuning import inner_model
from stages.dpo.loss import LogRatios, dpo_loss, label_probability

POLICY, REFERENCE = "default", "ref"  # the adapters, as peft and TRL name them

PairLogprobs = tuple[Tensor, Tensor]  # chosen_B and rejected_B, in nats, summed over the response


def pair_logprobs(
    model: nn.Module,
    rows: Sequence[EncodedPreference],
    *,
    packing: bool,
    precision: AbstractContextManager[object] | None = None,
    multiple: int = 1,
) -> PairLogprobs:
    """Log-probability of each pair's chosen and rejected response, from one forward pass over all 2B sequences.

    Only response positions pass through the head. `precision` is the autocast context; a packed pass holds each pair's
    prompt once, and takes a multiple of `multiple` tokens.
    """
    inner = inner_model(model)
    device = next(model.parameters()).device
    sequences = [row.chosen for row in rows] + [row.rejected for row in rows]
    prompts = [row.prompt_length for row in rows] * 2
    batch = ResponseBatch.of(
        [tokens[:start] for tokens, start in zip(sequences, prompts, strict=True)],
        [tokens[start:] for tokens, start in zip(sequences, prompts, strict=True)],
        device,
        share_prompts=packing,
    )
    with precision or nullcontext():
        if packing:
            hidden_MD = packed_hidden_at(backbone(inner), batch.packed, batch.before_M, multiple=multiple)
        else:
            tokens_BS, mask_BS = pad_right(sequences, device)
            output = backbone(inner)(input_ids=tokens_BS, attention_mask=mask_BS, use_cache=False)
            hidden_MD = output.last_hidden_state[mask_BS][batch.before_M]
        logprobs_M = token_logprobs(hidden_MD, inner.get_output_embeddings(), batch.targets_M, 1.0)
    chosen_B, rejected_B = torch.stack([part.sum() for part in logprobs_M.split(list(batch.lengths))]).chunk(2)
    return chosen_B, rejected_B


class DpoTrainer(StageTrainer, DPOTrainer):
    """TRL's DPOTrainer with soft labels and weights: weighted mean over the whole batch.

    TRL keeps the reference: an adapter called `ref`, copied from the policy's own before training, or the frozen model
    it is given. A resumed run builds both anew from the policy that the stage starts from, and only then loads the
    checkpoint, so the reference stays what it was. TRL also turns dropout off: the loss compares two models.
    """

    def __init__(self, *, run: SupervisedRun[EncodedPreference], **options: Any) -> None:
        super().__init__(run=run, **options)
        self._holdout_reference: list[PairLogprobs] = []
        self._step_logprobs: list[PairLogprobs] = []
        self._step_ratios: list[LogRatios] = []

    def frozen_modules(self) -> list[nn.Module]:
        """The reference, where it is a model of its own."""
        return [] if self.ref_model is None else [self.ref_model]

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The frozen policy that training started from, for as long as the context lasts."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        self.model.set_adapter(REFERENCE)
        try:
            yield self.model
        finally:
            self.model.set_adapter(POLICY)  # trains again, and the reference does not

    def logprobs(self, model: nn.Module, rows: Sequence[EncodedPreference]) -> PairLogprobs:
        """Both responses' log-probabilities under a model, in the run's precision."""
        packing = self.run.context.shared.packing
        precision = self.accelerator.autocast()
        return pair_logprobs(model, rows, packing=packing, precision=precision, multiple=self.multiple)

    @torch.no_grad()
    def ref_logprobs(self, rows: Sequence[EncodedPreference]) -> PairLogprobs:
        """Both responses' log-probabilities under the reference."""
        with self.reference() as reference:
            return self.logprobs(reference, rows)

    def weighted_loss(self, ratios: LogRatios, rows: Sequence[EncodedPreference]) -> Tensor:
        """Weighted sum of the pairs' losses."""
        config = self.run.context.config

        def column(values: Sequence[float]) -> Tensor:
            return ratios.chosen_B.new_tensor(values)

        losses_B = dpo_loss(
            ratios,
            (
                column([len(row.chosen) - row.prompt_length for row in rows]),
                column([len(row.rejected) - row.prompt_length for row in rows]),
            ),
            kind=config.loss,
            beta=config.beta,
            label_B=label_probability(
                column([row.p_chosen for row in rows]),
                label_smoothing=config.label_smoothing,
                robust=config.loss == "robust",
            ),
        )
        return (losses_B * column([row.weight for row in rows])).sum()

    def summed_loss(self, model: nn.Module, rows: Sequence[EncodedPreference]) -> Tensor:
        """Weighted sum of the pairs' losses. The reference goes first: switching adapters touches no graph then."""
        reference = self.ref_logprobs(rows)
        policy = self.logprobs(model, rows)
        ratios = LogRatios(policy[0] - reference[0], policy[1] - reference[1])
        if not self.is_spare_pass:
            self._step_logprobs.append((policy[0].detach().cpu(), policy[1].detach().cpu()))
            self._step_ratios.append(LogRatios(ratios.chosen_B.detach().cpu(), ratios.rejected_B.detach().cpu()))
        return self.weighted_loss(ratios, rows)

    def step_figures(self) -> dict[str, float]:
        """Means over the step's pairs, before its update: log-probabilities, implicit rewards, their margin."""
        figures = pair_figures(
            ranks.gather_lists(self._step_logprobs),
            ranks.gather_lists(self._step_ratios),
            beta=self.run.context.config.beta,
        )
        self._step_logprobs, self._step_ratios = [], []
        return figures

    def holdout_figures(self, step: int) -> dict[str, float]:
        """The training loss on the holdout, and what `stages.core.calibration` says of the implicit rewards."""
        config, passes = self.run.context.config, self.holdout_passes()
        self._holdout_reference = self._holdout_reference or [self.ref_logprobs(rows) for rows in passes]
        policy = [self.logprobs(self.model, rows) for rows in passes]
        ratios = [
            LogRatios(ours[0] - theirs[0], ours[1] - theirs[1])
            for ours, theirs in zip(policy, self._holdout_reference, strict=True)
        ]
        losses = [self.weighted_loss(each, rows).item() for each, rows in zip(ratios, passes, strict=True)]
        own = [
            pair
            for each, rows in zip(ratios, passes, strict=True)
            for pair in judged_pairs((config.beta * each.chosen_B, config.beta * each.rejected_B), rows)
        ]
        loss, pairs = sum(ranks.gather_lists(losses)), ranks.gather_lists(own)
        policy, ratios = ranks.gather_lists(policy), ranks.gather_lists(ratios)
        self.run.context.metrics.samples(step, list(pair_samples(self.run.encoder, self.run.holdout, pairs)))
        figures = pair_figures(policy, ratios, beta=config.beta) | reward_figures(pairs)
        weight = sum(row.weight for row in self.run.holdout)
        return {"eval/loss": loss / weight, **{f"eval/{name}": value for name, value in figures.items()}}


def pair_figures(logprobs: Sequence[PairLogprobs], ratios: Sequence[LogRatios], *, beta: float) -> dict[str, float]:
    """Means over pairs: log-probabilities in nats a response, and beta times the log-ratios, DPO's implicit rewards."""
    chosen_B, rejected_B = (torch.cat(side).double() for side in zip(*logprobs, strict=True))
    chosen_reward_B = beta * torch.cat([each.chosen_B for each in ratios]).double()
    rejected_reward_B = beta * torch.cat([each.rejected_B for each in ratios]).double()
    return {
        "logprobs/chosen": chosen_B.mean().item(),
        "logprobs/rejected": rejected_B.mean().item(),
        "rewards/chosen": chosen_reward_B.mean().item(),
        "rewards/rejected": rejected_reward_B.mean().item(),
        "rewards/margin": (chosen_reward_B - rejected_reward_B).mean().item(),
    }
