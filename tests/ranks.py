"""Stages on several ranks: each case is a whole run of a stage, and one start of the ranks carries out many.

Run as a script it is one rank: `python -m tests.ranks CASES.json`, with RANK and WORLD_SIZE in its environment.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.metrics import MetricsLog
from stages.core import ranks
from stages.core.config import SharedConfig
from stages.core.context import Interrupted, StageContext
from stages.eval.config import EvalConfig
from stages.ppo.config import PpoConfig
from tests.supervised import SilentView, run_stage, stage_context


@dataclass(frozen=True)
class Case:
    """One run of a stage; `stop_after` ends it with a checkpoint after that many steps of this launch."""

    folder: str
    stage: str
    base: str
    data: str
    shared: Mapping[str, Any] = field(default_factory=dict)
    section: Mapping[str, Any] = field(default_factory=dict)
    stop_after: int | None = None


class Unheard:
    """The metrics of a rank that is not the main one."""

    def start(self, total_steps: int, unit: str) -> None: ...
    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def rewind(self, step: int) -> None: ...
    def say(self, message: str) -> None: ...


def context_of(case: Case) -> StageContext[Any]:
    """The context that `pipeline` would hand to this rank."""
    folder, asked = Path(case.folder), [0]

    def should_stop() -> bool:
        asked[0] += 1
        return asked[0] == case.stop_after

    if case.stage == "ppo":
        context = _ppo_context(case, folder)
    elif case.stage == "eval":
        context = _eval_context(case, folder)
    else:
        options = {"shared": case.shared, "section": case.section}
        context = stage_context(folder, stage=case.stage, source=case.base, data=Path(case.data), **options)
    metrics = context.metrics if ranks.current().is_main else Unheard()
    return replace(context, metrics=metrics, should_stop=should_stop)


def _ppo_context(case: Case, folder: Path) -> StageContext[PpoConfig]:
    out = folder / "ppo"
    out.mkdir(parents=True, exist_ok=True)
    section = dict(case.section)
    reward = section.pop("reward")
    config = PpoConfig.model_validate(
        {"prompts": [{"path": case.data}], "holdout": 0.25, "reward": [each["config"] for each in reward], **section}
    )
    inputs = {"policy": case.base} | {f"reward.{place}": each["source"] for place, each in enumerate(reward)}
    return StageContext(
        stage="ppo",
        out=out,
        run_folder=folder,
        config_folder=None,
        shared=SharedConfig(base_model=case.base, **case.shared),
        config=config,
        inputs=inputs,
        key="key",
        metrics=MetricsLog(out, view=SilentView()),
        should_stop=lambda: False,
    )


def _eval_context(case: Case, folder: Path) -> StageContext[EvalConfig]:
    out = folder / "eval"
    out.mkdir(parents=True, exist_ok=True)
    section = dict(case.section)
    scores: Mapping[str, str] = section.pop("scores")
    functions = {name: {"function": source} for name, source in scores.items()}
    config = EvalConfig.model_validate({"prompts": [{"path": case.data}], "scores": functions, **section})
    inputs = {f"policy.{name}": source for name, source in section["policies"].items()}
    return StageContext(
        stage="eval",
        out=out,
        run_folder=folder,
        config_folder=None,
        shared=SharedConfig(base_model=case.base, **case.shared),
        config=config,
        inputs=inputs | {f"score.{name}": source for name, source in scores.items()},
        key="key",
        metrics=MetricsLog(out, view=SilentView()),
        should_stop=lambda: False,
    )


def run_case(case: Case) -> None:
    """Runs the stage to its end, or to where it is told to stop."""
    try:
        run_stage(context_of(case))
    except Interrupted:
        assert case.stop_after is not None


def run_on_ranks(folder: Path, cases: Sequence[Case], world_size: int = 2) -> None:
    """Runs the cases one after the other on that many processes, as torchrun would start them."""
    path = folder / "cases.json"
    path.write_text(json.dumps([vars(case) for case in cases]), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
    processes: list[subprocess.Popen[bytes]] = []
    for rank, log in enumerate(logs):
        with log.open("wb") as file:
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-W", "ignore", "-m", "tests.ranks", str(path)]
            processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
            time.sleep(0.2)
    finally:
        for process in processes:
            if process.poll() is None:  # one has failed: the others wait for it
                process.kill()
            process.wait()
    told = "\n".join(f"--- rank {rank}\n{log.read_text()[-4000:]}" for rank, log in enumerate(logs))
    assert [process.returncode for process in processes] == [0] * world_size, told


def main(path: Path) -> None:
    """One rank's part of every case."""
    import torch

    torch.set_num_threads(1)
    ranks.join(timeout_seconds=120)
    for case in json.loads(path.read_text(encoding="utf-8")):
        run_case(Case(**case))
        ranks.barrier()
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
