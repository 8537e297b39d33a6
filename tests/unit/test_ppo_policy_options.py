"""Options of the policy's loss: each changes the gradient as its definition says, and nothing else does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.core.bank import PolicyBank
from stages.ppo.config import PpoConfig
from stages.ppo.experience import Experience
from stages.ppo.update import build_optimizer
from tests.tiny import tiny_model_folder
from tests.tiny_ppo import (
    CPU,
    TEXTS,
    assert_same,
    clear_gradients,
    gradients,
    make_bank,
    make_experience,
    moved_policy,
    permuted,
    ppo_config,
    still_updater,
    updater_of,
    value_unit,
    weights,
)

KL_COEF = 0.7
OPTIONS: dict[str, dict[str, object]] = {
    "clip_range_high": {"clip_range_high": 0.05},
    "dual_clip": {"dual_clip": 1.1},
    "value_clip_range": {"value_clip_range": None},
    "entropy_coef": {"entropy_coef": 0.3},
    "kl k2": {"kl": {"place": "loss", "estimator": "k2"}},
    "kl k3": {"kl": {"place": "loss", "estimator": "k3"}},
}
TOGETHER: dict[str, object] = {name: value for change in OPTIONS.values() for name, value in change.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"))


def filtered(experience: Experience, rows: list[int]) -> Experience:
    """The experience with these responses out of the loss."""
    loss_mask_BR = experience.loss_mask_BR.clone()
    loss_mask_BR[rows] = False
    return replace(experience, loss_mask_BR=loss_mask_BR)


def loss_by_definition(bank: PolicyBank, experience: Experience, config: PpoConfig) -> Tensor:
    """The mean over tokens that train, each response by itself, from all logits of the vocabulary."""
    high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    value_coef = config.value_coef / value_unit(bank, experience)
    total, count = torch.zeros(()), 0
    for row, completion in enumerate(experience.responses.completions):
        batch = experience.responses.batch([row], CPU)
        logits_RV = bank.policy.trunk.lm_head(bank.policy.hidden_before(batch)) / bank.temperature
        probabilities_RV = logits_RV.softmax(1)
        values_R = bank.values(batch)
        for place, token in enumerate(completion.tokens):
            if not experience.loss_mask_BR[row, place]:
                continue
            old, ref, advantage, value, target = (
                getattr(experience, name)[row, place]
                for name in ("logprobs_BR", "ref_logprobs_BR", "advantages_BR", "values_BR", "returns_BR")
            )
            new = probabilities_RV[place, token].log()
            ratio = (new - old).exp()
            if advantage >= 0:
                loss = -torch.min(ratio, torch.tensor(1 + high)) * advantage
            else:
                lowest = torch.max(ratio, torch.tensor(1 - config.clip_range))
                lowest = lowest if config.dual_clip is None else torch.min(lowest, torch.tensor(config.dual_clip))
                loss = -lowest * advantage
            error = (values_R[place] - target) ** 2
            if config.value_clip_range is not None:
                near = value + (values_R[place] - value).clip(-config.value_clip_range, config.value_clip_range)
                error = torch.max(error, (near - target) ** 2)
            entropy = -(probabilities_RV[place] * probabilities_RV[place].log()).sum()
            loss = loss + value_coef * error / 2 - config.entropy_coef * entropy
            if config.kl.place == "loss":
                difference = new - ref
                k2, k3 = difference**2 / 2, torch.exp(-difference) - 1 + difference
                loss = loss + KL_COEF * (k2 if config.kl.estimator == "k2" else k3)
            total, count = total + loss, count + 1
    return total / count


@pytest.mark.parametrize("critic", ["shared", "adapter"])
@pytest.mark.parametrize("change", [*OPTIONS.values(), TOGETHER], ids=[*OPTIONS, "together"])
def test_each_option_changes_the_gradient_as_defined(base: Path, critic: str, change: dict[str, object]) -> None:
    """One response and a few tokens of others are out of the loss, so that no term can count them."""
    bank, config = make_bank(base, critic), ppo_config(**change)
    experience = moved_policy(make_experience(bank, base, ppo_config()))
    loss_mask_BR = experience.loss_mask_BR & (torch.rand(experience.mask_BR.shape) < 0.8)
    loss_mask_BR[3] = False
    experience = replace(experience, loss_mask_BR=loss_mask_BR)
    still_updater(bank, ppo_config()).update(experience, 1, KL_COEF)
    without = gradients(bank)
    figures = still_updater(bank, config).update(experience, 1, KL_COEF)
    ours = gradients(bank)
    assert any(not torch.allclose(ours[name], without[name], rtol=1e-3) for name in ours)

    clear_gradients(bank)
    expected = loss_by_definition(bank, experience, config)
    expected.backward()
    assert figures["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert_same(ours, gradients(bank))

    split = still_updater(bank, config.model_copy(update={"microbatch_tokens": 20})).update(experience, 1, KL_COEF)
    assert_same(gradients(bank), ours)
    assert split == pytest.approx(figures, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("estimator", "slope"), [("k2", lambda d: d), ("k3", lambda d: 1 - torch.exp(-d))])
def test_kl_in_the_loss_pulls_each_token_by_its_slope(base: Path, estimator: str, slope: object) -> None:
    """With nothing else in the loss its gradient is beta * mean of f'(d) * grad log pi, d = log pi - log pi_ref."""
    bank = make_bank(base, None)
    config = ppo_config(advantage="reinforce++", value_coef=None, kl={"place": "loss", "estimator": estimator})
    experience = make_experience(bank, base, config)
    experience = replace(experience, advantages_BR=torch.zeros_like(experience.advantages_BR))
    figures = still_updater(bank, config).update(experience, 1, KL_COEF)
    ours = gradients(bank)
    clear_gradients(bank)
    logprobs_M = bank.policy_logprobs(experience.responses.batch(range(len(TEXTS)), CPU))
    difference_M = logprobs_M.detach() - experience.ref_logprobs_BR[experience.mask_BR]
    (KL_COEF * slope(difference_M) / len(logprobs_M) * logprobs_M).sum().backward()  # type: ignore[operator]
    assert_same(ours, gradients(bank))
    assert figures["loss"] == pytest.approx(KL_COEF * figures["kl/loss"], rel=1e-5)
    assert figures["kl/loss"] > 0


