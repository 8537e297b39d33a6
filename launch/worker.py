"""What one process runs: it settles its environment, then plans or runs the stages that a command names."""

import logging
import os
import random
import signal
import sys
import threading
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from data.errors import UserError
from launch.answer import MENDABLE, Answer

if TYPE_CHECKING:
    from pipeline.inputs import Run
    from pipeline.state import Resume

# oneDNN compiles a bfloat16 product for each number of tokens and keeps 1,024 of them, nearly a megabyte each. An
# update comes back to the newest few dozen: a shared critic's PPO peaked at 652 MB with these and 1,054 MB without,
# in the same time (benchmarks/README.md).
COMPILED_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "16"}


@dataclass(frozen=True)
class Request:
    """A command line, parsed but not yet checked."""

    command: str
    config: str
    overrides: tuple[str, ...]
    out: Path | None
    plan_only: bool
    resume: "Resume"
    gpus: int | None
    hostfile: Path | None
    people: bool = False  # label by people, also where the config has no section for them


def carry_out(request: Request) -> Answer:
    """The answer to one command. Raises UserError, Interrupted."""
    _check_options(request)
    from pipeline.config import load_config

    loaded = load_config(request.config, request.overrides)
    if request.people and loaded.config.label is not None and loaded.config.label.people is None:
        loaded = load_config(request.config, (*request.overrides, "label.people={}"))
    from pipeline.inputs import Run

    folder = (request.out or Path("runs") / loaded.config.name).expanduser().absolute()
    run = Run(loaded.config, loaded.folder, folder)
    names = _stage_names(request, run.stages)
    set_environment(request.gpus)
    return _plan(run, names, request) if request.plan_only else _run(run, names, request)


def _check_options(request: Request) -> None:
    problems: list[str] = []
    if request.gpus is not None and request.gpus not in (0, 1):
        problems.append(f"--gpus {request.gpus}: this version trains in one process; use --gpus 1")
    if request.hostfile is not None:
        problems.append(f"--hostfile {request.hostfile}: this version trains in one process; leave it out")
    if problems:
        raise UserError(*problems)


def _stage_names(request: Request, present: list[str]) -> list[str]:
    """The stages that a command concerns: all of the config's, or its own."""
    if request.command in ("run", "plan"):
        if not present:
            raise UserError(f"CONFIG={request.config}: has no stage; add a section sft, label, rm, dpo, ppo or eval")
        return present
    if request.command not in present:
        raise UserError(f"CONFIG={request.config}: has no section {request.command}; add one, as `launch init` shows")
    return [request.command]


def _plan(run: "Run", names: list[str], request: Request) -> Answer:
    os.environ["HF_HUB_OFFLINE"] = "1"  # a plan downloads nothing; read when huggingface_hub is imported
    from pipeline.console import stdout_console
    from pipeline.plan import make_plan, plan_data
    from pipeline.plan_view import print_plan

    plans = make_plan(run, names, resume=request.resume)
    problems = [problem for plan in plans for problem in plan.problems]

    def show() -> None:
        print_plan(plans, stdout_console())
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)

    status = "error" if problems else "planned"
    return Answer({"status": status, "problems": problems, **plan_data(plans, run)}, show, MENDABLE if problems else 0)


def _run(run: "Run", names: list[str], request: Request) -> Answer:
    from pipeline.chain import Launch, run_stages
    from pipeline.console import StageView, stderr_console, stdout_console
    from pipeline.report import REPORTING, print_report, read_report

    stop = stop_on_signal()
    console = stderr_console()
    launch = Launch(
        run=run,
        resume=request.resume,
        viewer=lambda stage: StageView(stage, console),
        say=console.print,
        should_stop=stop.is_set,
        before_stage=lambda: set_threads_and_seeds(run.config.threads, run.config.seed),
    )
    outcomes = run_stages(launch, names)
    report = read_report(run.folder, names[-1]) if names[-1] in REPORTING else None
    data = {"status": "done", "out": str(run.folder), "stages": [asdict(outcome) for outcome in outcomes]}

    def show() -> None:
        if report is not None:
            print_report(report, stdout_console())

    return Answer(data | ({"report": report} if report is not None else {}), show)


def set_environment(gpus: int | None) -> None:
    """Keeps libraries silent, small and at home, before any is imported; worker processes inherit it."""
    for name, most in COMPILED_PRODUCTS.items():
        os.environ.setdefault(name, most)
    os.environ.update(
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_DISABLE_TELEMETRY="1",
        DO_NOT_TRACK="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        TRANSFORMERS_VERBOSITY=os.environ.get("TRANSFORMERS_VERBOSITY", "error"),
        TRL_EXPERIMENTAL_SILENCE="1",
    )
    if gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in ("transformers", "trl", "peft", "datasets", "accelerate", "httpx2", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def set_threads_and_seeds(threads: int | None, seed: int) -> None:
    """Settles the number of CPU threads and every global random generator; stages seed their own beside."""
    import numpy
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    random.seed(seed)
    numpy.random.seed(seed)  # libraries draw from the global generator
    torch.manual_seed(seed)


def stop_on_signal() -> threading.Event:
    """Set by the first SIGTERM or SIGINT, on which a stage writes a checkpoint and stops; a second ends the process."""
    stop = threading.Event()

    def handle(number: int, _: FrameType | None) -> None:
        if stop.is_set():
            os._exit(1)  # no clean-up: artifacts and checkpoints are published atomically
        stop.set()
        print(f"{signal.Signals(number).name}: stopping at the next checkpoint; again to stop at once", file=sys.stderr)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return stop
