"""What a collector makes of sampled responses: each option of the experience, on a tiny model, worked out again."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.chat import ChatEncoder, load_tokenizer
from data.encoded import EncodedPrompt
from data.rows import Prompt
from stages.core.bank import BankBuilder, PolicyBank
from stages.core.config import SharedConfig, Tuning
from stages.core.responses import Sampler
from stages.core.rewards import Answered, FunctionScorer, Scorer
from stages.core.rollout.native import NativeEngine
from stages.core.rollout.protocol import Sampling
from stages.core.sequences import ResponseBatch
from stages.ppo.config import PpoConfig
from stages.ppo.control import KlController, ScoreShaper
from stages.ppo.experience import Collector, Experience
from stages.ppo.rollouts import Rollout
from stages.ppo.stage import _count
from stages.ppo.state import PpoState
from tests.tiny import tiny_model_folder

CPU = torch.device("cpu")
TEXTS = ["the cat", "a dog ran to", "say", "yes or no"]
SAMPLES, LONGEST, BETA = 3, 4, 0.25
KL = {"reward": {"place": "reward"}, "loss": {"place": "loss", "estimator": "k3"}}
CRITICLESS = ["grpo", "rloo", "reinforce++"]
ScoreFunction = Callable[[Sequence[Any], Sequence[str], Sequence[Mapping[str, Any]]], list[float]]


def lengths(prompts: Sequence[Any], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """A score that differs from response to response."""
    return [len(response) % 5 - 2.0 for response in responses]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"))


def ppo_config(**changes: object) -> PpoConfig:
    settings: dict[str, object] = {
        "prompts": [{"path": "unused.jsonl"}],
        "rollout_batch_size": len(TEXTS) * SAMPLES,
        "samples_per_prompt": SAMPLES,
        "minibatch_size": SAMPLES,
        "response_length": LONGEST,
        "microbatch_tokens": 40,  # several microbatches
    }
    return PpoConfig.model_validate(settings | changes)


def make_bank(base: Path, config: PpoConfig) -> PolicyBank:
    """A bank whose policy is not its reference and whose critic, where it has one, is not zero."""
    torch.manual_seed(0)
    builder, tuning = BankBuilder(SharedConfig(base_model=str(base)), device=CPU), Tuning(rank=4, alpha=8)
    bank = builder.policy_bank(str(base), tuning, 1.0)
    if config.has_critic:
        builder.add_critic(bank, config.critic, tuning, None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(bank.trained().items()):  # the policy first: the same with and without a critic
            spread = 0.05 if name.startswith("policy") else 0.3
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return bank


def collect(
    base: Path,
    config: PpoConfig,
    *,
    score: ScoreFunction | Scorer = lengths,
    bank: PolicyBank | None = None,
    shaper: ScoreShaper | None = None,
    fit_values: bool = False,
) -> Experience:
    bank = bank or make_bank(base, config)
    encoder = ChatEncoder(load_tokenizer(str(base)), max_length=64)
    # Many end tokens, so that some responses end by themselves and some are cut off.
    sampling = Sampling(config.response_length, bank.temperature, tuple(range(1, 100)))
    sampler = Sampler(NativeEngine(bank.policy.trunk, bank.policy.adapter), encoder, sampling, 0)
    scorer = FunctionScorer("test", score) if callable(score) else score
    collector = Collector(bank, sampler, scorer, config, CPU)
    prompts = [
        EncodedPrompt(encoder.prompt_tokens(text), Prompt(text, origin=f"prompts.jsonl:{row + 1}"))
        for row, text in enumerate(TEXTS)
    ]
    responses = sampler.respond(prompts, "train", 1, config.samples_per_prompt)
    shaper = shaper or ScoreShaper(config.score)
    return collector.collect(responses, kl_coef=BETA, shaper=shaper, fit_values=fit_values)


def rewards_of(experience: Experience) -> list[float]:
    """Score minus weighted KL of each response, added up in plain Python."""
    rows = zip(experience.score_B.tolist(), experience.kl_B.tolist(), strict=True)
    return [score - BETA * kl for score, kl in rows]


def figures_of(experience: Experience, config: PpoConfig) -> dict[str, float]:
    return _count(
        PpoState(KlController(config.kl, BETA), ScoreShaper(config.score)),
        experience,
        Rollout(experience.responses, seconds=1.0),
    )


def test_the_responses_of_these_tests_end_in_both_ways(base: Path) -> None:
    experience = collect(base, ppo_config())
    finished, tokens = experience.responses.finished, experience.responses.lengths
    assert 3 <= sum(finished) <= 9
    assert len(set(tokens)) == LONGEST
    assert float(experience.kl_B.abs().min()) > 1e-4
    assert len(set(experience.score_B.tolist())) > 2


@pytest.mark.parametrize("advantage", CRITICLESS)
def test_without_a_critic_there_are_no_values_and_no_figures_of_them(base: Path, advantage: str) -> None:
    config = ppo_config(advantage=advantage)
    bank = make_bank(base, config)
    assert bank.value_head is None
    experience = collect(base, config, bank=bank)
    assert experience.values_BR is None
    assert experience.returns_BR is None
    assert not bool(experience.advantages_BR[~experience.mask_BR].any())
    figures = figures_of(experience, config)
    assert not [name for name in figures if name.startswith("value/")]
    with_critic = figures_of(collect(base, ppo_config()), config)
    assert set(with_critic) - set(figures) == {"value/explained_variance"}


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_rloo_compares_scores_minus_kl_within_a_prompt(base: Path, place: str) -> None:
    experience = collect(base, ppo_config(advantage="rloo", kl=KL[place]))
    rewards = rewards_of(experience) if place == "reward" else experience.score_B.tolist()
    for row, reward in enumerate(rewards):
        first = row - row % SAMPLES
        others = [rewards[each] for each in range(first, first + SAMPLES) if each != row]
        for token in range(experience.responses.lengths[row]):
            assert float(experience.advantages_BR[row, token]) == pytest.approx(reward - sum(others) / 2, abs=1e-5)


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_grpo_is_rloo_shrunk_to_unit_deviation(base: Path, place: str) -> None:
    """x - mean of the others = K / (K - 1) * (x - mean): only the group's deviation tells the two apart."""
    group = collect(base, ppo_config(advantage="grpo", kl=KL[place]))
    others = collect(base, ppo_config(advantage="rloo", kl=KL[place]))
    assert group.responses == others.responses
    rewards = torch.tensor(rewards_of(group) if place == "reward" else group.score_B.tolist())
    deviation_B = rewards.view(-1, SAMPLES).std(1).repeat_interleave(SAMPLES) + 1e-4
    torch.testing.assert_close(
        group.advantages_BR, others.advantages_BR * (SAMPLES - 1) / SAMPLES / deviation_B[:, None], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_reinforce_plus_plus_whitens_what_is_left_to_earn(base: Path, place: str) -> None:
    experience = collect(base, ppo_config(advantage="reinforce++", gamma=0.5, kl=KL[place]))
    kl_BR = (experience.logprobs_BR - experience.ref_logprobs_BR) * (BETA if place == "reward" else 0.0)
    to_go = []
    for row, length in enumerate(experience.responses.lengths):
        earned = [-float(each) for each in kl_BR[row, :length]]
        earned[-1] += float(experience.score_B[row])
        to_go += [sum(0.5 ** (later - t) * earned[later] for later in range(t, length)) for t in range(length)]
    expected_M = (torch.tensor(to_go) - torch.tensor(to_go).mean()) / torch.tensor(to_go).std()
    torch.testing.assert_close(experience.advantages_BR[experience.mask_BR], expected_M, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("place", "estimator"), [("reward", "k1"), ("reward", "k3"), ("loss", "k3")])
def test_the_kl_is_in_the_rewards_or_it_is_not(base: Path, place: str, estimator: str) -> None:
    """Without discount and with lambda 1, returns are what is left to earn."""
    experience = collect(base, ppo_config(gae_lambda=1.0, kl={"place": place, "estimator": estimator}))
    assert experience.returns_BR is not None
    difference_BR = experience.logprobs_BR - experience.ref_logprobs_BR
    kl_BR = difference_BR if estimator == "k1" else (-difference_BR).exp() - 1 + difference_BR
    for row, length in enumerate(experience.responses.lengths):
        for token in range(length):
            penalty = BETA * float(kl_BR[row, token:length].sum()) if place == "reward" else 0.0
            expected = float(experience.score_B[row]) - penalty
            assert float(experience.returns_BR[row, token]) == pytest.approx(expected, abs=1e-5)
    # The log's KL is the k1 sum whatever is penalised, and wherever.
    assert figures_of(experience, ppo_config())["kl/ref_mean"] == pytest.approx(
        float(difference_BR.sum() / len(difference_BR)), abs=1e-6
    )


@pytest.mark.parametrize("critic", ["shared", "adapter", "model"])
def test_only_a_cut_response_goes_on_with_the_critics_value(base: Path, critic: str) -> None:
    """By hand with gamma 0.5: return_t = what is left to earn + 0.5^(tokens left) * V of the state after the last."""
    config = ppo_config(bootstrap_truncated=True, gamma=0.5, gae_lambda=1.0, critic=critic, kl=KL["loss"])
    bank = make_bank(base, config)
    experience = collect(base, config, bank=bank)
    assert experience.returns_BR is not None
    responses = experience.responses
    for row, completion in enumerate(responses.completions):
        # The state after the last token is the state before whatever token comes next.
        longer = ResponseBatch.of([responses.prompts[row].tokens], [[*completion.tokens, 7]], CPU)
        after = 0.0 if completion.finished else float(bank.values(longer)[-1].detach())
        assert completion.finished or abs(after) > 1e-3
        length = len(completion.tokens)
        for token in range(length):
            left = length - token
            expected = 0.5 ** (left - 1) * float(experience.score_B[row]) + 0.5**left * after
            assert float(experience.returns_BR[row, token]) == pytest.approx(expected, abs=1e-5)


def test_the_bootstrap_changes_no_value_and_no_finished_response(base: Path) -> None:
    plain, booted = (collect(base, ppo_config(bootstrap_truncated=on)) for on in (False, True))
    assert plain.values_BR is not None
    assert booted.values_BR is not None
    assert plain.returns_BR is not None
    assert booted.returns_BR is not None
    torch.testing.assert_close(booted.values_BR, plain.values_BR, rtol=1e-5, atol=1e-6)
    finished_B = torch.tensor(plain.responses.finished)
    torch.testing.assert_close(booted.returns_BR[finished_B], plain.returns_BR[finished_B], rtol=1e-5, atol=1e-6)
    ends_BR = (booted.returns_BR - plain.returns_BR).abs()
    assert float(ends_BR[~finished_B].min()) > 1e-4  # all of them are as long as the longest


@pytest.mark.parametrize("bootstrap", [True, False])
def test_fitted_values_are_those_of_the_critic_after_it_is_fitted(base: Path, bootstrap: bool) -> None:
    config = ppo_config(bootstrap_truncated=bootstrap, gae_lambda=0.5)
    bank = make_bank(base, config)
    plain, fitted = (collect(base, config, bank=bank, fit_values=each) for each in (False, True))
    assert plain.value_fit is None
    assert fitted.value_fit is not None
    assert abs(fitted.value_fit.factor - 1) > 0.1 < abs(fitted.value_fit.offset)
    bank.rescale_values(*fitted.value_fit)
    again = collect(base, config, bank=bank)
    for name in ("values_BR", "returns_BR", "advantages_BR"):
        torch.testing.assert_close(getattr(fitted, name), getattr(again, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("advantage", ["gae", *CRITICLESS])
def test_a_filtered_response_trains_nothing_and_moves_nobody(base: Path, advantage: str) -> None:
    """Whatever the cut responses score, what trains is the same bit for bit, and so is the shaper's memory."""
    config = ppo_config(advantage=advantage, overlong={"filter": True}, score={"normalize": True})
    plain = collect(base, ppo_config(advantage=advantage))
    cut = {text for text, ended in zip(plain.responses.texts, plain.responses.finished, strict=True) if not ended}
    assert not cut & {
        text for text, ended in zip(plain.responses.texts, plain.responses.finished, strict=True) if ended
    }

    def garbled(prompts: Sequence[Any], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        clean = lengths(prompts, responses, rows)
        return [1e20 if text in cut else score for text, score in zip(responses, clean, strict=True)]

    shapers = [ScoreShaper(config.score) for _ in range(2)]
    ours, theirs = (
        collect(base, config, score=score, shaper=shaper)
        for score, shaper in zip((lengths, garbled), shapers, strict=True)
    )
    finished_B = torch.tensor(plain.responses.finished)
    assert torch.equal(ours.loss_mask_BR, plain.mask_BR & finished_B[:, None])
    assert torch.equal(ours.mask_BR, plain.mask_BR)
    assert torch.equal(ours.advantages_BR, theirs.advantages_BR)
    assert not bool(ours.advantages_BR[~ours.loss_mask_BR].any())
    if advantage == "gae":
        assert ours.returns_BR is not None
        assert theirs.returns_BR is not None
        assert torch.equal(ours.returns_BR, theirs.returns_BR)
        assert not bool(ours.returns_BR[~ours.loss_mask_BR].any())
    assert shapers[0] == shapers[1]
    assert shapers[0].count == sum(plain.responses.finished)


class Abstaining:
    """Scores by length what ended by itself; for the rest it has no score, as a judge may."""

    def score(self, answered: Answered) -> list[float]:
        scores = lengths(answered.prompts, answered.responses, answered.rows)
        return [score if ended else math.nan for score, ended in zip(scores, answered.finished, strict=True)]


@pytest.mark.parametrize("advantage", ["gae", *CRITICLESS])
def test_a_response_without_a_score_is_left_out_as_a_filtered_one_is(base: Path, advantage: str) -> None:
    settings: dict[str, object] = {"advantage": advantage, "score": {"normalize": True}}
    config = ppo_config(**settings)
    shapers = [ScoreShaper(config.score) for _ in range(2)]
    unscored = collect(base, config, score=Abstaining(), shaper=shapers[0])
    filtered = collect(base, ppo_config(**settings, overlong={"filter": True}), shaper=shapers[1])
    assert 0 < int(unscored.score_B.isnan().sum()) < len(unscored.score_B)
    assert torch.equal(unscored.loss_mask_BR, filtered.loss_mask_BR)
    assert torch.equal(unscored.advantages_BR, filtered.advantages_BR)
    assert shapers[0] == shapers[1]
    figures = figures_of(unscored, config)
    known = [score for score in unscored.score_B.tolist() if not math.isnan(score)]
    assert figures["score/mean"] == pytest.approx(sum(known) / len(known))
    assert figures["score/missing"] == len(unscored.score_B) - len(known)


def test_without_the_filter_every_sampled_token_trains(base: Path) -> None:
    experience = collect(base, ppo_config())
    assert torch.equal(experience.loss_mask_BR, experience.mask_BR)


def test_explained_variance_is_that_of_what_trains(base: Path) -> None:
    config = ppo_config(overlong={"filter": True})
    experience = collect(base, config)
    assert experience.values_BR is not None
    assert experience.returns_BR is not None
    kept_BR = experience.mask_BR & torch.tensor(experience.responses.finished)[:, None]
    returns_M, values_M = experience.returns_BR[kept_BR], experience.values_BR[kept_BR]
    expected = 1 - float((returns_M - values_M).var(correction=0) / returns_M.var(correction=0))
    assert figures_of(experience, config)["value/explained_variance"] == pytest.approx(expected, rel=1e-5)


def test_near_the_limit_a_response_loses_part_of_its_score(base: Path) -> None:
    """At most 4 tokens, the last 2 are the buffer: 3 tokens cost half of the penalty, 4 all of it."""
    settings = {"gae_lambda": 1.0, "kl": KL["loss"], "score": {"missing_eos_penalty": 8.0}}
    experience = collect(base, ppo_config(**settings, overlong={"buffer": 2, "penalty": 3.0}))
    assert experience.returns_BR is not None
    for row, completion in enumerate(experience.responses.completions):
        lost = {1: 0.0, 2: 0.0, 3: 1.5, 4: 3.0}[len(completion.tokens)] + (0.0 if completion.finished else 8.0)
        assert float(experience.returns_BR[row, 0]) == pytest.approx(float(experience.score_B[row]) - lost, abs=1e-5)


@pytest.mark.parametrize("advantage", ["gae", *CRITICLESS])
def test_the_split_into_microbatches_changes_nothing(base: Path, advantage: str) -> None:
    def tensors(microbatch_tokens: int) -> list[Tensor]:
        critic = {"bootstrap_truncated": True} if advantage == "gae" else {}
        config = ppo_config(advantage=advantage, microbatch_tokens=microbatch_tokens, **critic)
        experience = collect(base, config)
        optional = [experience.values_BR, experience.returns_BR]
        every = [experience.ref_logprobs_BR, experience.advantages_BR, *(each for each in optional if each is not None)]
        assert len(every) == (4 if advantage == "gae" else 2)
        return every

    for one, other in pairwise([tensors(1), tensors(33), tensors(10_000)]):
        for ours, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
