"""Importance weights between sampler and trainer: by hand, and what they do to the update."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.core.rollout.protocol import EngineError
from stages.ppo.experience import Experience
from stages.ppo.importance import check_sampler, importance_figures, importance_weights, sampler_kl
from stages.ppo.loss import policy_loss
from tests.tiny import tiny_model_folder
from tests.tiny_ppo import (
    assert_same,
    clear_gradients,
    gradients,
    make_bank,
    make_experience,
    ppo_config,
    still_updater,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"))


def logs(probabilities: Sequence[float]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_a_weight_is_trainer_over_sampler_cut_to_the_cap() -> None:
    trainer, sampler = logs([0.6, 0.2, 0.9, 0.5]), logs([0.3, 0.4, 0.1, 0.5])
    assert importance_weights(trainer, sampler, 3.0).tolist() == pytest.approx([2.0, 0.5, 3.0, 1.0])
    assert importance_weights(trainer, sampler, 1.0).tolist() == pytest.approx([1.0, 0.5, 1.0, 1.0])


def test_a_weight_is_a_constant_to_the_gradient() -> None:
    trainer = logs([0.6, 0.2]).requires_grad_(True)
    assert not importance_weights(trainer, logs([0.3, 0.4]), 3.0).requires_grad


def test_a_weight_multiplies_its_tokens_term_and_gradient() -> None:
    """-(0.5 * 1.1 * 2 + 3 * 1 * (-4)): the second token's ratio is 1."""
    old = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    new = (old + torch.tensor([math.log(1.1), 0.0])).requires_grad_(True)
    advantages = torch.tensor([2.0, -4.0], dtype=torch.float64)
    loss = policy_loss(new, old, advantages, 0.2, weights_M=torch.tensor([0.5, 3.0], dtype=torch.float64))
    loss.backward()
    assert loss.item() == pytest.approx(10.9)
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([-1.1, 12.0])


def sampled_elsewhere(experience: Experience, ratio: float) -> Experience:
    """As if whoever sampled had given every token 1 / ratio of the trainer's probability."""
    sampler_BR = (experience.logprobs_BR - math.log(ratio)) * experience.mask_BR
    return replace(experience, sampler_logprobs_BR=sampler_BR)


@pytest.mark.parametrize(
    ("ratio", "cap", "weight"), [(2.0, 3.0, 2.0), (2.0, 1.5, 1.5), (0.5, 3.0, 0.5), (2.0, None, 1.0)]
)
def test_the_policys_gradient_is_weighed_and_the_critics_is_not(
    base: Path, ratio: float, cap: float | None, weight: float
) -> None:
    bank, config = make_bank(base), ppo_config(rollout={"engine": "vllm", "importance_cap": cap})
    experience = make_experience(bank, base, config)
    still_updater(bank, config).update(experience, 1, 0.1)
    plain = gradients(bank)
    clear_gradients(bank)
    still_updater(bank, config).update(sampled_elsewhere(experience, ratio), 1, 0.1)
    expected = {name: each * (weight if name.startswith("policy") else 1.0) for name, each in plain.items()}
    assert_same(gradients(bank), expected)


def test_a_sampler_that_is_the_trainer_changes_nothing_bit_for_bit(base: Path) -> None:
    bank, config = make_bank(base), ppo_config(rollout={"engine": "vllm"})
    experience = make_experience(bank, base, config)
    assert experience.sampler_logprobs_BR is None
    found: list[dict[str, Tensor]] = []
    for each in (experience, sampled_elsewhere(experience, 1.0)):
        clear_gradients(bank)
        still_updater(bank, config).update(each, 1, 0.1)
        found.append(gradients(bank))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_figures_are_of_the_tokens_that_train(base: Path) -> None:
    """Six tokens: three train, with ratios 4, 1 and 0.5; under a cap of 2 the weights are 2, 1 and 0.5."""
    bank, config = make_bank(base), ppo_config(rollout={"engine": "vllm"})
    experience = make_experience(bank, base, config)
    assert importance_figures(experience, 2.0) == {}
    mask_BR = torch.zeros_like(experience.mask_BR)
    mask_BR[0, :3] = True
    sampler_BR = experience.logprobs_BR.clone()
    sampler_BR[0, :3] -= torch.tensor([4.0, 1.0, 0.5]).log()
    sampler_BR[1] += 9  # does not train
    chosen = replace(experience, loss_mask_BR=mask_BR, sampler_logprobs_BR=sampler_BR)
    assert importance_figures(chosen, 2.0) == pytest.approx(
        {"importance/mean": 3.5 / 3, "importance/max": 2.0, "importance/truncated": 1 / 3}, rel=1e-5
    )
    assert importance_figures(chosen, None) == {}
    nothing = replace(chosen, loss_mask_BR=torch.zeros_like(mask_BR))
    assert importance_figures(nothing, 2.0) == {}


def test_the_samplers_kl_by_hand() -> None:
    """k3 with r = trainer / sampler: r - 1 - log r. 1/4 against 1/2 gives -1/2 + log 2; 1/2 against 1/4: 1 - log 2."""
    assert sampler_kl(logs([0.5]), logs([0.25])) == pytest.approx(math.log(2) - 0.5)
    assert sampler_kl(logs([0.25]), logs([0.5])) == pytest.approx(1 - math.log(2))
    assert sampler_kl(logs([0.5, 0.25]), logs([0.25, 0.5])) == pytest.approx(0.25)
    assert sampler_kl(logs([0.5]), logs([0.5])) == 0


def test_a_kl_above_its_bound_is_an_engines_failure() -> None:
    assert check_sampler(0.01, 0.01, 3) == {"kl/sampler_trainer": 0.01}
    for kl in (0.0101, math.nan, math.inf):
        with pytest.raises(EngineError, match=r"kl/sampler_trainer=.* policy version 3, above .*max_sampler_kl=0.01"):
            check_sampler(kl, 0.01, 3)
