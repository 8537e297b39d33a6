"""Before anything trains, the critic's values are fitted to the first returns by a factor and an offset."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.core.ops import explained_variance
from stages.ppo.advantages import gae
from stages.ppo.experience import ValueFit
from tests.ranks import Case, run_case
from tests.supervised import demonstrations, write_rows
from tests.tiny import tiny_adapter_folder, tiny_model_folder

ALL = torch.ones(1, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("values", "gamma", "factor", "offset"),
    [
        ([0.0, 1.0], 0.5, 0.5, 0.5),  # the rewards to come are 0.5 and 1
        ([0.0, -1.0], 0.5, 0.0, 0.75),  # the wrong way round: better their mean alone
        ([0.0, 0.0], 0.5, 1.0, 0.75),
        ([0.1, 0.1], 1.0, 1.0, 0.9),
        ([3.0, 1.0], 1.0, 0.0, 1.0),
    ],
)
def test_known_answers(values: list[float], gamma: float, factor: float, offset: float) -> None:
    fit = ValueFit.of(torch.tensor([values]), torch.tensor([[0.0, 1.0]]), ALL, gamma)
    assert fit == pytest.approx((factor, offset), abs=1e-6)


def test_it_has_the_least_squared_error_over_the_tokens_that_train() -> None:
    torch.manual_seed(0)
    mask_BR = torch.arange(6) < torch.tensor([6, 3, 4, 0])[:, None]  # the last response is left out of the loss
    values_BR, reward_BR = torch.randn(4, 6), torch.randn(4, 6) * mask_BR
    _, returns_BR = gae(reward_BR, values_BR, mask_BR, gamma=0.9, gae_lambda=1.0)
    values_BR += returns_BR - 3
    fit = ValueFit.of(values_BR, reward_BR, mask_BR, 0.9)

    def error(factor: float, offset: float) -> float:
        return float((factor * values_BR + offset - returns_BR)[mask_BR].square().sum())

    assert 0 < fit.factor < 1 < fit.offset
    for factor, offset in ((1.01, 1), (0.99, 1), (1, 1.01), (1, 0.99)):
        assert error(*fit) < error(factor * fit.factor, offset * fit.offset)
    garbage_BR = torch.where(mask_BR, values_BR, 1e6)
    assert ValueFit.of(garbage_BR, reward_BR, mask_BR, 0.9) == pytest.approx(fit)
    assert ValueFit.of(values_BR, reward_BR, torch.zeros_like(mask_BR), 0.9) == (1, 0)
    assert explained_variance(fit.values(values_BR, mask_BR), returns_BR, mask_BR) > 0


def test_where_all_scores_are_equal_no_token_is_better_than_another() -> None:
    """A critic of 0 would give the last tokens of a response more advantage than the first."""
    mask_BR = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    reward_BR = torch.zeros(3, 6).scatter_(1, mask_BR.sum(1, keepdim=True) - 1, 2.0)
    zero_BR = torch.zeros(3, 6)
    fit = ValueFit.of(zero_BR, reward_BR, mask_BR, 1.0)
    biased_BR, _ = gae(reward_BR, zero_BR, mask_BR, gamma=1.0, gae_lambda=0.95)
    assert biased_BR[0, 5] > biased_BR[0, 0] + 0.4
    fair_BR, _ = gae(reward_BR, fit.values(zero_BR, mask_BR), mask_BR, gamma=1.0, gae_lambda=0.95)
    torch.testing.assert_close(fair_BR, zero_BR)


def run(folder: Path, base: Path, reward: Path, **section: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The figures of each update, and the weights of the last checkpoint."""
    folder.mkdir()
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in demonstrations(16)])
    settings: dict[str, Any] = {
        **{"updates": 2, "rollout_batch_size": 8, "minibatch_size": 8, "epochs": 1, "response_length": 8},
        **{"value_learning_rate": 1e-12, "eval_prompts": 2},
        "reward": [{"config": {"model": "rm"}, "source": str(reward)}],
    }
    shared = {"tuning": {"method": "lora", "rank": 4, "alpha": 8}, "max_length": 64}
    run_case(Case(str(folder), "ppo", str(base), str(folder / "prompts.jsonl"), shared, settings | section))
    lines = [json.loads(line) for line in (folder / "ppo" / "metrics.jsonl").read_text().splitlines()]
    (weights,) = (folder / "ppo" / "checkpoints").rglob("weights.safetensors")
    return [line for line in lines if "loss" in line], load_file(weights)


@pytest.mark.parametrize(
    ("critic", "init", "factor_is_1"),
    [("adapter", "reward", False), ("model", "reward", False), ("adapter", "fresh", True), ("shared", "reward", True)],
)
def test_the_first_update_fits_the_critic_and_no_other_does(
    tmp_path: Path, critic: str, init: str, factor_is_1: bool
) -> None:
    """Values that are 0 everywhere, as a fresh critic's and a shared one's, need no factor."""
    base = tiny_model_folder(tmp_path / "base")
    reward = tiny_adapter_folder(tmp_path / "rm", base, head="score", seed=2)
    lines, weights = run(tmp_path / "fitted", base, reward, critic=critic, value_init=init)
    raw_lines, raw_weights = run(tmp_path / "raw", base, reward, critic=critic, value_init=init, value_fit=False)
    assert ["value/fit_factor" in line for line in lines] == [True, False]
    assert not any("value/fit_factor" in line for line in raw_lines)
    factor, offset = (lines[0][f"value/fit_{name}"] for name in ("factor", "offset"))
    assert (factor == 1) == factor_is_1
    assert abs(offset) > 0.01
    torch.testing.assert_close(weights["value_head.0"], factor * raw_weights["value_head.0"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights["value_head.1"], torch.tensor([offset]), rtol=1e-4, atol=1e-6)
    assert lines[0]["value/loss"] < raw_lines[0]["value/loss"]
    assert lines[0]["score/mean"] == raw_lines[0]["score/mean"]
