"""Runs one command in a process group of its own and leaves nothing of it behind, whoever dies first.

    python -P keeper.py OWNER_PID SCRATCH_FOLDER COMMAND...

The command and all that it starts are killed when this process is asked to stop (SIGTERM), when the command's first
process ends, or when the owner is gone, also by SIGKILL; the scratch folder goes last. Where this process itself is
killed, the kernel kills the first process (PR_SET_PDEATHSIG), and the owner the group, which has this process's id.
Imports nothing of ours: it runs as a plain file.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

import psutil

POLL_SECONDS = 0.2
GRACE_SECONDS = 3.0  # between SIGTERM and SIGKILL
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def keep(owner: int, command: Sequence[str]) -> int:
    """The command's exit status, once everything that it started is gone."""
    stopping: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        stopping.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what the command's processes leave behind becomes ours
    process = subprocess.Popen(command, preexec_fn=_die_with_parent)
    while not stopping and process.poll() is None and os.getppid() == owner:
        time.sleep(POLL_SECONDS)
    status = process.poll()
    _end_descendants()
    return 0 if status is None else status % 256


def _end_descendants() -> None:
    """Asks every descendant to stop, and kills those that have not after GRACE_SECONDS, stopped ones too."""
    me = psutil.Process()
    found = me.children(recursive=True)
    for each in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.terminate()
    psutil.wait_procs(found, timeout=GRACE_SECONDS)
    while found := me.children(recursive=True):
        for each in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(found, timeout=1)


def _die_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    """Nothing where the kernel is not Linux: there the polling above has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    status = keep(int(sys.argv[1]), sys.argv[3:])
    shutil.rmtree(sys.argv[2], ignore_errors=True)
    sys.exit(status)
