"""The bundled quickstart, by its real command: what the README promises of it holds."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config

LONGEST_SECONDS = 480
MOST_BYTES = 3e9
WIDTH = 1.5  # how much longer a machine that is not idle may take


def launch(folder: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "launch", *arguments, "--json"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.soak), pytest.param(2, marks=pytest.mark.soak)])
def test_the_chain_lifts_the_true_quality(tmp_path: Path, seed: int) -> None:
    out = tmp_path / "out"
    began = time.monotonic()
    answer = launch(tmp_path, "run", "quickstart", f"seed={seed}", "--out", str(out))
    seconds = time.monotonic() - began
    figures = answer["report"]["figures"]
    gain = figures["differences"]["ppo - sft"]["gold"]
    reward = figures["reward_models"]["score"]
    kl = figures["policies"]["ppo"]["kl"]["mean"]
    budget = load_config("quickstart").config.eval.kl_budget  # type: ignore[union-attr]
    assert gain["mean"] >= 0.2
    assert gain["low"] > 0.1  # the interval is shown, and far from nothing
    assert gain["count"] >= 200
    assert reward["accuracy"] >= 0.85
    assert 0 < kl <= budget
    assert figures["policies"]["ppo"]["ended"]["mean"] > 0.9
    assert seconds < WIDTH * LONGEST_SECONDS
    peak = max(row["memory/peak_bytes"] for row in lines(out / "ppo" / "metrics.jsonl"))
    assert peak < MOST_BYTES
    again = launch(tmp_path, "run", "quickstart", f"seed={seed}", "--out", str(out))
    assert [stage["action"] for stage in again["stages"]] == ["skipped"] * 5
    samples = lines(out / "eval" / "samples.jsonl")
    asked = {row["prompt"][0]["content"] for row in samples}
    for name in ("demonstrations", "preferences", "prompts"):
        rows = lines(out / "toy" / f"{name}.jsonl")
        assert not asked & {row["prompt"][0]["content"] for row in rows}
    steps = [row["step"] for row in lines(out / "toy" / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
