"""A killed or stopped run of sft, rm and dpo, resumed, ends with the bytes and metrics of one left alone."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.artifacts import hash_files
from stages.core.context import Interrupted
from tests.supervised import (
    demonstrations,
    metrics_lines,
    preferences,
    run_stage,
    stage_context,
    write_rows,
)
from tests.tiny import tiny_model_folder

ROOT = Path(__file__).parents[2]
# Dropout draws random numbers at each step; two epochs of 18 rows and batches of 4 make a short last step.
SHARED = {"checkpoint_every": 3, "keep_checkpoints": 1}
LORA = {"method": "lora", "rank": 2, "alpha": 4, "dropout": 0.3}
SECTION = {"batch_size": 4, "microbatch_size": 2, "holdout": 0.25, "epochs": 2, "eval_every": 2, "learning_rate": 0.01}
STEPS = 9


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model and rows for each stage."""
    folder = tmp_path_factory.mktemp("inputs")
    pairs = write_rows(folder / "pairs.jsonl", preferences(24))
    return {
        "source": tiny_model_folder(folder / "base"),
        "sft": write_rows(folder / "rows.jsonl", demonstrations(24)),
        "rm": pairs,
        "dpo": pairs,
    }


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same number of threads as the processes of their own have: sums in another order end in other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def case(inputs: dict[str, Path], stage: str, tuning: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one run."""
    return {
        "stage": stage,
        "source": str(inputs["source"]),
        "data": str(inputs[stage]),
        "shared": {**SHARED, "tuning": tuning},
        "section": SECTION,
    }


def in_process(folder: Path, what: dict[str, Any], **killed: int) -> int:
    """The exit status of one launch in a process of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "case.json").write_text(json.dumps({**what, **killed}), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.supervised", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def outcome(folder: Path, stage: str) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Digests of the weights, the metrics but for times and memory, and the samples."""
    out = folder / stage
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    clocks = ("seconds", "throughput/tokens_per_s", "memory/peak_bytes")
    kept = [{name: value for name, value in line.items() if name not in clocks} for line in lines]
    samples = out / "samples.jsonl"
    return (
        hash_files(out / "weights", skip=()),
        kept,
        samples.read_text(encoding="utf-8").splitlines() if samples.is_file() else [],
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_killed_runs_end_as_the_run_left_alone(tmp_path: Path, inputs: dict[str, Path], stage: str) -> None:
    what = case(inputs, stage, LORA)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_stage(stage_context(whole, **{**what, "data": inputs[stage]}))
    assert in_process(broken, what, die_after=5) == -signal.SIGKILL  # steps 4 and 5 are taken twice
    assert in_process(broken, what, die_in_save=1) == -signal.SIGKILL  # within the checkpoint of step 6
    assert in_process(broken, what) == 0
    assert outcome(broken, stage) == outcome(whole, stage)
    assert [line["step"] for line in outcome(whole, stage)[1]] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
@pytest.mark.parametrize("tuning", [LORA, {"method": "full"}], ids=["lora", "full"])
def test_a_stopped_run_is_resumed_exactly(
    tmp_path: Path, inputs: dict[str, Path], stage: str, tuning: dict[str, Any]
) -> None:
    what = case(inputs, stage, tuning)
    what["data"] = Path(what["data"])
    run_stage(stage_context(tmp_path / "whole", **what))
    stopping = iter([False, True])
    with pytest.raises(Interrupted):
        run_stage(stage_context(tmp_path / "broken", **what, should_stop=lambda: next(stopping)))
    stopping = iter([False, False, False, True])
    with pytest.raises(Interrupted):
        run_stage(stage_context(tmp_path / "broken", **what, should_stop=lambda: next(stopping)))
    last = stage_context(tmp_path / "broken", **what)
    assert [line["step"] for line in metrics_lines(last)] == [1, 2, 3, 4, 5, 6]
    run_stage(last)
    assert outcome(tmp_path / "broken", stage) == outcome(tmp_path / "whole", stage)


def test_best_weights_of_a_lost_future_are_not_published(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """A run that dies after a new best, and resumes from before it, finds the best of its own time."""
    what = case(inputs, "sft", LORA)
    what["data"] = Path(what["data"])
    what["shared"]["checkpoint_every"] = 100  # so that stopping alone writes checkpoints
    stopping = iter([False, False, True])
    with pytest.raises(Interrupted):
        run_stage(stage_context(tmp_path, **what, should_stop=lambda: next(stopping)))
    best = tmp_path / "sft" / "checkpoints" / "best"
    before = json.loads((best / "best.json").read_text())
    assert before["step"] == 2

    class Killed(Exception):
        pass

    def die() -> bool:
        steps.append(len(steps))
        if len(steps) == 3:
            raise Killed
        return False

    steps: list[int] = []
    with pytest.raises(Killed):
        run_stage(stage_context(tmp_path, **what, should_stop=die))
    assert json.loads((best / "best.json").read_text())["step"] == 4
    checkpoint = tmp_path / "sft" / "checkpoints" / "step-00000003"
    assert json.loads((checkpoint / "best" / "best.json").read_text()) == before


def test_a_finished_checkpoint_still_gives_all_figures(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Killed between the last step and publication, the resumed run has nothing to train and everything to tell."""
    what = case(inputs, "rm", LORA)
    what["data"] = Path(what["data"])
    whole = run_stage(stage_context(tmp_path, **what))
    weights = hash_files(tmp_path / "rm" / "weights", skip=())
    again = run_stage(stage_context(tmp_path, **what))
    assert again.metrics == whole.metrics
    assert hash_files(tmp_path / "rm" / "weights", skip=()) == weights
    assert len(outcome(tmp_path, "rm")[1]) == STEPS
