"""The comparison with TRL 1.12's PPO: the models of both, TRL's run in a process of its own, its rollout as ours.

TRL gives an ended response one slot more than it has tokens: after the end token stands another value, and the score.
`longer` is a response or an experience with that slot. Legend: B sequences, R padded response.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, PreTrainedModel

from data.chat import ChatEncoder, load_tokenizer
from data.encoded import EncodedPrompt
from data.rows import Prompt
from stages.core.bank import BankBuilder, PolicyBank
from stages.core.config import SharedConfig, Tuning
from stages.core.responses import Responses, Sampler
from stages.core.rewards import FunctionScorer, RewardModel
from stages.core.rollout.protocol import Completion, Sampling
from stages.ppo.config import PpoConfig
from stages.ppo.control import ScoreShaper
from stages.ppo.experience import Collector, Experience
from tests.tiny import EOS, PAD, tiny_llama, tiny_tokenizer
from tests.tiny_ppo import updater_of

CPU = torch.device("cpu")
PEER = Path(__file__).parents[2] / ".peers" / "trl-1.12"
LEARNING_RATE = 0.03  # of plain gradient descent: later epochs reach both clip ranges
TEMPERATURE = 0.8
TUNINGS = {"lora": Tuning(rank=4, alpha=8), "full": Tuning(method="full")}
ARGS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "total_episodes": 8,
    "response_length": 10,
    "temperature": TEMPERATURE,
    "num_ppo_epochs": 3,
    "cliprange": 0.05,
    "cliprange_value": 0.05,
    "vf_coef": 0.3,
    "kl_coef": 0.2,
    "gamma": 0.9,
    "lam": 0.8,
    "max_grad_norm": 1e-3,  # a limit that every gradient here is beyond
    "num_sample_generations": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
}


def base_models(folder: Path) -> None:
    """`folder/base`, a language model that likes its end token and never says its padding, and `folder/reward`."""
    tokenizer = tiny_tokenizer()
    end, pad = tokenizer.convert_tokens_to_ids([EOS, PAD])
    policy = _spread(tiny_llama(vocabulary=len(tokenizer)), seed=1)
    with torch.no_grad():  # one hidden feature is always on: its weight in the head is a token's bias
        policy.lm_head.weight[:, 0] = 0.0
        policy.lm_head.weight[[end, pad]] = 0.0
        policy.lm_head.weight[end, 0], policy.lm_head.weight[pad, 0] = 2.7, -20.0
    config = tiny_llama(vocabulary=len(tokenizer)).config
    config.num_labels = 1
    torch.manual_seed(2)
    reward = _spread(LlamaForSequenceClassification(config), seed=2)
    for name, model in {"base": policy, "reward": reward}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _spread(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The model with weights large enough for gradients that can be compared."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
        model.get_input_embeddings().weight[:, 0] = 1.0
    return model


def start(folder: Path, kind: str) -> tuple[PolicyBank, RewardModel]:
    """Our models before the update; `kind` is "<tuning>-<critic>". The policy is not its reference."""
    method, critic = kind.split("-")
    torch.manual_seed(0)
    builder = BankBuilder(SharedConfig(base_model=str(folder / "base")), device=CPU)
    bank = builder.policy_bank(str(folder / "base"), TUNINGS[method], TEMPERATURE)
    reward = builder.reward_model(str(folder / "reward"), "reward")
    builder.add_critic(bank, critic, TUNINGS[method], reward)
    ours = bank.value_head
    bank.value_head = nn.Linear(bank.policy.trunk.width, 1, bias=False)  # TRL's heads have no bias
    with torch.no_grad():
        if critic == "model":
            bank.value_head.weight.copy_(ours.weight)
        for parameter in bank.trained().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return bank, reward


def parameters(bank: PolicyBank) -> dict[str, nn.Parameter]:
    """What trains, by the names that `common_name` gives TRL's parameters."""
    named: dict[str, nn.Parameter] = {"value.score.weight": bank.value_head.weight}
    for part, view in {"policy": bank.policy, "value": bank.value}.items():
        own = {id(parameter) for parameter in view.parameters()}
        for name, parameter in view.trunk.model.named_parameters():
            if id(parameter) in own:
                named[f"{part}.{name.replace(f'.{part}.weight', '.default.weight')}"] = parameter
    return named


