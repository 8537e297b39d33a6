"""What one process runs: it settles its environment, then plans or runs the stages that a command names."""

import json
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from data.errors import UserError
from launch.answer import MENDABLE, STOPPED, Answer
from launch.places import Host, hosts_wanted, is_batch_script, ranks_here
from stages.core.context import Interrupted

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
    device: str | None = None
    show: Literal["deepspeed"] | None = None
    people: bool = False  # label by people, also where the config has no section for them
    folder: Path = field(default_factory=Path.cwd)  # where it was given

    def data(self) -> dict[str, Any]:
        """This request for another process."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> "Request":
        """The reverse."""
        paths = {name: Path(data[name]) for name in ("out", "hostfile", "folder") if data[name] is not None}
        fields: dict[str, Any] = {**data, **paths, "overrides": tuple(data["overrides"])}
        return cls(**fields)


def carry_out(request: Request) -> Answer:
    """The answer to one command: in this process, as a rank that somebody started, or by ranks that it starts.

    Raises UserError, Interrupted, RankError.
    """
    if not request.plan_only and (place := _given_place(request)):
        return _as_one_of_many(request, place)
    hosts = hosts_wanted(request.gpus, request.hostfile)
    run, names = _resolve(request)
    if request.show is not None:
        return _deepspeed_json(run)
    if request.plan_only:
        set_environment(request.gpus)
        return _plan(run, names, request, hosts)
    if hosts:
        return _by_ranks(run, names, request, hosts)
    set_environment(request.gpus)
    return _answer(run, names, _run(run, names, request, stop_on_signal()))


def carry_out_as_rank(request: Request, stop: threading.Event, ready: Callable[[], None]) -> list[dict[str, Any]]:
    """What became of each stage, as one of the ranks in RANK and WORLD_SIZE; `ready` is called once they have met.

    Raises the UserError of any rank on all of them.
    """
    set_environment(None)
    problems: list[str] = []
    resolved: tuple[Run, list[str]] | None = None
    try:
        resolved = _resolve(request)
    except UserError as error:
        problems = list(error.problems)
    from launch.agreement import check_agreement, name_interface
    from stages.core import ranks

    name_interface()
    ranks.join()
    try:
        ready()
        ranks.check_together(problems)
        assert resolved is not None
        run, names = resolved
        check_agreement(run)
        try:
            return _run(run, names, request, stop)
        except Interrupted:
            ranks.barrier()  # rank 0 may still be writing the checkpoint
            raise
    finally:
        ranks.leave()


def _given_place(request: Request) -> dict[str, str]:
    """RANK and its like where somebody else started this process as one of several."""
    starts = (request.gpus or 0) > 1 or request.hostfile is not None
    if starts and is_batch_script():
        return {}
    return ranks_here()


def _as_one_of_many(request: Request, place: dict[str, str]) -> Answer:
    """Under torchrun, srun and their kin: rank 0 answers, the others are silent."""
    if request.hostfile is not None:
        raise UserError(
            f"--hostfile {request.hostfile}: this process is already rank {place['RANK']} of {place['WORLD_SIZE']}; "
            "leave it out under torchrun or srun"
        )
    os.environ.update(place)
    stages = carry_out_as_rank(request, stop_on_signal(), lambda: None)
    if place["RANK"] != "0":
        return Answer({"status": "done", "rank": int(place["RANK"])}, lambda: None)
    run, names = _resolve(request)
    return _answer(run, names, stages)


def _by_ranks(run: "Run", names: list[str], request: Request, hosts: Sequence[Host]) -> Answer:
    """Has the ranks carry the request out, and answers as rank 0 would."""
    from launch.cluster import Cluster, Signals
    from pipeline.preflight import check_present
    from pipeline.trackers import check_trackers

    set_environment(None)
    check_trackers(run.config)
    check_present(run, names)
    logs = run.folder / "logs" / time.strftime("%Y%m%d-%H%M%S")
    logs.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(hosts, logs, is_local=request.hostfile is None, signals=Signals())
    verdict = cluster.run(replace(request, out=run.folder).data())
    if verdict["status"] == MENDABLE:
        raise UserError(*verdict["problems"])
    if verdict["status"] == STOPPED:
        raise Interrupted(verdict["reason"])
    return _answer(run, names, verdict["stages"])


def _resolve(request: Request) -> tuple["Run", list[str]]:
    """The run that a request is about, and the stages of it. Raises UserError."""
    from pipeline.config import load_config
    from pipeline.inputs import Run

    loaded = load_config(request.config, request.overrides)
    if request.people and loaded.config.label is not None and loaded.config.label.people is None:
        loaded = load_config(request.config, (*request.overrides, "label.people={}"))
    folder = (request.out or Path("runs") / loaded.config.name).expanduser().absolute()
    run = Run(loaded.config, loaded.folder, folder)
    names = _stage_names(request, run.stages)
    return run, names


def _stage_names(request: Request, present: list[str]) -> list[str]:
    """The stages that a command concerns: all of the config's, or its own."""
    if request.command in ("run", "plan"):
        if not present:
            raise UserError(f"CONFIG={request.config}: has no stage; add a section sft, label, rm, dpo, ppo or eval")
        return present
    if request.command not in present:
        raise UserError(f"CONFIG={request.config}: has no section {request.command}; add one, as `launch init` shows")
    return [request.command]


