"""The policy bank: policy, reference, critic and reward as views of as few base models as possible.

LoRA: the base stands in memory once; policy, reference (the SFT adapter, or the base alone), critic and reward model
are adapters on it. Full fine-tuning: the policy is a model of its own, and a frozen copy of what it was carries the
reference and the adapters.

Legend: B sequences, N packed tokens, M response tokens, D hidden size.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.chat import ChatEncoder, load_tokenizer
from data.errors import UserError
from stages.core.config import SharedConfig, Tuning
from stages.core.judge.scoring import JudgeScorer
from stages.core.logprobs import token_logprobs, token_logprobs_and_entropy
from stages.core.models import (
    DTYPES,
    default_device,
    is_reward_model,
    load_merged,
    load_model,
    lora_config,
    resolve_model,
)
from stages.core.reward_config import RewardConfig
from stages.core.rewards import RewardModel, Scorer, WeightedSum, load_function, score_head
from stages.core.sequences import ResponseBatch
from stages.core.trunk import Trunk, read_adapter


@dataclass(frozen=True)
class View:
    """A trunk under one adapter; None is the bare base."""

    trunk: Trunk
    adapter: str | None

    def hidden_before(self, batch: ResponseBatch) -> Tensor:
        """Hidden states MD at the position before each response token: what predicts it."""
        return self.trunk.hidden_at(batch.packed, self.adapter, batch.before_M)

    def parameters(self) -> list[nn.Parameter]:
        """The view's own parameters: its adapter's, or the whole model's."""
        if self.adapter is None:
            return [parameter for parameter in self.trunk.trainable]
        return self.trunk.adapter_parameters(self.adapter)


class TokenOutputs(NamedTuple):
    """What the policy says of M response tokens."""

    logprobs_M: Tensor
    values_M: Tensor | None  # a shared critic's; None: no critic, or one with a trunk of its own
    entropy_M: Tensor | None  # None: not asked for

    def at(self, chosen_M: Tensor) -> "TokenOutputs":
        """Those of the tokens where `chosen_M` is True."""
        values_M, entropy_M = (None if each_M is None else each_M[chosen_M] for each_M in self[1:])
        return TokenOutputs(self.logprobs_M[chosen_M], values_M, entropy_M)


