"""Real launches on two ranks: a small project, the command as a process, and its ranks by number."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.tiny import tiny_model_folder

WORDS = ("cat", "dog", "house", "mat", "yes", "no", "hello", "day")


def make_project(folder: Path) -> Path:
    """A config of the whole chain in `folder`, with a tiny model and a few rows."""
    tiny_model_folder(folder / "model")
    prompts = [{"prompt": f"the {word} sat {number} times"} for number, word in enumerate(WORDS * 4)]
    _write_rows(folder / "rows.jsonl", [{**row, "response": "on the red mat"} for row in prompts])
    _write_rows(folder / "pairs.jsonl", [{**row, "chosen": "yes " * 3, "rejected": "no"} for row in prompts])
    _write_rows(folder / "prompts.jsonl", prompts)
    config = {
        "base_model": str(folder / "model"),
        "max_length": 64,
        "threads": 1,
        "trackers": [],
        "tuning": {"method": "lora", "rank": 2, "alpha": 4},
        "sft": {"data": [_data(folder, "rows")], "max_steps": 4, "batch_size": 4, "microbatch_size": 2},
        "rm": {"data": [_data(folder, "pairs")], "max_steps": 2, "batch_size": 4, "microbatch_size": 2},
        "ppo": {
            "prompts": [_data(folder, "prompts")],
            "updates": 2,
            "rollout_batch_size": 4,
            "minibatch_size": 4,
            "response_length": 8,
            "epochs": 1,
        },
        "eval": {"prompts": [_data(folder, "prompts")], "response_length": 8, "max_prompts": 4},
    }
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _data(folder: Path, name: str) -> dict[str, str]:
    return {"path": str(folder / f"{name}.jsonl")}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def launch(*arguments: str | Path, inside: tuple[str, ...] = (), **environment: str) -> "subprocess.Popen[str]":
    """`launch ARGUMENTS`, begun; its output is read by `communicate`."""
    command = [*inside, sys.executable, "-m", "launch", *map(str, arguments)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    elsewhere = tempfile.gettempdir()  # `-m` would look in the working folder first
    return subprocess.Popen(
        command, cwd=elsewhere, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ranks_of(process: "subprocess.Popen[str]") -> dict[int, psutil.Process]:
    """The ranks that a launch has started, by number."""
    found: dict[int, psutil.Process] = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "launch.rank" in child.cmdline() and "RANK" in child.environ():
                found[int(child.environ()["RANK"])] = child
        except psutil.Error:
            continue  # it has just ended
    return found


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 120) -> None:
    """Returns when `condition` holds; a launch that ends before fails the test with what it said."""
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)


def steps_of(stage_folder: Path) -> list[int]:
    """The steps in a stage's metrics."""
    path = stage_folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []
