"""A PPO run that is killed or stopped, and resumed, ends with the weights of the run that was left alone."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import tiny_adapter_folder, tiny_model_folder

ROOT = Path(__file__).parents[2]
UPDATES = 12
WAIT_SECONDS = 120
REWARD = "def score(prompts, responses, rows):\n    return [len(set(each)) - 0.3 * len(each) for each in responses]\n"
# What a clock or the machine decides.
MEASURED = ("time/", "throughput/", "memory/", "seconds")


def write_run(folder: Path, critic: str) -> Path:
    """A config with every piece of state that could be forgotten: adaptive KL, score statistics, several samples."""
    base = tiny_model_folder(folder / "base")
    reward = tiny_adapter_folder(folder / "rm", base, head="score")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    prompts = [
        {"prompt": f"{opening} {number}"} for opening in ("the cat", "say", "a dog ran to") for number in range(9)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    config = {
        "name": "resumed",
        "base_model": str(base),
        "max_length": 48,
        "threads": 1,
        "checkpoint_every": 2,
        "tuning": {"rank": 4, "alpha": 8},
        "ppo": {
            "prompts": [{"path": "prompts.jsonl"}],
            "reward": [{"function": "reward.py:score"}, {"model": str(reward), "weight": 0.5}],
            "critic": critic,
            "updates": UPDATES,
            "rollout_batch_size": 16,
            "samples_per_prompt": 2,
            "minibatch_size": 8,
            "epochs": 2,
            "response_length": 16,
            "learning_rate": 3e-3,
            "schedule": "linear",
            "critic_warmup": 1,
            "kl": {"coef": 0.1, "target": 0.5},
            "score": {"normalize": True, "clip": 3.0, "missing_eos_penalty": 0.5},
            "eval_every": 3,
            "eval_prompts": 4,
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def start(config: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """The real command, in a process of its own."""
    command = [sys.executable, "-m", "launch", "ppo", str(config), "--out", str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=WAIT_SECONDS)
    return process.returncode, output


def logged_updates(out: Path) -> int:
    path = out / "ppo" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def stop_after(process: subprocess.Popen[str], out: Path, update: int, delay: float, number: signal.Signals) -> bool:
    """Sends the signal `delay` seconds after the update was logged; False where the run had ended before."""
    deadline = time.monotonic() + WAIT_SECONDS
    while logged_updates(out) < update:
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.005)
    time.sleep(delay)
    if process.poll() is not None:
        return False
    process.send_signal(number)
    return True


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, but for what a clock decides."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(MEASURED)} for line in lines]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Weights bit for bit, every figure and every sample, and what the manifest says."""
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (out / "ppo" / "weights").iterdir()}
        for out in (ours, theirs)
    ]
    assert digests[0] == digests[1]
    assert "adapter_model.safetensors" in digests[0]
    metrics = rows(ours / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, UPDATES + 1))
    assert metrics == rows(theirs / "ppo" / "metrics.jsonl")
    assert rows(ours / "ppo" / "samples.jsonl") == rows(theirs / "ppo" / "samples.jsonl")
    figures = [json.loads((out / "ppo" / "artifact.json").read_text())["metrics"] for out in (ours, theirs)]
    for each in figures:
        assert each
    assert set(figures[0]) == set(figures[1])
    assert all(figures[0][name] == figures[1][name] for name in figures[0] if not name.startswith(MEASURED))


def left_alone(folder: Path, critic: str) -> tuple[Path, Path]:
    """The config and the output of a run that nobody disturbed."""
    config, out = write_run(folder, critic), folder / "alone"
    code, output = finish(start(config, out))
    assert code == 0, output
    return config, out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return left_alone(tmp_path_factory.mktemp("run"), "adapter")


def kill_repeatedly(config: Path, out: Path, generator: random.Random, kills: int) -> None:
    """Starts the run, kills it a random time after a random update, and again; then lets it end."""
    update = 0
    for _ in range(kills):
        process = start(config, out)
        update = min(generator.randint(max(update, 1), update + 4), UPDATES)
        killed = stop_after(process, out, update, generator.uniform(0, 0.3), signal.SIGKILL)
        code, output = finish(process)
        assert code == (-signal.SIGKILL if killed else 0), output
        if not killed:
            return
    code, output = finish(start(config, out))
    assert code == 0, output


@pytest.mark.slow
def test_a_run_killed_several_times_ends_with_the_same_weights(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    config, alone = undisturbed
    kill_repeatedly(config, tmp_path / "out", random.Random(0), kills=3)
    assert_same_run(tmp_path / "out", alone)


def unpublished(alone: Path, out: Path) -> Path:
    """The checkpoints folder of a copy of a run, as if it had been killed after its last update."""
    shutil.copytree(alone, out)
    (out / "ppo" / "artifact.json").unlink()
    shutil.rmtree(out / "ppo" / "weights")
    return out / "ppo" / "checkpoints"


@pytest.mark.slow
def test_a_run_killed_after_its_last_update_is_finished_by_the_next_launch(
    undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    config, alone = undisturbed
    out = tmp_path / "out"
    unpublished(alone, out)
    code, output = finish(start(config, out, "--resume", "must"))
    assert code == 0, output
    assert_same_run(out, alone)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    config, alone = undisturbed
    out = tmp_path / "out"
    newest = max(unpublished(alone, out).glob("step-*"))
    with (newest / "weights.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    code, output = finish(start(config, out, "--resume", "must"))
    assert code == 0, output
    assert "passed over" in output
    assert f"after update {UPDATES - 2}" in output
    assert_same_run(out, alone)


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_saves_and_says_so(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    config, alone = undisturbed
    out = tmp_path / "out"
    process = start(config, out)
    assert stop_after(process, out, 3, 0.02, signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    done = logged_updates(out)
    assert 3 <= done < UPDATES
    assert (out / "ppo" / "checkpoints" / f"step-{done:08d}" / "checkpoint.json").is_file()
    code, output = finish(start(config, out, "--resume", "must"))
    assert code == 0, output
    assert f"after update {done}" in output
    assert_same_run(out, alone)


@pytest.mark.soak
@pytest.mark.parametrize("critic", ["adapter", "shared", "model"])
def test_many_killed_runs_end_with_the_same_weights(tmp_path: Path, critic: str) -> None:
    config, alone = left_alone(tmp_path, critic)
    for seed in range(25):
        out = tmp_path / f"out-{seed}"
        kill_repeatedly(config, out, random.Random(seed), kills=4)
        assert_same_run(out, alone)
