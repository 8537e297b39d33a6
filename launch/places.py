"""Where a command runs: in this process, as a rank that somebody else started, or on ranks that are to be started."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError

_HOST_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\d+)\s*(#.*)?")
_SLURM_PORTS = 20000  # first of as many ports; a job's own follows from its number


@dataclass(frozen=True)
class Host:
    """A machine and the number of ranks on it."""

    name: str
    slots: int


def read_hostfile(path: Path, slots: int | None = None) -> list[Host]:
    """The hosts of a hostfile (`name slots=4` a line, as DeepSpeed and MPI read it), `slots` of each where given.

    Raises UserError with a line for each mistake.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--hostfile {path}: cannot be read ({error.strerror}); name a file") from error
    hosts: dict[str, Host] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _HOST_LINE.fullmatch(line.strip())
        if match is None:
            problems.append(f"{path}:{number}: {line.strip()!r} is no host; write `name slots=4`")
            continue
        name, found = match["name"], int(match["slots"])
        if name in hosts:
            problems.append(f"{path}:{number}: {name} is there twice; add up its slots in one line")
        elif found < max(slots or 1, 1):
            problems.append(f"{path}:{number}: {name} has slots={found}; {max(slots or 1, 1)} are needed on each host")
        hosts[name] = Host(name, slots or found)
    if not hosts and not problems:
        problems.append(f"{path}: names no host; write a line `name slots=4` for each")
    if problems:
        raise UserError(*problems)
    return list(hosts.values())


def hosts_wanted(gpus: int | None, hostfile: Path | None) -> list[Host]:
    """The hosts that a command line asks for; none: this process alone. Raises UserError."""
    if gpus is not None and gpus < 0:
        raise UserError(f"--gpus {gpus}: is negative; use 0 for the CPU, or the number of processes on each host")
    if hostfile is not None:
        if gpus == 0:
            raise UserError("--gpus 0: is for one process on the CPU; leave it out, the hostfile says how many ranks")
        return read_hostfile(hostfile, gpus)
    return [Host("localhost", gpus)] if gpus is not None and gpus > 1 else []


def ranks_here(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """RANK and its like where this process already is one of several ranks, else nothing.

    torchrun and its kin set them; under `srun` they follow from Slurm's own variables.
    """
    if "RANK" in environment and int(environment.get("WORLD_SIZE", "1")) > 1:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        found = {name: environment[name] for name in names if name in environment}
        missing = {"MASTER_ADDR", "MASTER_PORT"} - set(found)
        if missing:
            raise UserError(*(f"{name}: not set, but RANK and WORLD_SIZE are; set it to rank 0's" for name in missing))
        return found
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))
    if "SLURM_PROCID" not in environment or tasks < 2:
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_node(nodes) if nodes else "127.0.0.1"),
        "MASTER_PORT": environment.get("MASTER_PORT", _slurm_port(environment)),
    }


def is_batch_script(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a Slurm batch script itself, which looks like task 0 of several but is none."""
    return "SLURM_PROCID" in environment and "SLURM_STEP_ID" not in environment and "RANK" not in environment


def first_node(nodes: str) -> str:
    """The first name in one of Slurm's node lists: `gpu[03-06,9],login` -> `gpu03`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes}: names no node; set MASTER_ADDR to rank 0's host")
    prefix, number, suffix = match.groups(default="")
    return prefix + number + suffix


def _slurm_port(environment: Mapping[str, str]) -> str:
    return str(_SLURM_PORTS + int(environment.get("SLURM_JOB_ID", "0")) % _SLURM_PORTS)
