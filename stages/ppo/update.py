"""The update: epochs of minibatches of microbatches over one experience.

Legend: B responses, R longest response, M response tokens of a microbatch.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.errors import UserError
from stages.core.bank import PolicyBank
from stages.core.rollout.protocol import rollout_seed
from stages.ppo.config import PpoConfig
from stages.ppo.experience import Experience
from stages.ppo.loss import policy_loss, value_loss

# A head alone learns slowly at a LoRA policy's rate: 25x brought a shared critic's explained variance above 0.
SHARED_HEAD_RATE = 25.0
ADAM_EPSILON = 1e-5  # Huang et al. 2024 (2403.17031), detail 13


@dataclass(frozen=True)
class Updater:
    """The optimizer over policy and critic, and how it is stepped."""

    bank: PolicyBank
    config: PpoConfig
    optimizer: torch.optim.Optimizer
    device: torch.device
    seed: int

    def update(self, experience: Experience, update: int) -> dict[str, float]:
        """Trains on one experience and returns its metrics: means over response tokens of all epochs.

        `update` counts from 1; it fixes the order of the minibatches and the learning rate.
        """
        config = self.config
        self._set_learning_rates(update)
        sums: dict[str, float] = defaultdict(float)
        first_ratio = 1.0
        steps = 0
        for epoch in range(config.epochs):
            for rows in self._minibatches(len(experience.score_B), update, epoch):
                part = self._minibatch_step(experience, rows, policy_trains=update > config.critic_warmup)
                if steps == 0:
                    first_ratio = part["policy/ratio_mean"]
                steps += 1
                for name, value in part.items():
                    sums[name] += value
        means = {name: total / steps for name, total in sums.items()}
        return means | {"policy/first_ratio_mean": first_ratio, "lr": self.optimizer.param_groups[0]["lr"]}

    def _minibatches(self, count: int, update: int, epoch: int) -> list[list[int]]:
        """Every response once, in an order that depends on seed, update and epoch alone."""
        generator = torch.Generator().manual_seed(rollout_seed(self.seed, "minibatches", update, epoch, 0))
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        size = self.config.minibatch_size
        return [order[start : start + size] for start in range(0, count, size)]

    def _minibatch_step(self, experience: Experience, rows: Sequence[int], *, policy_trains: bool) -> dict[str, float]:
        """One optimizer step; losses are divided by the response tokens of the minibatch, not of a microbatch.

        Raises UserError, before the step, where loss or gradient is not finite.
        """
        tokens = int(experience.mask_BR[list(rows)].sum())
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = defaultdict(float)
        for group in experience.responses.microbatches(rows, self.config.microbatch_tokens):
            loss, part = self._microbatch_loss(experience, group, policy_trains=policy_trains)
            (loss / tokens).backward()
            for name, value in part.items():
                sums[name] += value / tokens
        if not policy_trains:
            for parameter in self.bank.policy.parameters():  # a shared critic's loss reaches the policy's trunk
                parameter.grad = None
        parameters = [each for group in self.optimizer.param_groups for each in group["params"]]
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))
        if not (math.isfinite(grad_norm) and math.isfinite(sums["loss"])):
            origins = ", ".join(experience.responses.prompts[row].origin for row in rows)
            raise UserError(
                f"ppo: loss is {sums['loss']} and the gradient norm {grad_norm} on prompts {origins}; no update was "
                f"made: look at their scores, or lower ppo.learning_rate={self.config.learning_rate}"
            )
        self.optimizer.step()
        return dict(sums) | {"grad_norm": grad_norm}

    def _microbatch_loss(
        self, experience: Experience, rows: list[int], *, policy_trains: bool
    ) -> tuple[Tensor, dict[str, float]]:
        """The summed loss of a microbatch and its summed metrics."""
        config = self.config
        batch = experience.responses.batch(rows, self.device)
        mask_BR = experience.mask_BR[rows]
        logprobs_M, values_M, advantages_M, returns_M = (
            each_BR[rows][mask_BR].to(self.device)
            for each_BR in (
                experience.logprobs_BR,
                experience.values_BR,
                experience.advantages_BR,
                experience.returns_BR,
            )
        )
        new_logprobs_M, new_values_M = self.bank.logprobs_and_values(batch)
        loss_policy = policy_loss(new_logprobs_M, logprobs_M, advantages_M, config.clip_range)
        loss_value = value_loss(new_values_M.float(), values_M, returns_M, config.value_clip_range)
        loss = config.value_coef * loss_value + (loss_policy if policy_trains else 0.0)
        with torch.no_grad():
            ratio_M = torch.exp(new_logprobs_M - logprobs_M)
            part = {
                "loss": loss,
                "policy/loss": loss_policy,
                "value/loss": loss_value,
                "policy/ratio_mean": ratio_M.sum(),
                "policy/clip_fraction": ((ratio_M - 1).abs() > config.clip_range).sum(),
                "policy/approx_kl": (logprobs_M - new_logprobs_M + ratio_M - 1).sum(),
            }
        return loss, {name: float(value.detach()) for name, value in part.items()}

    def _set_learning_rates(self, update: int) -> None:
        factor = 1.0
        if self.config.schedule == "linear":
            factor = 1 - (update - 1) / self.config.updates
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def build_optimizer(bank: PolicyBank, config: PpoConfig) -> torch.optim.Optimizer:
    """AdamW over policy, critic and value head, a group each with its own learning rate."""
    value_rate = config.value_learning_rate or config.learning_rate
    head_rate = config.value_learning_rate or config.learning_rate * (SHARED_HEAD_RATE if bank.value is None else 1)
    groups = [
        (bank.policy.parameters(), config.learning_rate),
        (bank.value.parameters() if bank.value else [], value_rate),
        (list(bank.value_head.parameters()), head_rate),
    ]
    return torch.optim.AdamW(
        [{"params": params, "lr": rate, "peak_lr": rate} for params, rate in groups if params],
        eps=ADAM_EPSILON,
        weight_decay=0.0,
    )
