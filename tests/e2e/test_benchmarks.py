"""Each benchmark once, as a user starts it, on a model of nothing: every arm runs and its figures hang together."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--model", "random-tiny", "--rank", "4", "--threads", "1"]
PPO = ["--updates", "2", "--batch", "16", "--minibatch", "8", "--epochs", "2", "--response-length", "8"]

pytestmark = pytest.mark.slow
needs_peers = pytest.mark.skipif(not (ROOT / ".peers/trl-1.12/trl").is_dir(), reason="run `make peers` first")


def run_benchmark(name: str, folder: Path, *arguments: str) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """What it printed, and the raw output of each arm's processes."""
    raw = folder / "raw.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", *TINY, *arguments, "--json", str(raw)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outputs: dict[str, list[dict[str, Any]]] = {}
    for run in json.loads(raw.read_text(encoding="utf-8"))["runs"]:
        outputs.setdefault(run["arm"], []).append(run["output"])
    for arm in outputs:
        assert f"| {arm} " in done.stdout
    return done.stdout, outputs


def check_ppo(output: dict[str, Any]) -> None:
    """What holds for any arm: phases make up the update, tokens fit the budget, memory is that of a process."""
    assert len(output["updates"]) == 2
    for update in output["updates"]:
        phases = [update[phase] for phase in ("rollout", "scoring", "update", "other")]
        assert min(phases[:3]) > 0
        assert sum(phases) == pytest.approx(update["total"], rel=1e-6)
        assert 16 <= update["response_tokens"] <= 16 * 8
        assert 16 * 16 <= update["prompt_tokens"] <= 16 * 66  # 16 to 64 tokens each, and BOS where one is put
        assert update.get("tokens_behind_eos", 0) == 0
    assert output["peak_bytes"] >= output["libraries_bytes"] > 1e8
    assert min(output["peaks"].values()) > 1e6


@needs_peers
@pytest.mark.timeout(1800)
def test_ppo_with_fixed_lengths_compares_like_with_like(tmp_path: Path):
    arms = ("trl-default", "ours-adapter")
    printed, outputs = run_benchmark("ppo", tmp_path, *PPO, "--lengths", "fixed", "--arms", *arms)
    assert set(outputs) == set(arms)
    assert "x TRL default" in printed
    first = {arm: own[0]["updates"][0] for arm, own in outputs.items()}
    for arm in arms:
        check_ppo(outputs[arm][0])
        assert [update["response_tokens"] for update in outputs[arm][0]["updates"]] == [16 * 8, 16 * 8]
        assert abs(first[arm]["kl"]) < 1e-3  # the policy starts as the reference
        assert first[arm]["eos_fraction"] == 0
    assert first["trl-default"]["prompt_tokens"] == first["ours-adapter"]["prompt_tokens"]
    # Means of 16 scores with deviation about 1, over the same prompts and the same distribution of responses.
    assert first["trl-default"]["score"] == pytest.approx(first["ours-adapter"]["score"], abs=1.5)


@needs_peers
@pytest.mark.timeout(3000)
def test_ppo_with_lengths_that_end(tmp_path: Path):
    arms = ("trl-lora-critic-bf16", "trl-full", "ours-shared-bf16", "ours-full")
    _, outputs = run_benchmark("ppo", tmp_path, *PPO, "--lengths", "eos", "--arms", *arms)
    assert set(outputs) == set(arms)
    for own in outputs.values():
        check_ppo(own[0])
        # Half of 8 tokens on average; 16 responses stray.
        assert 2 <= own[0]["updates"][0]["response_tokens"] / 16 <= 6.5
        assert 0.3 <= own[0]["updates"][0]["eos_fraction"] <= 1


@pytest.mark.timeout(1800)
def test_rollouts(tmp_path: Path):
    sizes = ["--rollouts", "2", "--batch", "8", "--response-length", "8", "--lengths", "fixed"]
    _, outputs = run_benchmark("rollout", tmp_path, *sizes, "--arms", "native", "hf-logprobs", "hf-merged-bf16")
    assert set(outputs) == {"native", "hf-logprobs", "hf-merged-bf16"}
    for own in outputs.values():
        assert [each["response_tokens"] for each in own[0]["updates"]] == [8 * 8, 8 * 8]
        assert all(each["total"] > 0 for each in own[0]["updates"])


@pytest.mark.parametrize("stage", ["sft", "rm"])
@pytest.mark.timeout(1800)
def test_supervised_stages(stage: str, tmp_path: Path):
    sizes = ["--steps", "2", "--batch", "8", "--microbatch", "4", "--median-length", "8", "--max-length", "64"]
    _, outputs = run_benchmark(
        "sft_rm", tmp_path, "--stage", stage, *sizes, "--tuning", "lora", "--arms", "trl", "ours"
    )
    assert set(outputs) == {"trl-lora", "ours-lora"}
    steps = {arm: own[0]["updates"] for arm, own in outputs.items()}
    # One epoch of the same rows: the same tokens in all, in another order; a random model knows nothing of either.
    assert sum(step["tokens"] for step in steps["trl-lora"]) == sum(step["tokens"] for step in steps["ours-lora"])
    assert steps["trl-lora"][0]["loss"] == pytest.approx(steps["ours-lora"][0]["loss"], rel=0.1)
