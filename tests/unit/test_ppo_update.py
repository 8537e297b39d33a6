"""One PPO update on a tiny model: gradients by definition, however the batch is cut, and no step on nonsense."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.errors import UserError
from stages.core.responses import Responses
from stages.ppo.update import build_optimizer
from tests.tiny import tiny_model_folder
from tests.tiny_ppo import (
    BR_FIELDS,
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

CRITICS = ["shared", "adapter", "model"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_first_ratio_is_one(base: Path, critic: str, method: str) -> None:
    bank, config = make_bank(base, critic, method), ppo_config()
    experience = make_experience(bank, base, config)
    figures = still_updater(bank, config).update(experience, 1, 0.1)
    assert figures["policy/first_ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert figures["policy/clip_fraction"] == 0
    assert figures["policy/approx_kl"] == pytest.approx(0, abs=1e-6)
    everyone = experience.responses.batch(range(len(TEXTS)), CPU)
    ratios_M = torch.exp(bank.policy_logprobs(everyone).detach() - experience.logprobs_BR[experience.mask_BR])
    torch.testing.assert_close(ratios_M, torch.ones_like(ratios_M), rtol=0, atol=5e-6)


@pytest.mark.parametrize("critic", CRITICS)
def test_gradients_are_those_of_the_definition(base: Path, critic: str) -> None:
    """The loss written out token by token, each response by itself and unpacked."""
    bank, config = make_bank(base, critic), ppo_config()
    experience = moved_policy(make_experience(bank, base, config))
    figures = still_updater(bank, config).update(experience, 1, 0.1)
    ours = gradients(bank)

    clear_gradients(bank)
    value_coef = 0.3 / value_unit(bank, experience)
    total, count = torch.zeros(()), 0
    for row, completion in enumerate(experience.responses.completions):
        alone = experience.responses.batch([row], CPU)
        logprobs, values = bank.policy_logprobs(alone), bank.values(alone)
        for place in range(len(completion.tokens)):
            old, value, advantage, target = (
                getattr(experience, name)[row, place]
                for name in ("logprobs_BR", "values_BR", "advantages_BR", "returns_BR")
            )
            ratio = (logprobs[place] - old).exp()
            surrogate = torch.min(ratio * advantage, ratio.clip(0.8, 1.2) * advantage)
            near = value + (values[place] - value).clip(-0.2, 0.2)
            error = torch.max((values[place] - target) ** 2, (near - target) ** 2)
            total, count = total - surrogate + value_coef * error / 2, count + 1
    (total / count).backward()
    assert figures["policy/clip_fraction"] > 0.1
    assert figures["loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert_same(ours, gradients(bank))


@pytest.mark.parametrize(("critic", "factor"), [("shared", 1.0), ("adapter", 100.0)])
def test_the_scale_of_the_scores_moves_no_shared_trunk(base: Path, critic: str, factor: float) -> None:
    """Ten times the returns, read by ten times the head, are the same task; a trunk of the critic's own may see it."""
    bank, config = make_bank(base, critic), ppo_config(value_clip_range=None)
    experience = moved_policy(make_experience(bank, base, config))
    part = "policy" if critic == "shared" else "value."
    still_updater(bank, config).update(experience, 1, 0.1)
    expected = {name: factor * gradient for name, gradient in gradients(bank).items() if name.startswith(part)}
    with torch.no_grad():
        for parameter in bank.value_head.parameters():
            parameter.mul_(10)
    larger = {name: 10 * getattr(experience, name) for name in ("values_BR", "returns_BR")}
    still_updater(bank, config).update(replace(experience, **larger), 1, 0.1)
    assert_same({name: gradient for name, gradient in gradients(bank).items() if name.startswith(part)}, expected)


def test_returns_that_are_all_alike_make_no_huge_loss(base: Path) -> None:
    """Of a sparse reward: nothing spreads, and the critic is wrong by 1 everywhere."""
    bank, config = make_bank(base, "shared"), ppo_config(value_clip_range=None)
    experience = make_experience(bank, base, config)
    assert experience.values_BR is not None
    returns_BR = torch.where(experience.mask_BR, experience.values_BR.mean(), 0.0)
    values_BR = torch.where(experience.mask_BR, returns_BR - 1, 0.0)
    still = replace(experience, returns_BR=returns_BR, values_BR=values_BR, advantages_BR=0 * experience.advantages_BR)
    figures = still_updater(bank, config).update(still, 1, 0.1)
    assert figures["loss"] == pytest.approx(0.3 * figures["value/loss"], rel=1e-5)


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("microbatch_tokens", [1, 20, 45])
def test_the_microbatch_split_changes_no_gradient(base: Path, critic: str, microbatch_tokens: int) -> None:
    bank, config = make_bank(base, critic), ppo_config()
    experience = moved_policy(make_experience(bank, base, config))
    whole = still_updater(bank, config).update(experience, 1, 0.1)
    expected = gradients(bank)
    split = still_updater(bank, ppo_config(microbatch_tokens=microbatch_tokens)).update(experience, 1, 0.1)
    assert_same(gradients(bank), expected)
    assert split == pytest.approx(whole, rel=1e-5, abs=1e-7)


