"""Real rows through the bundled recipes and the real command, shortened to a few steps on the smallest model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
SMALLEST = "base_model=../shared/models/stories260K-llama"

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is missing"),
]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stderr
    return ended


def metrics(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("recipe", "holdout", "account"),
    [
        ("alpaca", "sft.holdout=0.01", "5000 rows read, 2 refused (most often: response is empty, 2x), 0 duplicates"),
        ("gsm8k", "sft.holdout.weight=0.05", "8792 rows read, 0 refused, 0 duplicates, 0 also in the holdout"),
        ("zh", "sft.holdout=0.03", "1000 rows read, 0 refused, 8 duplicates"),
    ],
)
def test_demonstrations_are_learned_from_the_recipe_alone(
    tmp_path: Path, recipe: str, holdout: str, account: str
) -> None:
    short = ["sft.max_steps=6", "sft.batch_size=8", "sft.learning_rate=5e-3", "sft.eval_every=3", "max_length=256"]
    ended = launch("sft", recipe, SMALLEST, *short, holdout, "--out", str(tmp_path))
    assert account in ended.stderr
    lines = metrics(tmp_path / "sft")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("recipe", "account"),
    [("hh-harmless", "2312 rows read, 0 refused, 0 duplicates"), ("oasst", "754 rows read, 0 refused, 0 duplicates")],
)
def test_preferences_give_an_accuracy_with_its_interval(tmp_path: Path, recipe: str, account: str) -> None:
    short = ["rm.max_steps=2", "rm.batch_size=8", "rm.holdout=0.1", "max_length=256"]
    ended = launch("rm", recipe, SMALLEST, *short, "--out", str(tmp_path))
    assert account in ended.stderr
    report = json.loads((tmp_path / "rm" / "report.json").read_text())
    holdout = report["holdout"]
    assert report["holdout_pairs"] > 5
    assert 0 <= holdout["accuracy_low"] < holdout["accuracy"] < holdout["accuracy_high"] <= 1
    assert {"calibration_error", "score_mean", "score_std", "score_length_correlation"} <= holdout.keys()


def test_the_whole_chain_on_stories(tmp_path: Path) -> None:
    short = ["sft.max_steps=2", "rm.max_steps=2", "ppo.updates=2", "ppo.eval_prompts=4", "ppo.rollout_batch_size=8"]
    short += ["ppo.minibatch_size=8", "ppo.response_length=24", "sft.batch_size=4", "rm.batch_size=4"]
    short += ["sft.holdout=0.01", "rm.holdout=0.02"]
    launch("run", "stories", SMALLEST, *short, "--out", str(tmp_path))
    samples = [json.loads(line) for line in (tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 2}
    assert all(sample["response"] and len(sample["prompt"].split()) == 12 for sample in samples)
    again = launch("run", "stories", SMALLEST, *short, "--out", str(tmp_path), "--json")
    assert [stage["action"] for stage in json.loads(again.stdout)["stages"]] == ["skipped"] * 3
