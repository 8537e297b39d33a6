"""Mistakes that people make, through the real command: one line each, exit status 2, no traceback, nothing written."""

import fcntl
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_model_folder

CONFIG = """
name: mistakes
base_model: model
max_length: 64
sft: {data: [{path: demonstrations.jsonl}], batch_size: 8, max_steps: 1}
rm: {data: [{path: pairs.jsonl}], batch_size: 8, max_steps: 1}
ppo:
  policy: model
  prompts: [{path: prompts.jsonl}]
  reward: {function: "reward.py:length"}
  updates: 1
  rollout_batch_size: 4
  minibatch_size: 4
  response_length: 4
"""
REWARD = """
def length(prompts, responses, rows):
    return [float(len(response)) for response in responses]


def too_few(prompts, responses, rows):
    return [1.0]


def no_number(prompts, responses, rows):
    return [float("nan")] * len(responses)
"""
LAUNCH = [sys.executable, "-m", "launch"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: model, rows, reward function and config."""
    folder = tmp_path_factory.mktemp("project")
    tiny_model_folder(folder / "model")
    rows = [{"prompt": f"say {number}", "response": f" yes {number}"} for number in range(40)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "demonstrations.jsonl").write_text(text)
    (folder / "prompts.jsonl").write_text(text)
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(text.encode())[:100])
    (folder / "empty.jsonl").write_text("")
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": " no"} for row in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "reward.py").write_text(REWARD)
    (folder / "no_module.py").write_text("import there_is_no_such_module\n")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "list.yaml").write_text("- sft\n")
    (folder / "tabs.yaml").write_text("sft:\n\tdata: []\n")
    return folder


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.run(
        [*LAUNCH, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def problems(ended: subprocess.CompletedProcess[str]) -> list[str]:
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    return [line.removeprefix("error: ") for line in ended.stderr.splitlines() if line.startswith("error: ")]


# --- before anything heavy is imported


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sft", "."], "is a folder; give a YAML file"),
        (["sft", "list.yaml"], "not a mapping"),
        (["sft", "tabs.yaml"], "cannot be read as YAML"),
        (["eval", "config.yaml"], "has no section eval"),
        (["ppo", "config.yaml", "ppo.minibatch_size=3"], "does not divide rollout_batch_size=4"),
    ],
)
def test_one_line_for_a_wrong_command_line(project: Path, arguments: list[str], expected: str) -> None:
    (problem,) = problems(launch(project, *arguments))
    assert expected in problem
    assert not (project / "runs").exists()


# --- before the first stage of a chain begins


def test_a_chain_does_not_begin_where_a_later_stage_lacks_a_file(project: Path, tmp_path: Path) -> None:
    mistakes = ["ppo.prompts.0.path=missing.jsonl", "ppo.reward.function=nowhere.py:f", "rm.data.0.path=none*.jsonl"]
    found = problems(launch(project, "run", "config.yaml", *mistakes, "--out", str(tmp_path / "run")))
    assert sorted(line.split(":")[0] for line in found) == ["missing.jsonl", "none*.jsonl", "reward.0=nowhere.py"]
    assert not (tmp_path / "run").exists()


def test_a_base_model_that_is_nowhere_costs_seconds(project: Path, tmp_path: Path) -> None:
    for name, expected in [("./nowhere", "no such file or folder"), ("nobody/nothing", "the hub does not answer")]:
        (problem,) = problems(launch(project, "sft", "config.yaml", f"base_model={name}", "--out", str(tmp_path)))
        assert name in problem
        assert expected in problem


def test_a_second_launch_into_the_same_folder_is_told_to_wait(project: Path, tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (problem,) = problems(launch(project, "sft", "config.yaml", "--out", str(tmp_path)))
    assert "another launch is writing this run" in problem


# --- what a stage finds in its inputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sft", "sft.data.0.path=cut.jsonl.gz"], "the compressed file is damaged from here on"),
        (["sft", "sft.data.0.path=empty.jsonl"], "no rows left to use"),
        (["sft", "sft.data.0.columns={response: output}"], "no column 'output'; the row has prompt, response"),
        (["ppo", "ppo.reward.function=reward.py:nobody"], "no function 'nobody'"),
        (["ppo", "ppo.reward.function=reward.py:too_few"], "1 scores for 4 responses"),
        (["ppo", "ppo.reward.function=reward.py:no_number"], "returned nan; return finite numbers"),
        (["ppo", "ppo.reward.function=no_module.py:f"], "there_is_no_such_module"),
    ],
)
def test_one_line_for_an_unfit_input(project: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    command, *overrides = arguments
    (problem,) = problems(launch(project, command, "config.yaml", *overrides, "--out", str(tmp_path)))
    assert expected in problem
    assert not (tmp_path / command / "artifact.json").exists()


@pytest.mark.slow
def test_an_artifact_of_the_wrong_kind_and_a_damaged_one_are_refused(project: Path, tmp_path: Path) -> None:
    assert launch(project, "sft", "config.yaml", "--out", str(tmp_path)).returncode == 0
    policy = tmp_path / "sft"
    as_reward = ["ppo", "config.yaml", f"ppo.reward={{model: {policy}}}", "--out", str(tmp_path / "ppo-run")]
    (problem,) = problems(launch(project, *as_reward))
    assert "a policy (from stage sft), where a reward_model is needed" in problem
    weights = max((policy / "weights").iterdir(), key=lambda path: path.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-1])
    (problem,) = problems(launch(project, "rm", "config.yaml", "--out", str(tmp_path)))
    assert weights.name in problem
