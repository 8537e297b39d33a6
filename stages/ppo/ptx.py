"""PTX: language modelling mixed into every optimizer step of the policy (Ouyang et al. 2022, 2203.02155, eq. 2).

Legend: N packed tokens, M tokens to learn, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.chat import ChatEncoder
from data.encoded import EncodedDemonstration
from data.errors import UserError
from data.prepare import prepare_demonstrations
from stages.core import ranks
from stages.core.bank import PolicyBank
from stages.core.context import StageContext
from stages.core.engine import Engine, passes
from stages.core.logprobs import token_logprobs
from stages.core.sequences import PackedBatch, ResponseBatch, split_by_budget
from stages.ppo.config import PpoConfig, PtxConfig
from stages.ppo.order import rows_after


@dataclass(frozen=True)
class Ptx:
    """Demonstrations, and how they are mixed in."""

    rows: Sequence[EncodedDemonstration]
    config: PtxConfig
    microbatch_tokens: int
    seed: int
    device: torch.device

    def backward(self, engine: Engine, bank: PolicyBank, step: int) -> float:
        """Adds the gradient of coef * mean token loss of the step's rows, on all ranks; returns that mean, in nats.

        `step` counts all minibatches of the run from 0, and with the seed fixes the rows. The loss is that of the sft
        stage: on responses only, at temperature 1 whatever the rollout's.
        """
        size = self.config.batch_size
        rows = rows_after(self.rows, step * size, size, seed=self.seed, purpose="ptx")
        tokens = sum(sum(row.loss_mask[1:]) for row in rows)
        own = ranks.balanced_share(rows, [row.length for row in rows])
        budget = split_by_budget([row.length for row in own], self.microbatch_tokens)
        groups = [[own[place] for place in group] for group in budget]
        total = 0.0
        for group, counts in passes(engine, groups, [min(rows, key=lambda row: row.length)]):
            weight = self.config.coef if counts else 0.0
            batch = demonstration_batch(group, self.device)
            loss = engine.backward(
                lambda batch=batch, weight=weight: weight * self._summed_nll(bank, batch) / tokens, "ptx"
            )
            total += float(loss) / self.config.coef
        return sum(ranks.gather_lists([total]))

    def _summed_nll(self, bank: PolicyBank, batch: ResponseBatch) -> Tensor:
        hidden_MD = bank.policy.hidden_before(batch)
        return -token_logprobs(hidden_MD, bank.policy.trunk.lm_head, batch.targets_M, 1.0).sum()


def demonstration_batch(rows: Sequence[EncodedDemonstration], device: torch.device) -> ResponseBatch:
    """The rows, packed; its targets are the tokens to learn. A row's first token is none: nothing stands before it."""
    places: list[int] = []
    targets: list[int] = []
    start = 0
    for row in rows:
        for place in range(1, row.length):
            if row.loss_mask[place]:
                places.append(start + place - 1)
                targets.append(row.tokens[place])
        start += row.length
    return ResponseBatch(
        packed=PackedBatch.of([row.tokens for row in rows], device),
        before_M=torch.tensor(places, device=device),
        targets_M=torch.tensor(targets, device=device),
        lengths=tuple(sum(row.loss_mask[1:]) for row in rows),
    )


def load_ptx(context: StageContext[PpoConfig], encoder: ChatEncoder, device: torch.device) -> Ptx | None:
    """The demonstrations of `ppo.ptx`, encoded as the sft stage does; refused ones in quarantine_ptx.jsonl.

    None where PTX is off. Raises UserError where too many rows were refused or none is left.
    """
    config, shared = context.config.ptx, context.shared
    if config is None:
        return None
    prepared = prepare_demonstrations(
        config.data, 0.0, encoder=encoder, run_folder=context.run_folder, seed=shared.seed
    )
    prepared.report.write_quarantine(context.out / "quarantine_ptx.jsonl")
    prepared.report.check_refused(shared.max_refused)
    context.metrics.say(f"ptx: {prepared.report.summary()}")
    rows = [row for row in prepared.train if any(row.loss_mask[1:])]
    if not rows:
        raise UserError("ppo.ptx.data: no row has a token to learn; give rows with a prompt and a response")
    return Ptx(rows, config, context.config.microbatch_tokens, shared.seed, device)