def common_name(name: str) -> str:
    """TRL's name of a parameter without its wrappers'."""
    return name.replace("value_model.", "value.").replace("base_model.model.", "")


def written(folder: Path, kind: str) -> dict[str, Any]:
    """Where TRL finds the models of `start`."""
    bank, _ = start(folder, kind)
    own, base = folder / kind, str(folder / "base")
    for part in ("policy", "value"):
        (own / part).mkdir(parents=True, exist_ok=True)
    bank.save_policy(own / "policy")
    torch.save(bank.value_head.weight.detach(), own / "head.pt")
    models = {"tokenizer": base, "reward": str(folder / "reward")}
    if kind.startswith("full"):
        bank.value.trunk.model.save_pretrained(own / "value")
        policy, value = ({"model": str(own / part), "adapter": None} for part in ("policy", "value"))
    else:
        bank.value.trunk.save_adapter("value", own / "value", base)
        policy = {"model": base, "adapter": str(own / "policy")}
        critic_base = base if kind.endswith("adapter") else str(folder / "reward")
        value = {"model": critic_base, "adapter": str(own / "value")}
    reference = base if kind.startswith("full") else None
    return models | {"policy": policy, "reference": reference, "value": value | {"head": str(own / "head.pt")}}


def case(folder: Path, kind: str, *, prompts: int = 8, pad_is_eos: bool = False, **changes: Any) -> dict[str, Any]:
    """One run of TRL's trainer: its arguments where they are not ARGS, and how many prompts it shuffles."""
    rows = [[0, *range(40 + row, 43 + row + row % 4)] for row in range(prompts)]
    return {
        **(written(folder, kind) | {"kind": kind, "prompts": rows, "pad_is_eos": pad_is_eos}),
        "learning_rate": LEARNING_RATE,
        "args": ARGS | changes,
    }