def _plan(run: "Run", names: list[str], request: Request, hosts: Sequence[Host]) -> Answer:
    os.environ["HF_HUB_OFFLINE"] = "1"  # a plan downloads nothing; read when huggingface_hub is imported
    from pipeline.console import stdout_console
    from pipeline.plan import make_plan, plan_data
    from pipeline.plan_choices import Place, check_device
    from pipeline.plan_view import print_plan

    check_device(request.device)
    place = Place([host.slots for host in hosts] or [1], request.device)
    plans = make_plan(run, names, resume=request.resume, place=place)
    problems = [problem for plan in plans for problem in plan.problems]

    def show() -> None:
        print_plan(plans, stdout_console(), place)
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)

    status = "error" if problems else "planned"
    return Answer({"status": status, "problems": problems, **plan_data(plans, run)}, show, MENDABLE if problems else 0)


def _deepspeed_json(run: "Run") -> Answer:
    """The JSON that DeepSpeed is given; saved to a file and named in `distributed.deepspeed` it changes nothing."""
    from stages.core.deepspeed_json import shown_json

    distributed = run.config.distributed
    if not distributed.is_zero:
        raise UserError(
            f"distributed.strategy={distributed.strategy}: is not DeepSpeed's; choose zero1, zero2 or zero3"
        )
    content = shown_json(distributed)
    return Answer(content, lambda: print(json.dumps(content, indent=2)))


def _run(run: "Run", names: list[str], request: Request, stop: threading.Event) -> list[dict[str, Any]]:
    """What became of each stage; every rank calls this."""
    from pipeline.chain import Launch, run_stages
    from pipeline.console import StageView, stderr_console
    from stages.core import ranks

    console = stderr_console()
    launch = Launch(
        run=run,
        resume=request.resume,
        viewer=lambda stage: StageView(stage, console),
        say=console.print,
        should_stop=lambda: ranks.from_main(stop.is_set()),  # all stop after the same step
        before_stage=lambda: set_threads_and_seeds(run.config.threads, run.config.seed),
    )
    return [asdict(outcome) for outcome in run_stages(launch, names)]


def _answer(run: "Run", names: list[str], stages: list[dict[str, Any]]) -> Answer:
    from pipeline.console import stdout_console
    from pipeline.report import REPORTING, print_report, read_report

    report = read_report(run.folder, names[-1]) if names[-1] in REPORTING else None

    def show() -> None:
        if report is not None:
            print_report(report, stdout_console())

    data = {"status": "done", "out": str(run.folder), "stages": stages}
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
        TORCH_CPP_LOG_LEVEL=os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    )
    if gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in ("transformers", "trl", "peft", "datasets", "accelerate", "httpx2", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its logger's level when it is imported, and warns on stdout of a machine without a GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def set_threads_and_seeds(threads: int | None, seed: int) -> None:
    """Settles the number of CPU threads and every global random generator; stages seed their own beside."""
    import numpy
    import torch

    local_ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if threads is not None:
        torch.set_num_threads(threads)
    elif local_ranks > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // local_ranks))
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
