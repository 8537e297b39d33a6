"""Runs a stage of this project in the present process, through its public `run`, and takes its metrics."""

import importlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import clock
from launch.worker import set_environment
from pipeline.config import validate
from pipeline.inputs import Run, stage_inputs
from stages.core.context import StageContext

NEVER = 10**9  # steps between checkpoints and between evaluations


class Recorder:
    """Takes a stage's metrics; implements `stages.core.context.Metrics`."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._before = (0.0, 0.0)

    def start(self, total_steps: int, unit: str) -> None:
        """The first step begins."""
        self._before = (clock(), time.process_time())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One step's figures, and the wall and CPU seconds since the step before."""
        now = (clock(), time.process_time())
        self.rows.append(dict(values) | {"wall_s": now[0] - self._before[0], "cpu_s": now[1] - self._before[1]})
        self._before = now

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Not kept."""

    def rewind(self, step: int) -> None:
        """Nothing to drop: a benchmark never resumes."""

    def say(self, message: str) -> None:
        """Goes to the worker's output."""
        print(message)


def run_stage(stage: str, config: Mapping[str, Any], folder: Path) -> Recorder:
    """What the stage reported, in the environment that `launch` makes; its artifact goes to `folder/STAGE`."""
    set_environment(None)
    run, recorder = Run(validate(dict(config), [folder]), None, folder), Recorder()
    (folder / stage).mkdir(parents=True, exist_ok=True)
    context = StageContext[Any](
        stage=stage,
        out=folder / stage,
        run_folder=folder,
        config_folder=None,
        shared=run.config,
        config=getattr(run.config, stage),
        inputs=stage_inputs(run, stage),
        key="benchmark",
        metrics=recorder,
        should_stop=lambda: False,
    )
    importlib.import_module(f"stages.{stage}.stage").run(context)
    return recorder
