"""What the stage does around an update."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.stages import NEVER, run_stage
from stages.ppo.experience import Collector, Experience
from tests.tiny import tiny_model_folder


def test_no_gradient_stays_through_a_rollout_and_its_scoring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the cat {word}"}) + "\n" for word in ("sat", "ran", "is", "on")))
    (tmp_path / "lengths.py").write_text(
        "def score(prompts, responses, rows):\n    return [float(len(each)) for each in responses]\n"
    )
    held: list[int] = []
    collect = Collector.collect

    def noted(self: Collector, *arguments: Any, **options: Any) -> Experience:
        held.append(sum(parameter.grad is not None for parameter in self.bank.trained().values()))
        return collect(self, *arguments, **options)

    monkeypatch.setattr(Collector, "collect", noted)
    ppo = {
        "prompts": [{"path": str(prompts)}],
        "holdout": 0.0,
        "reward": {"function": f"{tmp_path / 'lengths.py'}:score"},
        "updates": 2,
        "rollout_batch_size": 4,
        "minibatch_size": 4,
        "epochs": 1,
        "response_length": 4,
        "eval_every": NEVER,
        "eval_prompts": 1,
    }
    base = tiny_model_folder(tmp_path / "base")
    run_stage("ppo", {"base_model": str(base), "max_length": 32, "trackers": [], "ppo": ppo}, tmp_path / "run")
    assert held == [0, 0]
