"""What is installed, what is missing, and what would run here."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from data.errors import UserError
from launch.answer import MENDABLE, Answer
from stages.core.rollout.server import find_vllm

_SHOWN = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "deepspeed")
_OPTIONAL = ("wandb", "trackio")
_HOST_PROGRAMS = ("ssh", "pdsh")  # that --hostfile needs
_GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the table; `mend` says what to do where it is not well."""

    what: str
    found: str
    needed: str = ""
    mend: str = ""


def examine() -> Answer:
    """The state of this machine; status 2 where something required is missing or out of bounds."""
    checks = [_python(), *_packages(), *_optional_packages(), *_machine()]
    checks += [Check("accelerators", _accelerators()), Check("rollouts", _rollouts())]
    checks += [Check("would run here", _would_run())]
    problems = [f"{check.what} {check.found}: {check.needed} is needed; {check.mend}" for check in checks if check.mend]
    data: dict[str, Any] = {
        "status": "error" if problems else "done",
        "problems": problems,
        "checks": [asdict(check) for check in checks],
    }

    def show() -> None:
        width = max(len(check.what) for check in checks)
        found = max(len(check.found) for check in checks if check.needed)
        for check in checks:
            needed = f"{check.found:<{found}}  needs {check.needed}" if check.needed else check.found
            print(f"{'!!' if check.mend else 'ok'}  {check.what:<{width}}  {needed}")
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)

    return Answer(data, show, MENDABLE if problems else 0)


def requirements() -> dict[str, Requirement]:
    """Our own requirements by distribution name: of the installed package, else of the checkout's pyproject.toml."""
    try:
        lines = importlib.metadata.requires("rlhf-pipeline") or []
    except importlib.metadata.PackageNotFoundError:
        pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
        lines = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    parsed = [Requirement(line) for line in lines]
    return {requirement.name: requirement for requirement in parsed if "extra" not in str(requirement.marker or "")}


def _python() -> Check:
    mend = "" if sys.version_info >= (3, 11) else "install Python 3.11 and make a new venv with it"
    return Check("python", platform.python_version(), ">=3.11", mend)


def _packages() -> list[Check]:
    needed = requirements()
    names = [*_SHOWN, *sorted(set(needed) - set(_SHOWN))]
    return [_package(needed[name]) for name in names if name in needed]


def _package(requirement: Requirement) -> Check:
    """A required distribution against its bounds, with the command that mends it."""
    bounds = ",".join(sorted((str(part) for part in requirement.specifier), reverse=True))
    mend = f"run `pip install '{requirement.name}{bounds}'`"
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(requirement.name, "not installed", bounds or "any version", mend)
    well = requirement.specifier.contains(found, prereleases=True)
    return Check(requirement.name, found, bounds, "" if well else mend)


def _optional_packages() -> list[Check]:
    installed = {name: _version(name) for name in _OPTIONAL}
    checks = [Check(name, version or "not installed (optional)") for name, version in installed.items()]
    missing = [name for name in _HOST_PROGRAMS if shutil.which(name) is None]
    hosts = f"not without {' and '.join(missing)} (optional)" if missing else "ssh and pdsh are here"
    return [*checks, _vllm(), Check("several hosts", hosts)]


def _vllm() -> Check:
    """vLLM, which runs in an interpreter of its own."""
    try:
        found = find_vllm()
    except UserError as error:
        return Check("vllm", "unusable", "an interpreter with a known vllm, or none", str(error))
    if found is None:
        return Check("vllm", "not installed (optional; `make vllm`)")
    return Check("vllm", f"{found.version} in {found.python}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> list[Check]:
    memory = psutil.virtual_memory()
    here = Path.cwd()
    writable = os.access(here, os.W_OK)
    return [
        Check("cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())),
        Check("memory", f"{memory.available / _GIB:.1f} GiB free of {memory.total / _GIB:.1f}"),
        Check("disk", f"{shutil.disk_usage(here).free / _GIB:.1f} GiB free in {here}"),
        Check("run folders", f"{here} {'can' if writable else 'cannot'} be written")
        if writable
        else Check("run folders", "not writable", "a writable folder", "go to another folder or give --out DIR"),
    ]


def _accelerators() -> str:
    if _version("torch") is None:
        return "unknown without torch"
    import torch

    if not torch.cuda.is_available():
        return "none"
    devices = [torch.cuda.get_device_properties(place) for place in range(torch.cuda.device_count())]
    return ", ".join(f"{device.name} ({device.total_memory / _GIB:.0f} GiB)" for device in devices)


def _rollouts() -> str:
    """What `engine: auto` comes to here, and whether vLLM could be named instead."""
    if _version("torch") is None:
        return "unknown without torch"
    from stages.core.rollout.choice import choose_engine
    from stages.core.rollout.config import EngineConfig

    auto, named = (choose_engine(EngineConfig(engine=engine), "rollout") for engine in ("auto", "vllm"))
    other = "" if auto.engine == "vllm" or named.problems else f"; engine=vllm would be {named.why}"
    return f"auto is {auto.text}{other}"


def _would_run() -> str:
    if _version("torch") is None:
        return "nothing without torch"
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        many = f", or with --gpus {count} in as many" if count > 1 else ""
        return f"every stage, in one process on {torch.cuda.get_device_name(0)}{many}; try dtype=bfloat16"
    from stages.core.products import onednn_takes

    slow = "" if onednn_takes(torch.bfloat16) else "; keep dtype=float32, this CPU is several times slower in bfloat16"
    threads = torch.get_num_threads()
    return f"every stage, in one process on the CPU with {threads} threads; start with quickstart{slow}"