def test_the_order_of_rows_changes_no_gradient(base: Path) -> None:
    bank, config = make_bank(base), ppo_config(microbatch_tokens=40)
    experience = moved_policy(make_experience(bank, base, config))
    still_updater(bank, config).update(experience, 1, 0.1)
    expected = gradients(bank)
    for change in (permuted(experience, [3, 1, 7, 0, 2, 6, 5, 4]), permuted(experience, list(range(8))[::-1])):
        still_updater(bank, config).update(change, 1, 0.1)
        assert_same(gradients(bank), expected)
    still_updater(bank, config, seed=99).update(experience, 1, 0.1)
    assert_same(gradients(bank), expected)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -7.0])
def test_garbage_in_padding_changes_no_gradient_bit_for_bit(base: Path, garbage: float) -> None:
    bank, config = make_bank(base, "shared"), ppo_config()
    experience = moved_policy(make_experience(bank, base, config))
    assert not bool(experience.mask_BR.all())
    still_updater(bank, config).update(experience, 1, 0.1)
    expected = gradients(bank)
    dirty = {name: torch.where(experience.mask_BR, getattr(experience, name), garbage) for name in BR_FIELDS}
    still_updater(bank, config).update(replace(experience, **dirty), 1, 0.1)
    for name, gradient in gradients(bank).items():
        assert torch.equal(gradient, expected[name])


def test_padding_of_an_experience_is_zero(base: Path) -> None:
    experience = make_experience(make_bank(base), base, ppo_config())
    lengths = set(experience.responses.lengths)
    assert len(lengths) > 2
    for name in BR_FIELDS:
        assert not bool(getattr(experience, name)[~experience.mask_BR].any()), name


def test_an_experience_adds_up(base: Path) -> None:
    """Returns, without discount and with lambda 1, are score minus KL from each token on; advantages are white."""
    config = ppo_config(gae_lambda=1.0, gamma=1.0)
    bank = make_bank(base)
    experience = make_experience(bank, base, config)
    for row, completion in enumerate(experience.responses.completions):
        score, length = float(experience.score_B[row]), len(completion.tokens)
        assert score == len(experience.responses.texts[row]) % 5 - 2.0
        kl = experience.logprobs_BR[row] - experience.ref_logprobs_BR[row]
        for place in range(length):
            expected = score - 0.1 * float(kl[place:length].sum())
            assert float(experience.returns_BR[row, place]) == pytest.approx(expected, abs=1e-5)
    kept = experience.advantages_BR[experience.mask_BR]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-6)
    assert float(kept.std()) == pytest.approx(1, abs=1e-5)


