"""One update's experience: prompts → responses → scores, reference log-probabilities, values → advantages.

Legend: B responses, R longest response, M response tokens one after the other.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.encoded import EncodedPrompt
from stages.core.bank import PolicyBank
from stages.core.ops import kl_estimate, masked_whiten
from stages.core.responses import Responses, Sampler
from stages.core.rewards import Scorer
from stages.ppo.advantages import gae, token_rewards
from stages.ppo.config import PpoConfig
from stages.ppo.control import ScoreShaper


@dataclass(frozen=True)
class Experience:
    """What one update learns from; tensors on the CPU, padded positions 0."""

    responses: Responses
    score_B: Tensor  # as the reward source gave it
    mask_BR: Tensor
    logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    values_BR: Tensor
    advantages_BR: Tensor
    returns_BR: Tensor
    rollout_seconds: float
    score_seconds: float

    def __post_init__(self) -> None:
        shape = self.mask_BR.shape
        for name in ("logprobs_BR", "ref_logprobs_BR", "values_BR", "advantages_BR", "returns_BR"):
            assert getattr(self, name).shape == shape, (name, getattr(self, name).shape, shape)
        assert self.score_B.shape == shape[:1]

    @property
    def kl_B(self) -> Tensor:
        """KL(policy || reference) of each response in nats: the sum of its tokens' k1 estimates."""
        return (self.logprobs_BR - self.ref_logprobs_BR).sum(1)


@dataclass(frozen=True)
class Collector:
    """Makes experience from prompts with everything that stays the same from update to update."""

    bank: PolicyBank
    sampler: Sampler
    scorer: Scorer
    config: PpoConfig
    device: torch.device

    def collect(
        self, prompts: Sequence[EncodedPrompt], update: int, *, kl_coef: float, shaper: ScoreShaper
    ) -> Experience:
        """One update's experience; `shaper` counts its scores."""
        started = time.perf_counter()
        responses = self.sampler.respond(prompts, "train", update, self.config.samples_per_prompt)
        sampled = time.perf_counter()
        scores = self.scorer.score(responses.answered())
        mask_BR = responses.mask()
        ref_logprobs_BR, values_BR = self.judge(responses, mask_BR)
        logprobs_BR = _padded(responses.logprobs(), mask_BR)
        kl_BR = kl_estimate(logprobs_BR, ref_logprobs_BR, self.config.kl.estimator)
        shaped_B = torch.tensor(shaper.shape(scores, responses.finished))
        reward_BR = token_rewards(shaped_B, kl_BR, mask_BR, kl_coef)
        advantages_BR, returns_BR = gae(
            reward_BR, values_BR, mask_BR, gamma=self.config.gamma, gae_lambda=self.config.gae_lambda
        )
        return Experience(
            responses=responses,
            score_B=torch.tensor(scores),
            mask_BR=mask_BR,
            logprobs_BR=logprobs_BR,
            ref_logprobs_BR=ref_logprobs_BR,
            values_BR=values_BR,
            advantages_BR=masked_whiten(advantages_BR, mask_BR),
            returns_BR=returns_BR,
            rollout_seconds=sampled - started,
            score_seconds=time.perf_counter() - sampled,
        )

    @torch.no_grad()
    def judge(self, responses: Responses, mask_BR: Tensor) -> tuple[Tensor, Tensor]:
        """Reference log-probabilities and critic values, BR each."""
        ref_logprobs: list[Tensor] = []
        values: list[Tensor] = []
        for rows in responses.microbatches(range(len(mask_BR)), self.config.microbatch_tokens):
            batch = responses.batch(rows, self.device)
            ref_logprobs.append(self.bank.ref_logprobs(batch).cpu())
            values.append(self.bank.values(batch).float().cpu())
        return _padded(torch.cat(ref_logprobs), mask_BR), _padded(torch.cat(values), mask_BR)


def _padded(values_M: Tensor, mask_BR: Tensor) -> Tensor:
    """Response tokens one after the other, laid out as BR with 0 in the padding."""
    values_BR = torch.zeros(mask_BR.shape)
    values_BR[mask_BR] = values_M
    return values_BR
