"""What must not change an update, and the bound on its step."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.ppo.experience import Experience
from tests.tiny import tiny_model_folder
from tests.tiny_ppo import (
    BR_FIELDS,
    assert_same,
    gradients,
    make_bank,
    make_experience,
    moved_policy,
    ppo_config,
    still_updater,
    updater_of,
    weights,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"))


def widened(experience: Experience, places: int, filler: float) -> Experience:
    """The experience as it would be beside a longer response: padded further, with `filler`."""

    def wider(values_BR: Tensor, value: float) -> Tensor:
        return torch.cat([values_BR, torch.full((len(values_BR), places), value, dtype=values_BR.dtype)], 1)

    masks = {name: wider(getattr(experience, name), False) for name in ("mask_BR", "loss_mask_BR")}
    return replace(experience, **masks, **{name: wider(getattr(experience, name), filler) for name in BR_FIELDS})


@pytest.mark.parametrize("critic", ["shared", "adapter"])
@pytest.mark.parametrize("filler", [0.0, float("nan")])
def test_wider_padding_changes_no_gradient_bit_for_bit(base: Path, critic: str, filler: float) -> None:
    bank, config = make_bank(base, critic), ppo_config()
    experience = moved_policy(make_experience(bank, base, config))
    figures = still_updater(bank, config).update(experience, 1, 0.1)
    expected = gradients(bank)
    assert still_updater(bank, config).update(widened(experience, 5, filler), 1, 0.1) == figures
    for name, gradient in gradients(bank).items():
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize("critic", ["shared", "adapter", "model"])
def test_eight_times_one_row_is_one_times_eight(base: Path, critic: str) -> None:
    """A step accumulated over eight microbatches of one response, against a single one of all eight."""
    bank, config = make_bank(base, critic), ppo_config()
    experience = moved_policy(make_experience(bank, base, config))
    still_updater(bank, config).update(experience, 1, 0.1)
    together = gradients(bank)
    assert len(experience.responses.microbatches(range(8), 1)) == 8
    still_updater(bank, ppo_config(microbatch_tokens=1)).update(experience, 1, 0.1)
    assert_same(gradients(bank), together)


@pytest.mark.parametrize("bound", [0.05, 1e9, None])
def test_a_step_is_made_with_gradients_of_bounded_norm(base: Path, bound: float | None) -> None:
    """Plain gradient descent with rate 1 moves all weights together by the norm of the clipped gradient."""
    bank, config = make_bank(base), ppo_config(max_grad_norm=bound)
    experience = make_experience(bank, base, config)
    optimizer = torch.optim.SGD([{"params": list(bank.trained().values()), "lr": 1.0, "peak_lr": 1.0}])
    updater = updater_of(bank, ppo_config(max_grad_norm=bound, learning_rate=1.0), optimizer)
    before = weights(bank)
    figures = updater.update(experience, 1, 0.1)
    moved = sum(float((after - before[name]).square().sum()) for name, after in weights(bank).items()) ** 0.5
    assert figures["grad_norm"] > 0.1
    assert moved == pytest.approx(min(bound or math.inf, figures["grad_norm"]), rel=1e-3)
    assert figures.get("grad_norm/bounded_fraction") == (None if bound is None else float(bound < 0.1))