def test_every_response_is_in_one_minibatch_an_epoch_in_an_order_of_its_own(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, config = make_bank(base), ppo_config(minibatch_size=2, epochs=3)
    experience = make_experience(bank, base, config)
    seen: list[int] = []
    batch = Responses.batch

    def watching(responses: Responses, rows: list[int], device: torch.device) -> object:
        seen.extend(rows)
        return batch(responses, rows, device)

    monkeypatch.setattr(Responses, "batch", watching)

    def orders(update: int) -> list[list[int]]:
        seen.clear()
        still_updater(bank, config).update(experience, update, 0.1)
        return [seen[start : start + 8] for start in range(0, 24, 8)]

    first, second = orders(1), orders(2)
    for order in first + second:
        assert sorted(order) == list(range(8))
    assert len({tuple(order) for order in first + second}) == 6
    assert orders(1) == first


@pytest.mark.parametrize(("samples", "size", "prompts"), [(2, 4, 2), (4, 2, 1), (4, 4, 1), (1, 4, 4)])
def test_samples_of_a_prompt_stay_together_in_an_order_of_their_own(
    base: Path, samples: int, size: int, prompts: int
) -> None:
    bank, config = make_bank(base), ppo_config(samples_per_prompt=samples, minibatch_size=size, epochs=6)
    minibatches = still_updater(bank, config)._minibatches(8, 1)
    assert all(len({row // samples for row in rows}) == prompts for rows in minibatches)
    in_order = [row for rows in minibatches for row in rows]
    epochs = [in_order[start : start + 8] for start in range(0, len(in_order), 8)]
    assert all(sorted(order) == list(range(8)) for order in epochs)
    assert len({tuple(row // samples for row in order) for order in epochs}) > 1
    assert samples == 1 or len({tuple(row for row in order if row < samples) for order in epochs}) > 1


@pytest.mark.parametrize("field", ["advantages_BR", "returns_BR", "logprobs_BR"])
def test_a_loss_that_is_not_finite_stops_before_the_step(base: Path, field: str) -> None:
    bank, config = make_bank(base), ppo_config(minibatch_size=2)
    experience = make_experience(bank, base, config)
    getattr(experience, field)[5, 0] = float("nan")
    optimizer = build_optimizer(bank, config)
    steps: list[dict[str, Tensor]] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(weights(bank)))
    before = weights(bank)
    with pytest.raises(UserError, match=r"prompts\.jsonl:6"):
        updater_of(bank, config, optimizer).update(experience, 1, 0.1)
    last = steps[-1] if steps else before
    for name, parameter in bank.trained().items():
        assert torch.equal(parameter, last[name])
        assert bool(parameter.isfinite().all())


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_critic_warmup_leaves_the_policy_bit_for_bit(base: Path, critic: str, method: str) -> None:
    bank, config = make_bank(base, critic, method), ppo_config(critic_warmup=2, minibatch_size=4, learning_rate=1e-2)
    experience = make_experience(bank, base, config)
    updater = updater_of(bank, config, build_optimizer(bank, config))

    def moved(update: int) -> set[str]:
        before = weights(bank)
        updater.update(experience, update, 0.1)
        return {name.split(".")[0] for name, each in bank.trained().items() if not torch.equal(each, before[name])}

    critic_parts = {"value_head"} if critic == "shared" else {"value_head", "value"}
    everyone = experience.responses.batch(range(8), CPU)
    logprobs = bank.policy_logprobs(everyone)
    assert moved(1) == critic_parts
    assert moved(2) == critic_parts
    assert torch.equal(bank.policy_logprobs(everyone), logprobs)
    assert moved(3) == critic_parts | {"policy"}


@pytest.mark.parametrize("critic", CRITICS)
def test_in_the_warmup_the_logged_loss_is_the_critics_alone(base: Path, critic: str) -> None:
    bank, config = make_bank(base, critic), ppo_config(critic_warmup=1)
    experience = make_experience(bank, base, config)
    experience = replace(experience, advantages_BR=experience.mask_BR.float())
    figures = still_updater(bank, config).update(experience, 1, 0.1)
    assert figures["policy/loss"] == pytest.approx(-1, rel=1e-4)  # ratio 1, advantage 1: shown, and not counted
    assert figures["loss"] == pytest.approx(0.3 * figures["value/loss"] / value_unit(bank, experience), rel=1e-5)


def test_a_step_raises_the_probability_of_what_was_good(base: Path) -> None:
    bank, config = make_bank(base), ppo_config(learning_rate=1e-3, epochs=2)
    experience = make_experience(bank, base, config)
    everyone = experience.responses.batch(range(8), CPU)
    advantages_M = experience.advantages_BR[experience.mask_BR]
    before_M = bank.policy_logprobs(everyone).detach()
    updater_of(bank, config, build_optimizer(bank, config)).update(experience, 1, 0.1)
    gain_M = bank.policy_logprobs(everyone).detach() - before_M
    assert float((gain_M * advantages_M).sum()) > 0.1


def test_a_critic_learns_its_returns(base: Path) -> None:
    bank, config = make_bank(base), ppo_config(value_learning_rate=3e-3, epochs=40, value_clip_range=100.0)
    experience = make_experience(bank, base, config)
    figures = updater_of(bank, config, build_optimizer(bank, config)).update(experience, 1, 0.1)
    everyone = experience.responses.batch(range(8), CPU)
    errors_M = bank.values(everyone).detach() - experience.returns_BR[experience.mask_BR]
    assert float(errors_M.square().mean()) < 0.5 * 2 * figures["value/loss"]


def test_learning_rates(base: Path) -> None:
    def rates(update: int, critic: str = "adapter", **changes: object) -> list[float]:
        bank, config = make_bank(base, critic), ppo_config(updates=10, learning_rate=1e-3, **changes)
        updater = updater_of(bank, config, build_optimizer(bank, config))
        figures = updater.update(make_experience(bank, base, config), update, 0.1)
        assert figures["lr"] == updater.engine.optimizer.param_groups[0]["lr"]
        return [group["lr"] for group in updater.engine.optimizer.param_groups]

    assert rates(7) == [1e-3] * 3
    # linear: 1 at the first update, 1/10 at the tenth of ten
    assert rates(1, schedule="linear") == [1e-3] * 3
    assert rates(10, schedule="linear") == pytest.approx([1e-4] * 3)
    assert rates(1, value_learning_rate=5e-4) == [1e-3, 5e-4, 5e-4]
    assert rates(1, "shared") == pytest.approx([1e-3, 5e-3])
    assert rates(1, "shared", value_learning_rate=2e-3) == [1e-3, 2e-3]


def test_the_head_of_a_wide_shared_critic_learns_more_slowly(base: Path) -> None:
    """5x up to 256 hidden units; four times as many would move a value four times as far, so they get a quarter."""
    bank, config = make_bank(base, "shared"), ppo_config(learning_rate=1e-3)
    for width, factor in ((64, 5), (256, 5), (1024, 1.25)):
        bank.value_head = torch.nn.Linear(width, 1)
        assert build_optimizer(bank, config).param_groups[-1]["lr"] == pytest.approx(1e-3 * factor)
    bank = make_bank(base, "adapter")
    bank.value_head = torch.nn.Linear(1024, 1)
    assert build_optimizer(bank, config).param_groups[-1]["lr"] == 1e-3