@dataclass
class PolicyBank:
    """The models of PPO.

    `value` is None where the critic is a head on the policy's own hidden states, `value_head` where there is no critic.
    """

    policy: View
    reference: View
    source: str  # the stage, folder or hub id that the policy was loaded from
    base: str  # what the policy's adapter stands on, for whoever loads it later
    temperature: float
    value: View | None = None
    value_head: nn.Linear | None = None

    def policy_logprobs(self, batch: ResponseBatch) -> Tensor:
        """Log-probability M of each response token under the policy, in nats."""
        return self._logprobs(self.policy, batch)

    @torch.no_grad()
    def ref_logprobs(self, batch: ResponseBatch) -> Tensor:
        """Log-probability M of each response token under the reference, in nats."""
        return self._logprobs(self.reference, batch)

    def values(self, batch: ResponseBatch) -> Tensor:
        """The critic's value M of the state before each response token."""
        return self._values((self.value or self.policy).hidden_before(batch))

    def values_and_after(self, batch: ResponseBatch) -> tuple[Tensor, Tensor]:
        """The critic's values M as `values` gives them, and B of the states after each last response token."""
        view = self.value or self.policy
        hidden_ND = view.trunk.hidden(batch.packed, view.adapter)
        return self._values(hidden_ND[batch.before_M]), self._values(hidden_ND[batch.packed.last_B])

    def outputs(self, batch: ResponseBatch, *, entropy: bool = False, policy_trains: bool = True) -> TokenOutputs:
        """What one pass of the policy gives the update; a critic with a trunk of its own is asked by `values`.

        The entropy, in nats, is that of the policy's whole softmax at the temperature. Where the policy does not train,
        a shared critic's head alone has a gradient.
        """
        entropy_M = None
        with torch.set_grad_enabled(policy_trains and torch.is_grad_enabled()):
            hidden_MD = self.policy.hidden_before(batch)
            head = self.policy.trunk.lm_head
            if entropy:
                logprobs_M, entropy_M = token_logprobs_and_entropy(hidden_MD, head, batch.targets_M, self.temperature)
            else:
                logprobs_M = token_logprobs(hidden_MD, head, batch.targets_M, self.temperature)
        is_shared = self.value is None and self.value_head is not None
        return TokenOutputs(logprobs_M, self._values(hidden_MD) if is_shared else None, entropy_M)

    def _logprobs(self, view: View, batch: ResponseBatch) -> Tensor:
        return token_logprobs(view.hidden_before(batch), view.trunk.lm_head, batch.targets_M, self.temperature)

    def _values(self, hidden_MD: Tensor) -> Tensor:
        assert self.value_head is not None
        return read_values(self.value_head, hidden_MD)

    @torch.no_grad()
    def rescale_values(self, factor: float, offset: float) -> None:
        """Multiplies all values of the critic by `factor` and adds `offset`."""
        assert self.value_head is not None
        self.value_head.weight.mul_(factor)
        self.value_head.bias.mul_(factor).add_(offset)

    def save_policy(self, folder: Path) -> None:
        """Writes the policy in PEFT or Hugging Face format."""
        if self.policy.adapter is None:
            self.policy.trunk.model.save_pretrained(str(folder))
        else:
            self.policy.trunk.save_adapter(self.policy.adapter, folder, self.base)

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter that trains, by a stable name."""
        parts = {"policy": self.policy.parameters()}
        if self.value_head is not None:
            parts["value_head"] = list(self.value_head.parameters())
        if self.value is not None:
            parts["value"] = self.value.parameters()
        return {f"{part}.{place}": each for part, group in parts.items() for place, each in enumerate(group)}


def read_values(head: nn.Linear, hidden_MD: Tensor) -> Tensor:
    """A critic's values M of hidden states, in the head's own precision."""
    return head(hidden_MD.to(head.weight.dtype))[:, 0]


@dataclass
class BankBuilder:
    """Loads models for a run so that none that can be shared stands in memory twice."""

    shared: SharedConfig
    device: torch.device = field(default_factory=default_device)
    frozen: Trunk | None = None  # carries the adapters of reference, critic and reward models
    frozen_base: str | None = None  # where its weights came from; None once an adapter was merged into them

    def policy_bank(self, source: str, tuning: Tuning, temperature: float) -> PolicyBank:
        """The bank with its policy and reference views; the critic is added by `add_critic`.

        Raises UserError where `tuning` cannot continue the policy's adapter.
        """
        found = resolve_model(source)
        if tuning.method == "full":
            return self._full_bank(source, temperature)
        self.frozen, self.frozen_base = self._trunk(found.base), found.base
        policy = View(self.frozen, "policy")
        if found.adapter is None:
            self.frozen.add_adapter("policy", lora_config(tuning, "CAUSAL_LM"))
            reference = View(self.frozen, None)
        else:
            config, weights, _ = read_adapter(found.adapter)
            if (config.r, float(config.lora_alpha)) != (tuning.rank, float(tuning.alpha)):
                raise UserError(
                    f"ppo.tuning: rank={tuning.rank} alpha={tuning.alpha}, but the adapter {found.adapter} has "
                    f"rank={config.r} alpha={config.lora_alpha}; use the same, or train sft with tuning.method=full"
                )
            self.frozen.add_adapter("policy", config, weights)
            self.frozen.add_adapter("reference", config, weights)
            reference = View(self.frozen, "reference")
        self.frozen.train(policy.parameters(), recompute=self.shared.gradient_checkpointing)
        return PolicyBank(policy, reference, source, found.base, temperature)

    def _full_bank(self, source: str, temperature: float) -> PolicyBank:
        found = resolve_model(source)
        model = load_merged(found)
        self.frozen = Trunk(copy.deepcopy(model).to(self._dtype), self.device)
        self.frozen_base = found.base if found.adapter is None else None
        trunk = Trunk(model, self.device, autocast=self._is_bfloat16)
        trunk.check_head()
        trunk.train(trunk.model.parameters(), recompute=self.shared.gradient_checkpointing)
        return PolicyBank(View(trunk, None), View(self.frozen, None), source, found.base, temperature)

    def _trunk(self, base: str) -> Trunk:
        trunk = Trunk(load_model(base, head="lm", dtype=self.shared.dtype), self.device)
        trunk.check_head()
        return trunk

    @property
    def _is_bfloat16(self) -> bool:
        return self.shared.dtype == "bfloat16"

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.shared.dtype]

    def scorer(
        self, rewards: Sequence[RewardConfig], sources: Sequence[str | JudgeScorer]
    ) -> tuple[Scorer, list[RewardModel]]:
        """The weighted sum of the reward sources, and the reward models among them."""
        named = zip(rewards, sources, strict=True)
        scorers = [self.one_scorer(each, source, f"reward-{place}") for place, (each, source) in enumerate(named)]
        models = [scorer for scorer in scorers if isinstance(scorer, RewardModel)]
        return WeightedSum(scorers, [reward.weight for reward in rewards]), models

    def one_scorer(self, reward: RewardConfig, source: str | JudgeScorer, name: str) -> Scorer:
        """One source of scores; `name` is the adapter's, where it is a reward model."""
        if isinstance(source, JudgeScorer):
            return source
        return load_function(source) if reward.function else self.reward_model(source, name)

    def reward_model(self, source: str, name: str) -> RewardModel:
        """A reward model, as an adapter on the frozen base where it was trained on that very base."""
        found = resolve_model(source)
        tokenizer = load_tokenizer(found.folder, None)
        encoder = ChatEncoder(tokenizer, max_length=self.shared.max_length, overlong=self.shared.overlong)
        if found.adapter is None:
            model = load_model(found.base, head="score", dtype=self.shared.dtype)
            if not is_reward_model(model):
                raise UserError(f"reward model {source}: a language model, without a score head; train one with rm")
            head = score_head(dict(model.named_parameters()), self.device)
            return RewardModel(Trunk(model, self.device), None, head, encoder, source)
        config, weights, head_weights = read_adapter(found.adapter)
        if self.frozen is not None and found.base == self.frozen_base:
            trunk = self.frozen
        else:
            trunk = Trunk(load_model(found.base, head="lm", dtype=self.shared.dtype), self.device)
        trunk.add_adapter(name, config, weights)
        return RewardModel(trunk, name, score_head(head_weights, self.device), encoder, source)

    def add_critic(self, bank: PolicyBank, kind: str, tuning: Tuning, reward: RewardModel | None) -> None:
        """Gives the bank its critic, initialised from the reward model where there is one and it fits.

        shared: a zero-initialised head on the policy's hidden states. adapter: LoRA and head on the frozen base, the
        reward adapter's values where it stands there. model: a copy of the reward model where it reads the policy's
        tokens, else of the policy as it was. Without a reward model the head is zero.
        """
        if kind == "adapter":
            bank.value = self._value_adapter(tuning, reward)
        elif kind == "model":
            bank.value = self._value_model(bank, tuning, reward)
        bank.value_head = _zero_head((bank.value or bank.policy).trunk, self.device)
        if reward is not None and kind != "shared" and self._starts_from(kind, bank, reward):
            bank.value_head.load_state_dict(reward.head.state_dict(), strict=False)  # it may have no bias

    def _starts_from(self, kind: str, bank: PolicyBank, reward: RewardModel) -> bool:
        """Whether the critic can be a copy of this reward model."""
        if kind == "adapter":
            return reward.trunk is self.frozen and reward.adapter is not None
        policy_tokens = load_tokenizer(resolve_model(bank.source).folder, None).get_vocab()
        return reward.encoder.tokenizer.get_vocab() == policy_tokens

    def _value_adapter(self, tuning: Tuning, reward: RewardModel | None) -> View:
        assert self.frozen is not None
        if reward is not None and reward.trunk is self.frozen and reward.adapter is not None:
            self.frozen.clone_adapter(reward.adapter, "value")
        else:
            # LoRA by definition, also beside a fully trained policy.
            own = tuning if tuning.method == "lora" else Tuning()
            self.frozen.add_adapter("value", lora_config(own, "CAUSAL_LM"))
        self.frozen.train(self.frozen.adapter_parameters("value"), recompute=self.shared.gradient_checkpointing)
        return View(self.frozen, "value")

    def _value_model(self, bank: PolicyBank, tuning: Tuning, reward: RewardModel | None) -> View:
        if reward is not None and self._starts_from("model", bank, reward):
            model = load_merged(resolve_model(reward.source), head="score")
        else:
            model = load_merged(resolve_model(bank.source))
        full = tuning.method == "full"
        trunk = Trunk(model if full else model.to(self._dtype), self.device, autocast=full and self._is_bfloat16)
        if full:
            trunk.train(trunk.backbone.parameters(), recompute=self.shared.gradient_checkpointing)
            return View(trunk, None)
        config = lora_config(tuning, "CAUSAL_LM")
        if is_reward_model(model):
            config.exclude_modules = ["score"]  # its own head is read by nobody: `value_head` is a copy
        trunk.add_adapter("value", config)
        trunk.train(trunk.adapter_parameters("value"), recompute=self.shared.gradient_checkpointing)
        return View(trunk, "value")


def _zero_head(trunk: Trunk, device: torch.device) -> nn.Linear:
    """A value head that says 0 everywhere."""
    head = nn.Linear(trunk.width, 1).to(device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
