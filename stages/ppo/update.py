"""The update: epochs of minibatches of microbatches over one experience.

Legend: B responses, R longest response, M response tokens of a microbatch.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from data.errors import UserError
from stages.core import ranks
from stages.core.bank import PolicyBank, TokenOutputs
from stages.core.engine import Engine, Training, passes
from stages.core.ops import kl_estimate
from stages.core.rollout.protocol import rollout_seed
from stages.core.sequences import ResponseBatch
from stages.ppo.config import PpoConfig
from stages.ppo.experience import Experience
from stages.ppo.importance import importance_weights
from stages.ppo.loss import policy_loss, value_loss
from stages.ppo.ptx import Ptx

# A head alone learns slowly at a LoRA policy's rate: on random walks a shared critic's explained variance was 0.2 at 1x
# and 0.3 at 5x and 25x. On words, 192 wide, 25x overshot: it was -0.6 after the first update, 0.0 with 5x. A step
# of Adam moves a value by up to the rate times the sum of |hidden|, which grows with the width: beyond the widths
# tried (64 to 256) the rate shrinks, so that values move as they did there.
SHARED_HEAD_RATE = 5.0
SHARED_HEAD_WIDTH = 256
POLICY_GROUP = 0  # of the optimizer's parameter groups
ADAM_EPSILON = 1e-5  # Huang et al. 2024 (2403.17031), detail 13


Pass = Callable[[], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Part:
    """The responses `rows` of an experience, packed: one microbatch."""

    experience: Experience
    rows: list[int]
    device: torch.device

    @cached_property
    def batch(self) -> ResponseBatch:
        """Prompts and responses."""
        return self.experience.responses.batch(self.rows, self.device)

    @cached_property
    def chosen_M(self) -> Tensor:
        """Which of the batch's response tokens train."""
        return self.experience.loss_mask_BR[self.rows][self.experience.mask_BR[self.rows]].to(self.device)

    def sampled(self, values_BR: Tensor) -> Tensor:
        """What the experience holds for the tokens that train, one after the other."""
        return values_BR[self.rows][self.experience.loss_mask_BR[self.rows]].to(self.device)

    def weights(self, cap: float | None) -> Tensor | None:
        """Importance weights M of the tokens that train; None: all 1, the policy itself sampled, or no `cap`."""
        experience = self.experience
        if cap is None or experience.sampler_logprobs_BR is None:
            return None
        return importance_weights(
            self.sampled(experience.logprobs_BR), self.sampled(experience.sampler_logprobs_BR), cap
        )


