"""One update's experience: prompts → responses → scores, reference log-probabilities, values → advantages.

Legend: B responses, R longest response, M response tokens one after the other.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from stages.core import ranks
from stages.core.bank import PolicyBank, TokenOutputs
from stages.core.ops import WHITEN_EPSILON, kl_estimate, masked_whiten
from stages.core.responses import Responses, Sampler
from stages.core.rewards import Scorer
from stages.core.sequences import ResponseBatch
from stages.ppo.advantages import gae, grpo, reinforce_plus_plus, rloo, token_rewards
from stages.ppo.config import PpoConfig
from stages.ppo.control import ScoreShaper, overlong_penalty


class ValueFit(NamedTuple):
    """The factor and the offset with which a critic's values fit best what rewards came after them.

    A reward model was taught to tell finished responses apart, not what to expect in the middle of one: on the
    quickstart its values explain -3.7 of the variance of the first returns as they are, 0.04 at a tenth of their size.
    And a critic that says 0 where scores are above 0 on average gives the last tokens of every response, its end among
    them, more advantage than the first, by gae_lambda a step: the policy would learn to end early.
    """

    factor: float
    offset: float

    @classmethod
    def of(cls, values_BR: Tensor, reward_BR: Tensor, mask_BR: Tensor, gamma: float) -> "ValueFit":
        """By least squares over the tokens that train. A factor of 0 where the values point the wrong way."""
        _, returns_BR = gae(reward_BR, torch.zeros_like(values_BR), mask_BR, gamma=gamma, gae_lambda=1.0)
        values_M, returns_M = values_BR[mask_BR], returns_BR[mask_BR]
        if not len(values_M):
            return cls(1.0, 0.0)
        apart_M = values_M - values_M.mean()
        spread = float(apart_M.square().sum())
        is_constant = spread <= 1e-8 * float(values_M.square().sum())
        factor = 1.0 if is_constant else max(0.0, float((apart_M * returns_M).sum()) / spread)
        return cls(factor, float(returns_M.mean()) - factor * float(values_M.mean()))

    def values(self, values: Tensor, where: Tensor) -> Tensor:
        """The fitted values, 0 elsewhere."""
        return torch.where(where, self.factor * values + self.offset, 0.0)


@dataclass(frozen=True)
class Experience:
    """What one update learns from; tensors on the CPU, padded positions 0.

    Responses that `overlong.filter` removes, or that have no score, are out of `loss_mask_BR` and have no advantage and
    no return; the figures of a log still describe them, as the policy sampled them. Without a critic there are no
    values and no returns.
    """

    responses: Responses
    score_B: Tensor  # as the reward source gave it; NaN where it gave none
    mask_BR: Tensor
    loss_mask_BR: Tensor  # True trains
    logprobs_BR: Tensor  # the trainer's, before the update
    ref_logprobs_BR: Tensor
    values_BR: Tensor | None
    advantages_BR: Tensor
    returns_BR: Tensor | None
    score_seconds: float
    value_fit: ValueFit | None = None  # what `values_BR` have in them and the critic itself not yet
    sampler_logprobs_BR: Tensor | None = None  # as the engine reported them; None: the sampler is the trainer

    def __post_init__(self) -> None:
        shape = self.mask_BR.shape
        names = ("loss_mask_BR", "logprobs_BR", "ref_logprobs_BR", "sampler_logprobs_BR", "values_BR")
        for name in (*names, "advantages_BR", "returns_BR"):
            each: Tensor | None = getattr(self, name)
            assert each is None or each.shape == shape, (name, each.shape, shape)
        assert (self.values_BR is None) == (self.returns_BR is None)
        assert self.score_B.shape == shape[:1]

    @property
    def kl_B(self) -> Tensor:
        """KL(policy || reference) of each response in nats: the sum of its tokens' k1 estimates."""
        return (self.logprobs_BR - self.ref_logprobs_BR).sum(1)

    @cached_property
    def value_unit(self) -> float:
        """In which squared errors of values are told: the variance of the returns that train.

        Or the mean squared error, where that is larger: returns that are all alike, as of a sparse reward, would else
        make any error of the critic a huge one.
        """
        assert self.values_BR is not None
        assert self.returns_BR is not None
        returns_M = self.returns_BR[self.loss_mask_BR]
        errors_M = returns_M - self.values_BR[self.loss_mask_BR]
        return max(float(returns_M.var(correction=0)), float(errors_M.square().mean()), WHITEN_EPSILON)