def test_kl_in_the_reward_is_no_part_of_the_loss(base: Path) -> None:
    bank, config = make_bank(base), ppo_config()
    experience = moved_policy(make_experience(bank, base, config))
    figures = still_updater(bank, config).update(experience, 1, 0.0)
    expected = gradients(bank)
    assert still_updater(bank, config).update(experience, 1, 100.0) == figures
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(bank).items())
    assert "kl/loss" not in figures


def test_an_entropy_bonus_raises_the_entropy(base: Path) -> None:
    bank = make_bank(base, None)
    config = ppo_config(advantage="reinforce++", value_coef=None, entropy_coef=1.0, epochs=3, learning_rate=1e-3)
    experience = make_experience(bank, base, config)
    experience = replace(experience, advantages_BR=torch.zeros_like(experience.advantages_BR))
    updater = updater_of(bank, config, build_optimizer(bank, config))
    entropies = [updater.update(experience, update, 0.0)["policy/entropy_exact"] for update in (1, 2, 3)]
    assert entropies[0] < entropies[1] < entropies[2]
    assert 0 < entropies[0] < torch.tensor(300.0).log()  # of at most 300 tokens


def test_the_clip_fraction_counts_both_sides(base: Path) -> None:
    bank, config = make_bank(base), ppo_config(clip_range=0.1, clip_range_high=0.4)
    experience = moved_policy(make_experience(bank, base, config))
    figures = still_updater(bank, config).update(experience, 1, 0.0)
    new_M = bank.policy_logprobs(experience.responses.batch(range(len(TEXTS)), CPU)).detach()
    ratios = torch.exp(new_M - experience.logprobs_BR[experience.mask_BR]).tolist()
    below, above = (sum(ratio < 0.9 for ratio in ratios), sum(ratio > 1.4 for ratio in ratios))
    assert min(below, above) > 0
    assert figures["policy/clip_fraction"] == pytest.approx((below + above) / len(ratios))


@pytest.mark.parametrize("critic", ["shared", "adapter", None])
def test_filtered_responses_have_no_effect(base: Path, critic: str | None) -> None:
    """Bit for bit whatever stands in them, and the same gradients as if they had never been sampled."""
    change = {"advantage": "reinforce++", "value_coef": None} if critic is None else {"value_clip_range": None}
    options = {name: value for name, value in TOGETHER.items() if name != "value_clip_range"}
    bank, config = make_bank(base, critic), ppo_config(**options | change)
    experience = filtered(moved_policy(make_experience(bank, base, config)), [2, 5])
    kept = [0, 1, 3, 4, 6, 7]
    figures = still_updater(bank, config).update(experience, 1, KL_COEF)
    expected = gradients(bank)
    dirty = {
        name: torch.where(experience.loss_mask_BR, getattr(experience, name), float("nan"))
        for name in ("logprobs_BR", "ref_logprobs_BR", "values_BR", "advantages_BR", "returns_BR")
        if getattr(experience, name) is not None
    }
    assert still_updater(bank, config).update(replace(experience, **dirty), 1, KL_COEF) == figures
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(bank).items())
    alone = still_updater(bank, config).update(permuted(experience, kept), 1, KL_COEF)
    assert_same(gradients(bank), expected)
    assert alone["loss"] == pytest.approx(figures["loss"], rel=1e-5)