@dataclass(frozen=True)
class Updater:
    """The engine over policy and critic, and how it is stepped; all ranks hold the same experience."""

    bank: PolicyBank
    config: PpoConfig
    engine: Engine
    device: torch.device
    seed: int
    ptx: Ptx | None = None

    def update(self, experience: Experience, update: int, kl_coef: float) -> dict[str, float]:
        """Trains on one experience and returns its metrics: means over response tokens, then over minibatches.

        `update` counts from 1; it fixes the order of the minibatches and the learning rate. `kl_coef` weighs the KL
        where it is part of the loss. A minibatch of which every response is filtered out makes no step
        (`policy/empty_minibatches`). One whose KL(old || new) is above `early_stop_kl` makes none and is the last;
        `policy/epochs_done` then says how far the update came, in passes over the responses.
        """
        config = self.config
        self._set_learning_rates(update)
        policy_trains = update > config.critic_warmup
        minibatches = self._minibatches(len(experience.score_B), update)
        measured: list[dict[str, float]] = []
        done = empty = 0
        for place, rows in enumerate(minibatches):
            if bool(experience.loss_mask_BR[rows].any()):
                figures = self._gradients(experience, rows, kl_coef, policy_trains=policy_trains)
                measured.append(figures)
                if policy_trains and self._is_too_far(figures):
                    self.engine.discard()
                    break
                if policy_trains and self.ptx is not None:
                    step = (update - 1) * len(minibatches) + place
                    figures["ptx/loss"] = self.ptx.backward(self.engine, self.bank, step)
                    figures["loss"] += self.ptx.config.coef * figures["ptx/loss"]
                norm = self._step(experience, rows, figures["loss"], policy_trains=policy_trains)
                figures["grad_norm"] = norm
                if config.max_grad_norm is not None:
                    figures["grad_norm/bounded_fraction"] = float(norm > config.max_grad_norm)
            else:
                empty += 1
            done += 1
        return _means(measured) | {
            "policy/epochs_done": done / config.minibatches,
            "policy/empty_minibatches": empty,
            "lr": self.engine.optimizer.param_groups[0]["lr"],
        }

    def _minibatches(self, count: int, update: int) -> list[list[int]]:
        """Every epoch's minibatches: each response once an epoch, in an order of seed, update and epoch alone.

        A prompt's samples stay together, as far as a minibatch holds them: a pass has their prompt in it once.
        """
        size, samples = self.config.minibatch_size, self.config.samples_per_prompt
        minibatches: list[list[int]] = []
        for epoch in range(self.config.epochs):
            generator = torch.Generator().manual_seed(rollout_seed(self.seed, "minibatches", update, epoch, 0))
            prompts: list[int] = torch.randperm(count // samples, generator=generator).tolist()
            own: list[list[int]] = [torch.randperm(samples, generator=generator).tolist() for _ in prompts]
            order = [prompt * samples + place for prompt, places in zip(prompts, own, strict=True) for place in places]
            minibatches += [order[start : start + size] for start in range(0, count, size)]
        return minibatches

    def _is_too_far(self, figures: Mapping[str, float]) -> bool:
        """Whether the policy has left the one that sampled; what is not finite is for `_step` to refuse."""
        bound, kl = self.config.early_stop_kl, figures["policy/approx_kl"]
        return bound is not None and bound < kl < math.inf

    def _gradients(
        self, experience: Experience, rows: Sequence[int], kl_coef: float, *, policy_trains: bool
    ) -> dict[str, float]:
        """Leaves the minibatch's gradients in the engine; its metrics, over all ranks.

        Each rank takes its part of the rows. Losses are divided by the response tokens that train in the minibatch, on
        all ranks, not by those in a microbatch as in TRL 1.12.
        """
        tokens = int(experience.loss_mask_BR[list(rows)].sum())
        # In their order: samples of one prompt stand side by side, and a microbatch holds their prompt once.
        training = sorted(row for row in rows if bool(experience.loss_mask_BR[row].any()))
        responses = experience.responses
        groups = responses.microbatches(responses.share(training), self.config.microbatch_tokens)
        self.engine.discard()
        sums: dict[str, float] = defaultdict(float)
        for group, counts in passes(self.engine, groups, [responses.shortest(training)]):
            for kind, compute in self._losses(experience, group, kl_coef, policy_trains=policy_trains):
                self._pass(kind, compute, sums, tokens if counts else None)
        return _summed(ranks.gather_lists([dict(sums)]))

    def _pass(self, kind: str, compute: Pass, sums: dict[str, float], tokens: int | None) -> None:
        """Adds a pass's part of the minibatch's mean over `tokens` to its gradients and `sums`; None: it counts 0."""

        def loss() -> Tensor:
            total, figures = compute()
            if tokens is None:
                return total * 0.0
            for name, value in figures.items():
                sums[name] += value / tokens
            return total / tokens

        self.engine.backward(loss, kind)

    def _step(self, experience: Experience, rows: Sequence[int], loss: float, *, policy_trains: bool) -> float:
        """One optimizer step; returns the gradient's norm before clipping.

        TRL 1.12 clips none, whatever its max_grad_norm. Where it accumulates gradients it steps once an epoch, not once
        a minibatch, and on the last batch of its prompts after every microbatch, with a part of the gradient.
        Raises UserError, before the step, where loss or gradient is not finite.
        """
        idle = () if policy_trains else (POLICY_GROUP,)
        grad_norm = self.engine.step(idle) if math.isfinite(loss) else math.nan
        if not math.isfinite(grad_norm):
            origins = ", ".join(experience.responses.prompts[row].origin for row in rows)
            raise UserError(
                f"ppo: loss is {loss} and the gradient norm {grad_norm} on prompts {origins}; no update was made: "
                f"look at their scores, or lower ppo.learning_rate={self.config.learning_rate}"
            )
        return grad_norm

    def _losses(
        self, experience: Experience, rows: list[int], kl_coef: float, *, policy_trains: bool
    ) -> Iterator[tuple[str, Pass]]:
        """What gives the summed losses of a microbatch with their summed metrics, over the tokens that train, by kind.

        Each is a pass of its own: a critic with a trunk of its own begins when the policy's activations are gone.
        """
        bank, part = self.bank, Part(experience, rows, self.device)

        def policy_pass() -> tuple[Tensor, dict[str, float]]:
            entropy = self.config.entropy_coef > 0
            outputs = bank.outputs(part.batch, entropy=entropy, policy_trains=policy_trains).at(part.chosen_M)
            terms = self._policy_terms(outputs, part, kl_coef)
            counted = dict(terms) if policy_trains else {}
            if outputs.values_M is not None:
                counted["value/loss"] = self._value_term(outputs.values_M, part)
            figures = self._ratio_figures(outputs.logprobs_M.detach(), part.sampled(experience.logprobs_BR))
            return _weighed(counted, terms | counted, figures)

        def value_pass() -> tuple[Tensor, dict[str, float]]:
            term = {"value/loss": self._value_term(bank.values(part.batch)[part.chosen_M], part)}
            return _weighed(term, term, {})

        yield "policy", policy_pass
        if bank.value is not None:
            yield "value", value_pass

    def _value_term(self, new_values_M: Tensor, part: "Part") -> tuple[float, Tensor]:
        """Weight and sum over tokens of the critic's loss.

        A shared critic's is weighed in units of the returns' variance (`Experience.value_unit`): advantages are white,
        so the policy's gradients have one size whatever the scores' scale; in Adam's step the two compete for the
        trunk, and errors in units of the scores would drown the policy where returns spread by more than 1, and teach
        the trunk nothing of values where by less. A critic with a trunk of its own competes with nothing.
        """
        config, experience = self.config, part.experience
        assert experience.values_BR is not None
        assert experience.returns_BR is not None
        values_M, returns_M = part.sampled(experience.values_BR), part.sampled(experience.returns_BR)
        loss = value_loss(new_values_M.float(), values_M, returns_M, config.value_clip_range)
        unit = experience.value_unit if self.bank.value is None else 1.0
        return config.value_weight / unit, loss

    def _policy_terms(self, outputs: TokenOutputs, part: "Part", kl_coef: float) -> dict[str, tuple[float, Tensor]]:
        """Metric -> weight and sum over tokens of what the policy itself is trained by."""
        config, experience = self.config, part.experience
        loss_policy = policy_loss(
            outputs.logprobs_M,
            part.sampled(experience.logprobs_BR),
            part.sampled(experience.advantages_BR),
            config.clip_range,
            clip_range_high=config.clip_range_high,
            dual_clip=config.dual_clip,
            weights_M=part.weights(config.rollout.importance_cap),
        )
        terms = {"policy/loss": (1.0, loss_policy)}
        if outputs.entropy_M is not None:
            # Beside policy/entropy, which the sampled tokens estimate: the whole softmax's, while it is trained.
            terms["policy/entropy_exact"] = (-config.entropy_coef, outputs.entropy_M.sum())
        if config.kl.place == "loss":
            ref_logprobs_M = part.sampled(experience.ref_logprobs_BR)
            kl_M = kl_estimate(outputs.logprobs_M, ref_logprobs_M, config.kl.estimator)
            terms["kl/loss"] = (kl_coef, kl_M.sum())
        return terms

    def _ratio_figures(self, new_logprobs_M: Tensor, logprobs_M: Tensor) -> dict[str, Tensor]:
        """How far the policy is from the one that sampled, summed over tokens.

        TRL 1.12's means count padding too (ratio 1, KL 0), and shrink with its number of minibatches where it
        accumulates gradients; its approximate KL is k2.
        """
        ratio_M = torch.exp(new_logprobs_M - logprobs_M)
        high = self.config.clip_range if self.config.clip_range_high is None else self.config.clip_range_high
        return {
            "policy/ratio_mean": ratio_M.sum(),
            "policy/clip_fraction": ((ratio_M < 1 - self.config.clip_range) | (ratio_M > 1 + high)).sum(),
            "policy/approx_kl": kl_estimate(logprobs_M, new_logprobs_M, "k3").sum(),  # KL(old || new)
        }

    def _set_learning_rates(self, update: int) -> None:
        factor = 1.0
        if self.config.schedule == "linear":
            factor = 1 - (update - 1) / self.config.updates
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def _weighed(
    counted: Mapping[str, tuple[float, Tensor]],
    shown: Mapping[str, tuple[float, Tensor]],
    figures: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum of the terms that count, and the figures of all that are shown."""
    weighted = [weight * term for weight, term in counted.values()]
    loss = torch.stack(weighted).sum() if weighted else torch.zeros(())
    logged = {"loss": loss} | {name: term for name, (_, term) in shown.items()} | dict(figures)
    return loss, {name: float(value.detach()) for name, value in logged.items()}


def _summed(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The sum of each figure over ranks; a rank without rows has none."""
    names = dict.fromkeys(name for figures in parts for name in figures)
    return {name: sum(figures.get(name, 0.0) for figures in parts) for name in names}


def _means(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure over the minibatches that have it; the first ratio, which must be 1, by itself."""
    if not measured:
        return {}
    names = dict.fromkeys(name for figures in measured for name in figures)
    columns = {name: [figures[name] for figures in measured if name in figures] for name in names}
    means = {name: math.fsum(column) / len(column) for name, column in columns.items()}
    return means | {"policy/first_ratio_mean": measured[0]["policy/ratio_mean"]}


def training_of(bank: PolicyBank, config: PpoConfig, optimizer: torch.optim.Optimizer) -> Training:
    """All that PPO trains, for an engine: policy and critic under one optimizer."""
    trunks = dict.fromkeys(view.trunk for view in (bank.policy, bank.reference, bank.value) if view is not None)
    heads = [bank.value_head] if bank.value_head is not None else []
    return Training(
        modules=[*(trunk.model for trunk in trunks), *heads],
        parameters=bank.trained(),
        optimizer=optimizer,
        max_grad_norm=config.max_grad_norm,
        read_directly=list(bank.policy.trunk.lm_head.parameters()),
    )


def build_optimizer(bank: PolicyBank, config: PpoConfig) -> torch.optim.Optimizer:
    """AdamW over policy, critic and value head, a group each with its own learning rate."""
    value_rate = config.value_learning_rate or config.learning_rate
    head_factor = 1.0
    if bank.value is None and bank.value_head is not None:
        head_factor = SHARED_HEAD_RATE * min(1.0, SHARED_HEAD_WIDTH / bank.value_head.in_features)
    head_rate = config.value_learning_rate or config.learning_rate * head_factor
    groups = [
        (bank.policy.parameters(), config.learning_rate),
        (bank.value.parameters() if bank.value else [], value_rate),
        (list(bank.value_head.parameters()) if bank.value_head else [], head_rate),
    ]
    return torch.optim.AdamW(
        [{"params": params, "lr": rate, "peak_lr": rate} for params, rate in groups if params],
        eps=ADAM_EPSILON,
        weight_decay=0.0,
        fused=True,
    )
