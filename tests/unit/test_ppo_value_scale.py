"""A critic that starts as the reward model starts at the size that fits the first returns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stages.ppo.advantages import gae
from stages.ppo.experience import value_scale
from tests.ranks import Case, run_case
from tests.supervised import demonstrations, write_rows
from tests.tiny import tiny_adapter_folder, tiny_model_folder

ALL = torch.ones(1, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("values", "gamma", "expected"),
    [
        ([1.0, 1.0], 0.5, 0.75),  # the rewards to come are 0.5 and 1
        ([1.0, 1.0], 1.0, 1.0),
        ([4.0, 4.0], 1.0, 0.25),
        ([3.0, 1.0], 1.0, 0.4),
        ([-1.0, -2.0], 1.0, 0.0),  # the wrong way round: better no values than these
        ([0.0, 0.0], 1.0, 1.0),
    ],
)
def test_known_answers(values: list[float], gamma: float, expected: float) -> None:
    assert value_scale(torch.tensor([values]), torch.tensor([[0.0, 1.0]]), ALL, gamma) == pytest.approx(expected)


def test_it_is_the_factor_of_least_squared_error_over_the_tokens_that_train() -> None:
    torch.manual_seed(0)
    mask_BR = torch.arange(6) < torch.tensor([6, 3, 4, 0])[:, None]  # the last response is left out of the loss
    values_BR, reward_BR = torch.randn(4, 6), torch.randn(4, 6) * mask_BR
    _, returns_BR = gae(reward_BR, values_BR, mask_BR, gamma=0.9, gae_lambda=1.0)
    values_BR += 0.5 * returns_BR
    scale = value_scale(values_BR, reward_BR, mask_BR, 0.9)
    errors = [
        float((factor * values_BR - returns_BR)[mask_BR].square().sum())
        for factor in (0.99 * scale, scale, 1.01 * scale)
    ]
    assert 0 < scale < 1
    assert errors[1] < min(errors[0], errors[2])
    garbage_BR = torch.where(mask_BR, values_BR, 1e6)
    assert value_scale(garbage_BR, reward_BR, mask_BR, 0.9) == pytest.approx(scale)


def run(
    folder: Path, base: Path, reward: Path, **section: Any
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
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


@pytest.mark.parametrize("critic", ["adapter", "model"])
def test_the_first_update_scales_the_critic_and_no_other_does(tmp_path: Path, critic: str) -> None:
    base = tiny_model_folder(tmp_path / "base")
    reward = tiny_adapter_folder(tmp_path / "rm", base, head="score", seed=2)
    lines, weights = run(tmp_path / "scaled", base, reward, critic=critic)
    raw_lines, raw_weights = run(tmp_path / "raw", base, reward, critic=critic, value_init="reward")
    assert ["value/initial_scale" in line for line in lines] == [True, False]
    assert not any("value/initial_scale" in line for line in raw_lines)
    scale = lines[0]["value/initial_scale"]
    assert scale != pytest.approx(1, abs=0.01)
    torch.testing.assert_close(weights["value_head.0"], scale * raw_weights["value_head.0"], rtol=1e-4, atol=1e-6)
    assert lines[0]["value/loss"] < raw_lines[0]["value/loss"]
    assert lines[0]["score/mean"] == raw_lines[0]["score/mean"]


def test_a_critic_that_starts_at_zero_is_left_alone(tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base")
    reward = tiny_adapter_folder(tmp_path / "rm", base, head="score", seed=2)
    for critic in ("shared", "adapter"):
        lines, _ = run(
            tmp_path / critic, base, reward, critic=critic, value_init="scaled" if critic == "shared" else "fresh"
        )
        assert not any("value/initial_scale" in line for line in lines)
