"""Hosts elsewhere, by ssh: whether they can be reached and are fit, and the end of a process there."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError
from launch.places import Host

CONNECT_SECONDS = 10
_ANSWER_SECONDS = 30  # of a host that was connected to
_NO_PYTHON, _NO_FOLDER = 101, 102


@dataclass(frozen=True)
class Reached:
    """What the hosts said: rank 0's address and a free port there, and this machine's address as hosts see it."""

    master: str
    port: int
    caller: str


def reach(hosts: Sequence[Host], folder: Path) -> Reached:
    """Asks every host at once whether it has our Python and sees `folder`.

    Raises UserError with a line for each host that does not answer in time or is not fit.
    """
    for program in ("ssh", "pdsh"):
        if shutil.which(program) is None:
            raise UserError(f"--hostfile: needs {program}, which is not installed here; install it")
    if any(character.isspace() for character in str(folder)):
        raise UserError(f"--out: pdsh cannot carry the space in {folder}; choose a folder without one")
    with ThreadPoolExecutor(max_workers=min(len(hosts), 64)) as pool:
        answers = list(pool.map(_ask, hosts, [folder] * len(hosts)))
    if problems := [answer for answer in answers if isinstance(answer, str)]:
        raise UserError(*problems)
    found = [answer for answer in answers if not isinstance(answer, str)]
    callers = [answer.caller for answer in found if not _is_loopback(answer.caller)]
    first = found[0]
    master = first.address if not _is_loopback(first.address) or len(hosts) == 1 else first.own
    return Reached(
        master=os.environ.get("MASTER_ADDR", master),
        port=int(os.environ.get("MASTER_PORT", first.port)),
        caller=callers[0] if callers else first.caller,
    )


@dataclass(frozen=True)
class _Answer:
    caller: str  # our address, as the host sees it
    address: str  # the host's, as we reached it
    own: str  # the first that it says it has
    port: int  # free there


def _ask(host: Host, folder: Path) -> "_Answer | str":
    """What a host says, or the problem with it."""
    python = shlex.quote(sys.executable)
    port = "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"
    script = (
        f"test -x {python} || exit {_NO_PYTHON}; test -d {shlex.quote(str(folder))} || exit {_NO_FOLDER}; "
        f"echo $SSH_CONNECTION; echo $(hostname -I); {python} -S -c {shlex.quote(port)}"
    )
    try:
        result = _ssh(host, script, timeout=CONNECT_SECONDS + _ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{host.name}: no answer by ssh within {CONNECT_SECONDS + _ANSWER_SECONDS} s; take it out, or mend it"
    if result.returncode == _NO_PYTHON:
        return f"{host.name}: has no {sys.executable}; install this environment at the same path on every host"
    if result.returncode == _NO_FOLDER:
        return f"{host.name}: does not see {folder}; give --out on a disk that all hosts share"
    if result.returncode:
        why = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
        return f"{host.name}: cannot be reached by ssh ({why}); `ssh {host.name}` must work without a password"
    connection, own, free = result.stdout.splitlines()[-3:]
    caller, _, address, _ = connection.split()
    return _Answer(caller, address, own.split()[0] if own else address, int(free))


def kill_on(host: Host, pid: int) -> None:
    """Kills a process on a host; a host that cannot be reached is left to itself, its ranks end with their line."""
    try:
        _ssh(host, f"kill -9 {pid}", timeout=CONNECT_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"{host.name}: cannot be reached to end process {pid}", file=sys.stderr)


def _ssh(host: Host, script: str, *, timeout: float) -> "subprocess.CompletedProcess[str]":
    """Runs a shell script on a host, with the options that pdsh would use."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    options += shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    command = ["ssh", *options, host.name, script]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
    )


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1" or address == socket.gethostname()
