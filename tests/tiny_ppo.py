"""A tiny bank, an experience and an updater, for tests of one PPO update."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean, pvariance

import torch
from torch import Tensor

from data.chat import ChatEncoder, load_tokenizer
from data.encoded import EncodedPrompt
from data.rows import Prompt
from stages.core.bank import BankBuilder, PolicyBank
from stages.core.config import SharedConfig, Tuning
from stages.core.engines import PlainEngine
from stages.core.responses import Responses, Sampler
from stages.core.rewards import FunctionScorer
from stages.core.rollout.native import NativeEngine
from stages.core.rollout.protocol import Sampling
from stages.ppo.config import PpoConfig
from stages.ppo.control import ScoreShaper
from stages.ppo.experience import Collector, Experience
from stages.ppo.ptx import Ptx
from stages.ppo.update import Updater, training_of

CPU = torch.device("cpu")
TEXTS = ["the cat", "a dog ran to", "say", "user: hello assistant:", "red", "yes or no", "good day the house", "mat"]
BR_FIELDS = ("logprobs_BR", "ref_logprobs_BR", "values_BR", "advantages_BR", "returns_BR")


def ppo_config(**changes: object) -> PpoConfig:
    settings: dict[str, object] = {
        "prompts": [{"path": "unused.jsonl"}],
        "rollout_batch_size": len(TEXTS),
        "minibatch_size": len(TEXTS),
        "response_length": 10,
        "epochs": 1,
        "max_grad_norm": 1e9,
        "value_coef": 0.3,
    }
    return PpoConfig.model_validate(settings | changes)


def make_bank(base: Path, critic: str | None = "adapter", method: str = "lora", **shared: object) -> PolicyBank:
    """A bank whose policy is not its reference and whose critic, where it has one, is not zero."""
    torch.manual_seed(0)
    builder = BankBuilder(SharedConfig.model_validate({"base_model": str(base), **shared}), device=CPU)
    tuning = Tuning(rank=4, alpha=8) if method == "lora" else Tuning(method="full")
    bank = builder.policy_bank(str(base), tuning, 0.8)
    if critic is not None:
        builder.add_critic(bank, critic, tuning, None)
    with torch.no_grad():
        for parameter in bank.trained().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return bank


def make_experience(bank: PolicyBank, base: Path, config: PpoConfig) -> Experience:
    """Responses of the bank's policy to the first prompts of `TEXTS`, scored by their lengths."""
    encoder = ChatEncoder(load_tokenizer(str(base)), max_length=64)
    # Several end tokens, so that responses differ in length.
    sampling = Sampling(config.response_length, bank.temperature, tuple(range(1, 60)))
    sampler = Sampler(NativeEngine(bank.policy.trunk, bank.policy.adapter), encoder, sampling, 0)
    scorer = FunctionScorer("test", lambda prompts, responses, rows: [len(each) % 5 - 2.0 for each in responses])
    collector = Collector(bank, sampler, scorer, config, CPU)
    prompts = [
        EncodedPrompt(encoder.prompt_tokens(text), Prompt(text, origin=f"prompts.jsonl:{row + 1}"))
        for row, text in enumerate(TEXTS[: config.prompts_per_update])
    ]
    responses = sampler.respond(prompts, "train", 1, config.samples_per_prompt)
    return collector.collect(responses, kl_coef=0.1, shaper=ScoreShaper(config.score))


def value_unit(bank: PolicyBank, experience: Experience) -> float:
    """What a value loss is divided by: a shared critic's by the variance of the returns that train, or the mean squared
    error."""
    if bank.value is not None:
        return 1.0
    assert experience.returns_BR is not None
    assert experience.values_BR is not None
    returns, values = (
        each_BR[experience.loss_mask_BR].tolist() for each_BR in (experience.returns_BR, experience.values_BR)
    )
    squares = [(each - value) ** 2 for each, value in zip(returns, values, strict=True)]
    return max(pvariance(returns), fmean(squares))


def updater_of(
    bank: PolicyBank, config: PpoConfig, optimizer: torch.optim.Optimizer, *, seed: int = 0, ptx: Ptx | None = None
) -> Updater:
    """The updater of one process."""
    return Updater(bank, config, PlainEngine(training_of(bank, config, optimizer)), CPU, seed, ptx)


def still_updater(bank: PolicyBank, config: PpoConfig, seed: int = 0, ptx: Ptx | None = None) -> Updater:
    """An updater whose steps move nothing: the gradients stay to be looked at."""
    optimizer = torch.optim.SGD([{"params": list(bank.trained().values()), "lr": 0.0, "peak_lr": 0.0}])
    return updater_of(bank, config, optimizer, seed=seed, ptx=ptx)


def gradients(bank: PolicyBank) -> dict[str, Tensor]:
    """A copy of every gradient, by parameter."""
    return {name: each.grad.clone() for name, each in bank.trained().items() if each.grad is not None}


def weights(bank: PolicyBank) -> dict[str, Tensor]:
    """A copy of everything that trains."""
    return {name: each.detach().clone() for name, each in bank.trained().items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` of each tensor's largest entry."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name], expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()), msg=name
        )


def moved_policy(experience: Experience) -> Experience:
    """As if the policy had moved since: ratios are off 1 and some are clipped; values are off too."""
    generator = torch.Generator().manual_seed(5)
    noise_BR = 0.3 * torch.randn(experience.mask_BR.shape, generator=generator) * experience.mask_BR
    moved = replace(experience, logprobs_BR=experience.logprobs_BR + noise_BR)
    return moved if moved.values_BR is None else replace(moved, values_BR=moved.values_BR + noise_BR)


def permuted(experience: Experience, order: list[int]) -> Experience:
    """The experience with these rows in this order; rows may be left out."""
    responses = experience.responses
    rows = Responses(
        *([part[row] for row in order] for part in (responses.prompts, responses.completions, responses.texts))
    )
    names = ("score_B", "mask_BR", "loss_mask_BR", *BR_FIELDS)
    given = {name: getattr(experience, name) for name in names}
    return replace(
        experience, responses=rows, **{name: each[order] for name, each in given.items() if each is not None}
    )


def clear_gradients(bank: PolicyBank) -> None:
    """Forgets every gradient."""
    for parameter in bank.trained().values():
        parameter.grad = None