@dataclass(frozen=True)
class Replay:
    """A rollout engine that says again what was said."""

    completions: Sequence[Completion]

    def generate(self, prompts: Sequence[Sequence[int]], *_: object) -> list[list[Completion]]:
        assert len(prompts) == len(self.completions)
        return [[completion] for completion in self.completions]

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class Run:
    """What TRL computed in one case, and the same through our functions."""

    folder: Path
    case: dict[str, Any]
    tensors: dict[str, Tensor]
    metrics: dict[str, float]
    steps: list[dict[str, Tensor]]

    def start(self) -> tuple[PolicyBank, RewardModel]:
        """Our models before the update."""
        return start(self.folder, self.case["kind"])

    @property
    def mask_BR(self) -> Tensor:
        """Response tokens, as TRL sees them."""
        return ~self.tensors["padding_mask"]

    @property
    def longer_mask_BR(self) -> Tensor:
        """The same with the slot after an end token, where there is room for it."""
        return ~self.tensors["padding_mask_p1"]

    @property
    def config(self) -> PpoConfig:
        """Our config of the same hyperparameters, without a limit on the gradient."""
        args = self.case["args"]
        settings = {
            "prompts": [{"path": "unused.jsonl"}],
            "rollout_batch_size": len(self.mask_BR),
            "minibatch_size": len(self.mask_BR),
            "microbatch_tokens": 40,  # several, of different sizes
            "response_length": args["response_length"],
            "epochs": args["num_ppo_epochs"],
            "critic": self.case["kind"].split("-")[1],
            "max_grad_norm": 1e9,
            "gamma": args["gamma"],
            "gae_lambda": args["lam"],
            "clip_range": args["cliprange"],
            "value_clip_range": args["cliprange_value"],
            "value_coef": args["vf_coef"],
            "kl": {"coef": args["kl_coef"], "estimator": args.get("kl_estimator", "k1")},
            "score": {"missing_eos_penalty": args.get("missing_eos_penalty", 0.0)},
        }
        return PpoConfig.model_validate(settings)

    def completions(self) -> list[Completion]:
        """What TRL's policy said, with the log-probabilities that TRL gave it."""
        end = load_tokenizer(self.case["tokenizer"], None).eos_token_id
        completions: list[Completion] = []
        for tokens_R, logprobs_R, mask_R in zip(
            self.tensors["responses"], self.tensors["logprobs"], self.mask_BR, strict=True
        ):
            tokens = tokens_R[mask_R].tolist()
            ended = bool(self.case["args"].get("stop_token")) and tokens[-1] == end
            completions.append(Completion(tuple(tokens), tuple(logprobs_R[mask_R].tolist()), ended))
        return completions

    def experience(self, bank: PolicyBank, reward: RewardModel) -> Experience:
        """Our experience of the same responses, by our own collector."""
        encoder = ChatEncoder(load_tokenizer(self.case["tokenizer"], None), max_length=64)
        pad = encoder.tokenizer.pad_token_id
        rows = [[token for token in row if token != pad] for row in self.tensors["queries"].tolist()]
        prompts = [EncodedPrompt(tokens, Prompt("", origin=f"row {place}")) for place, tokens in enumerate(rows)]
        completions = self.completions()
        judged = [
            ([*prompt, *completion.tokens], len(prompt)) for prompt, completion in zip(rows, completions, strict=True)
        ]
        scorer = FunctionScorer("rewards", lambda *_: reward.score_sequences(judged))
        sampling = Sampling(self.config.response_length, TEMPERATURE, (encoder.tokenizer.eos_token_id,))
        sampler = Sampler(Replay(completions), encoder, sampling, 0)
        collector = Collector(bank, sampler, scorer, self.config, CPU)
        responses = sampler.respond(prompts, "train", 1)
        return collector.collect(responses, kl_coef=self.config.kl.coef, shaper=ScoreShaper(self.config.score))

    def longer(self, experience: Experience, bank: PolicyBank) -> Experience:
        """The experience with TRL's slot; its values are those of the critic, its other tensors padded with 0.

        A token is put into the slot, whichever: the value before it is the one after the end token.
        """
        added = (self.longer_mask_BR.sum(1) - self.mask_BR.sum(1)).tolist()
        old = experience.responses
        completions = [
            replace(each, tokens=each.tokens + (5,) * extra, logprobs=each.logprobs + (0.0,) * extra)
            for each, extra in zip(old.completions, added, strict=True)
        ]
        responses = Responses(old.prompts, completions, old.texts)
        with torch.no_grad():
            values_M = bank.values(responses.batch(range(len(completions)), CPU))
        values_BR = torch.zeros(self.longer_mask_BR.shape)
        values_BR[self.longer_mask_BR] = values_M
        masks = {"mask_BR": self.longer_mask_BR, "loss_mask_BR": self.longer_mask_BR}
        return replace(experience, responses=responses, values_BR=values_BR, **masks)


def run_trl(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Run]:
    """TRL 1.12's trainer on every case, in one process that sees it instead of the installed TRL."""
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    apart = {"PYTHONPATH": str(PEER), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("trl_ppo.py")), str(folder)],
        env=os.environ | apart | {"TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return {
        name: Run(folder, each, **torch.load(folder / f"{name}.pt", weights_only=True)) for name, each in cases.items()
    }


def our_steps(
    bank: PolicyBank, run: Run, experience: Experience, part: str = "", *, max_grad_norm: float = 1e9
) -> tuple[list[dict[str, Tensor]], dict[str, float]]:
    """The gradients at every step of our update, and its metrics; `part` is how the names of all that train begin."""
    chosen = {name: parameter for name, parameter in parameters(bank).items() if name.startswith(part)}
    rate = {"lr": LEARNING_RATE, "peak_lr": LEARNING_RATE}
    optimizer = torch.optim.SGD([{"params": list(chosen.values()), **rate}])
    steps: list[dict[str, Tensor]] = []
    optimizer.register_step_pre_hook(
        lambda *_: steps.append({name: each.grad.clone() for name, each in chosen.items()})
    )
    config = run.config.model_copy(update={"max_grad_norm": max_grad_norm})
    figures = updater_of(bank, config, optimizer).update(experience, 1, config.kl.coef)
    return steps, figures