@dataclass(frozen=True)
class Collector:
    """Makes experience from prompts with everything that stays the same from update to update."""

    bank: PolicyBank
    sampler: Sampler
    scorer: Scorer
    config: PpoConfig
    device: torch.device

    def collect(
        self,
        responses: Responses,
        rescored: TokenOutputs | None = None,
        *,
        kl_coef: float,
        shaper: ScoreShaper,
        fit_values: bool = False,
    ) -> Experience:
        """One update's experience from its responses; `shaper` counts their scores.

        `rescored` is what the trainer says of tokens that another program sampled; None: the policy itself sampled.
        `fit_values`: the critic's values are fitted to the rewards that came after them.
        """
        config = self.config
        started = time.perf_counter()
        scores = self.scorer.score(responses.answered())
        mask_BR = responses.mask()
        loss_mask_BR = mask_BR & trains(responses, scores, config)[:, None]
        sampler_logprobs_BR = _padded(responses.logprobs(), mask_BR)
        logprobs_BR = sampler_logprobs_BR if rescored is None else _padded(rescored.logprobs_M, mask_BR)
        ref_logprobs_BR = self.ref_logprobs(responses, mask_BR)
        read_M = responses.values() if rescored is None else rescored.values_M
        values_BR, after_B = self.values(responses, mask_BR, read_M) if config.has_critic else (None, None)
        kl_BR = kl_estimate(logprobs_BR, ref_logprobs_BR, config.kl.estimator)
        shaped_B = shaped_scores(scores, responses, config, shaper)
        reward_BR = token_rewards(shaped_B, kl_BR, loss_mask_BR, kl_coef if config.kl.place == "reward" else 0.0)
        fit: ValueFit | None = None
        if fit_values and values_BR is not None and after_B is not None:
            fit = ValueFit.of(values_BR, reward_BR, loss_mask_BR, config.gamma)
            values_BR = fit.values(values_BR, mask_BR)
            if config.bootstrap_truncated:
                after_B = fit.values(after_B, ~torch.tensor(responses.finished))
        advantages_BR, returns_BR = estimate_advantages(reward_BR, values_BR, after_B, loss_mask_BR, config)
        return Experience(
            responses=responses,
            score_B=torch.tensor(scores),
            mask_BR=mask_BR,
            loss_mask_BR=loss_mask_BR,
            logprobs_BR=logprobs_BR,
            ref_logprobs_BR=ref_logprobs_BR,
            values_BR=values_BR,
            advantages_BR=advantages_BR,
            returns_BR=returns_BR,
            score_seconds=time.perf_counter() - started,
            value_fit=fit,
            sampler_logprobs_BR=None if rescored is None else sampler_logprobs_BR,
        )

    @torch.no_grad()
    def rescored(self, responses: Responses) -> TokenOutputs:
        """What the policy says of responses that another program sampled: log-probabilities M, and a shared critic's
        values, which the same pass gives."""
        columns = self._by_row(responses, lambda batch: [each for each in self.bank.outputs(batch) if each is not None])
        return TokenOutputs(columns[0], columns[1] if len(columns) > 1 else None, None)

    @torch.no_grad()
    def ref_logprobs(self, responses: Responses, mask_BR: Tensor) -> Tensor:
        """The reference's log-probabilities BR."""
        (ref_logprobs_M,) = self._by_row(responses, lambda batch: [self.bank.ref_logprobs(batch)])
        return _padded(ref_logprobs_M, mask_BR)

    @torch.no_grad()
    def values(self, responses: Responses, mask_BR: Tensor, read_M: Tensor | None) -> tuple[Tensor, Tensor]:
        """The critic's values BR, and B what it expects after each response's last token.

        0 after a response that ended by itself. After one that was cut off, the value of the state that its last token
        leads to where `bootstrap_truncated` is on, else 0 too. `read_M`, values that came with the rollout or with the
        rescoring, are not computed again.
        """
        after_B = torch.zeros(len(mask_BR))
        if read_M is not None and not self.config.bootstrap_truncated:
            values_M = read_M
        elif self.config.bootstrap_truncated:
            values_M, after_B = self._by_row(responses, self.bank.values_and_after)
            after_B = torch.where(torch.tensor(responses.finished), 0.0, after_B)
        else:
            (values_M,) = self._by_row(responses, lambda batch: [self.bank.values(batch)])
        return _padded(values_M, mask_BR), after_B

    def _by_row(self, responses: Responses, compute: Callable[[ResponseBatch], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """What `compute` gives of batches, for all responses in their order; float32, on the CPU.

        Each of its tensors has a value a response token, or one a response. Each rank asks for its part of the
        responses, and all get every value.
        """
        own = responses.share(range(len(responses.completions)))
        found: list[tuple[int, list[Tensor]]] = []
        for rows in responses.microbatches(own, self.config.microbatch_tokens):
            batch = responses.batch(rows, self.device)
            columns = [
                each.float().cpu().split(list(batch.lengths) if len(each) == len(batch.targets_M) else 1)
                for each in compute(batch)
            ]
            found += [(row, list(parts)) for row, *parts in zip(rows, *columns, strict=True)]
        by_row = sorted(ranks.gather_lists(found), key=lambda each: each[0])
        return tuple(torch.cat(column) for column in zip(*(parts for _, parts in by_row), strict=True))


def trains(responses: Responses, scores: Sequence[float], config: PpoConfig) -> Tensor:
    """Which responses B are in the loss: all with a score, or those that also ended (DAPO's overlong filtering).

    Yu et al. 2025, arXiv 2503.14476, sec. 3.4: the score of a cut response is noise. What it leaves out is left out of
    every statistic too: of the running score statistics, of a prompt's group, of the whitening.
    """
    scored_B = ~torch.tensor(scores).isnan()
    return scored_B & torch.tensor(responses.finished) if config.overlong.filter else scored_B


def shaped_scores(scores: Sequence[float], responses: Responses, config: PpoConfig, shaper: ScoreShaper) -> Tensor:
    """Scores B as they enter the reward, 0 where there is none; `shaper` counts those of responses that train."""
    overlong = [overlong_penalty(length, config.response_length, config.overlong) for length in responses.lengths]
    trains_B = trains(responses, scores, config)
    known = [0.0 if math.isnan(score) else score for score in scores]
    return torch.tensor(shaper.shape(known, responses.finished, overlong, trains_B.tolist()))


def estimate_advantages(
    reward_BR: Tensor, values_BR: Tensor | None, after_B: Tensor | None, mask_BR: Tensor, config: PpoConfig
) -> tuple[Tensor, Tensor | None]:
    """Advantages BR by the estimator of `advantage`, and returns BR where there is a critic to learn them.

    GAE's are whitened over all response tokens of the update, mean removed, as in TRL (Huang et al. 2024, 2403.17031).
    REINFORCE++ whitens by definition; GRPO and RLOO have a scale of their own.
    """
    if values_BR is not None:
        gamma, gae_lambda = config.gamma, config.gae_lambda
        advantages_BR, returns_BR = gae(
            reward_BR, values_BR, mask_BR, gamma=gamma, gae_lambda=gae_lambda, after_B=after_B
        )
        return masked_whiten(advantages_BR, mask_BR), returns_BR
    if config.advantage == "grpo":
        return grpo(reward_BR, mask_BR, config.samples_per_prompt), None
    if config.advantage == "rloo":
        return rloo(reward_BR, mask_BR, config.samples_per_prompt), None
    return reinforce_plus_plus(reward_BR, mask_BR, config.gamma), None


def _padded(values_M: Tensor, mask_BR: Tensor) -> Tensor:
    """Response tokens one after the other, laid out as BR with 0 in the padding."""
    values_BR = torch.zeros(mask_BR.shape)
    values_BR[mask_BR] = values_M
    return values_BR