def test_a_minibatch_of_filtered_responses_makes_no_step(base: Path) -> None:
    bank, config = make_bank(base), ppo_config(minibatch_size=1, epochs=2)
    experience = filtered(make_experience(bank, base, config), [0, 1, 5])
    optimizer = build_optimizer(bank, config)
    steps: list[int] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    figures = updater_of(bank, config, optimizer).update(experience, 1, 0.0)
    assert len(steps) == 10  # five of eight minibatches, twice
    assert figures["policy/empty_minibatches"] == 6
    assert figures["policy/epochs_done"] == 2

    before = weights(bank)
    figures = updater_of(bank, config, optimizer).update(filtered(experience, list(range(8))), 2, 0.0)
    assert figures.keys() == {"policy/epochs_done", "policy/empty_minibatches", "lr"}
    assert figures["policy/empty_minibatches"] == 16
    assert all(torch.equal(each, before[name]) for name, each in bank.trained().items())


def kl_old_new(bank: PolicyBank, experience: Experience, rows: list[int]) -> float:
    """Mean over tokens of ratio - 1 - log ratio, the k3 estimate of KL(old || new)."""
    mask_BR = experience.mask_BR[rows]
    log_ratio_M = bank.policy_logprobs(experience.responses.batch(rows, CPU)).detach()
    log_ratio_M = log_ratio_M - experience.logprobs_BR[rows][mask_BR]
    return float((log_ratio_M.exp() - 1 - log_ratio_M).mean())


def test_early_stop_measures_before_the_step_and_ends_the_epochs(base: Path) -> None:
    bound = 0.01
    bank, config = make_bank(base), ppo_config(minibatch_size=4, epochs=4, learning_rate=5e-3, early_stop_kl=bound)
    experience = make_experience(bank, base, config)
    optimizer = build_optimizer(bank, config)
    updater = updater_of(bank, config, optimizer)
    order = updater._minibatches(8, 1)
    before_step: list[float] = []
    after_step: list[dict[str, Tensor]] = []
    optimizer.register_step_pre_hook(
        lambda *_: before_step.append(kl_old_new(bank, experience, order[len(before_step)]))
    )
    optimizer.register_step_post_hook(lambda *_: after_step.append(weights(bank)))
    figures = updater.update(experience, 1, 0.0)
    assert 1 <= len(after_step) < 8
    assert max(before_step) <= bound < kl_old_new(bank, experience, order[len(after_step)])
    assert figures["policy/epochs_done"] == len(after_step) / 2
    assert all(torch.equal(each, after_step[-1][name]) for name, each in bank.trained().items())
    assert not gradients(bank)
    # The minibatch that was too far is among the measured ones.
    stopped_at = kl_old_new(bank, experience, order[len(after_step)])
    measured = [*before_step, stopped_at]
    assert figures["policy/approx_kl"] == pytest.approx(sum(measured) / len(measured), rel=1e-4)


def test_an_early_stop_at_the_first_minibatch_changes_nothing(base: Path) -> None:
    bank, config = make_bank(base), ppo_config(minibatch_size=4, epochs=2, early_stop_kl=1e-3)
    experience = moved_policy(make_experience(bank, base, config))
    before = weights(bank)
    figures = updater_of(bank, config, build_optimizer(bank, config)).update(experience, 1, 0.0)
    assert figures["policy/epochs_done"] == 0
    assert "grad_norm" not in figures
    assert all(torch.equal(each, before[name]) for name, each in bank.trained().items())


def test_a_bound_that_is_never_reached_changes_nothing(base: Path) -> None:
    def trained(**change: object) -> tuple[dict[str, Tensor], float]:
        bank, config = make_bank(base), ppo_config(minibatch_size=4, epochs=2, **change)
        experience = make_experience(bank, base, config)
        figures = updater_of(bank, config, build_optimizer(bank, config)).update(experience, 1, 0.0)
        return weights(bank), figures["policy/epochs_done"]

    (plain, epochs), (bounded, bounded_epochs) = trained(), trained(early_stop_kl=10.0)
    assert epochs == bounded_epochs == 2
    assert all(torch.equal(each, plain[name]) for name, each in bounded.items())


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("advantage", ["grpo", "rloo", "reinforce++"])
def test_without_a_critic_only_the_policy_trains(base: Path, method: str, advantage: str) -> None:
    bank = make_bank(base, None, method)
    config = ppo_config(advantage=advantage, samples_per_prompt=2, value_coef=None)
    experience = moved_policy(make_experience(bank, base, config))
    assert bank.value_head is None
    assert bank.outputs(experience.responses.batch([0], CPU)).values_M is None
    assert {name.split(".")[0] for name in bank.trained()} == {"policy"}
    optimizer = build_optimizer(bank, config)
    assert len(optimizer.param_groups) == 1
    before = weights(bank)
    figures = updater_of(bank, config, optimizer).update(experience, 1, 0.0)
    assert not any(name.startswith("value/") for name in figures)
    assert figures["loss"] == pytest.approx(figures["policy/loss"])
    assert any(not torch.equal(each, before[name]) for name, each in bank.trained().items())
