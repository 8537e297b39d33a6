"""Whatever dies first, nothing of a kept command is left; the commands here are shells, no mocks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

import psutil
import pytest

from stages.core.rollout import keeper

# A command with a child, one in a session of its own, and one that ignores SIGTERM; their ids go to a file.
FAMILY = """
echo $$ >> {ids}
sleep 300 & echo $! >> {ids}
setsid sh -c 'echo $$ >> {ids}; sleep 300' &
sh -c 'trap "" TERM; echo $$ >> {ids}; while :; do sleep 1; done' &
{end}
"""


@pytest.fixture
def ids(tmp_path: Path) -> Generator[Path]:
    path = tmp_path / "ids"
    yield path
    for pid in _ids(path):  # only where a test failed
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def _ids(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def _kept(ids: Path, end: str = "wait") -> list[str]:
    """The command line of a keeper of the family after its owner: a scratch folder, and the command."""
    scratch = ids.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    (scratch / "file").touch()
    return [str(scratch), "sh", "-c", FAMILY.format(ids=ids, end=end)]


def _start(ids: Path, end: str = "wait") -> subprocess.Popen[bytes]:
    """A keeper whose family is complete; we own it."""
    command = [sys.executable, "-P", keeper.__file__, str(os.getpid()), *_kept(ids, end)]
    process = subprocess.Popen(command, start_new_session=True)
    _until(lambda: len(_ids(ids)) == 4)
    return process


def _until(holds: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.05)


def _living(path: Path) -> list[int]:
    """Those of the family that run; what waits to be reaped by init does not."""
    return [
        pid for pid in _ids(path) if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


def test_asked_to_stop(ids: Path):
    process = _start(ids)
    assert len(_living(ids)) == 4
    process.terminate()
    process.wait(keeper.GRACE_SECONDS + 5)
    assert _living(ids) == []
    assert [path.name for path in ids.parent.iterdir()] == ["ids"]


def test_a_family_that_was_stopped_by_a_signal_dies_too(ids: Path):
    process = _start(ids)
    for pid in _ids(ids):
        os.kill(pid, signal.SIGSTOP)
    process.terminate()
    process.wait(keeper.GRACE_SECONDS + 5)
    assert _living(ids) == []


def test_the_first_process_ends(ids: Path):
    process = _start(ids, end="exit 3")
    assert process.wait(keeper.GRACE_SECONDS + 5) == 3
    assert _living(ids) == []


def test_the_first_process_is_killed(ids: Path):
    process = _start(ids)
    os.kill(_ids(ids)[0], signal.SIGKILL)
    process.wait(keeper.GRACE_SECONDS + 5)
    assert _living(ids) == []


def test_the_owner_is_killed(ids: Path):
    start = (
        "import os, subprocess, sys, time\n"
        "command = [sys.executable, '-P', sys.argv[1], str(os.getpid()), *sys.argv[2:]]\n"
        "subprocess.Popen(command, start_new_session=True)\n"
        "time.sleep(300)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", start, keeper.__file__, *_kept(ids)])
    _until(lambda: len(_ids(ids)) == 4)
    owner.kill()
    owner.wait()
    _until(lambda: _living(ids) == [] and not (ids.parent / "scratch").exists(), keeper.GRACE_SECONDS + 5)
    assert [path.name for path in ids.parent.iterdir()] == ["ids"]


def test_an_owner_that_died_before_the_start_leaves_nothing(ids: Path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    keeping = [sys.executable, "-P", keeper.__file__, str(gone.pid), *_kept(ids)]
    subprocess.run(keeping, timeout=keeper.GRACE_SECONDS + 5, check=False)
    assert _living(ids) == []


def test_the_keeper_is_killed(ids: Path):
    """The kernel ends the first process; the rest is what the owner kills by the group, as OwnServer.stop does."""
    process = _start(ids)
    first, *others = _ids(ids)
    group = {pid for pid in others if os.getpgid(pid) == process.pid}
    assert len(group) == 2  # all but the one that went into a session of its own
    process.kill()
    process.wait()
    _until(lambda: first not in _living(ids))
    os.killpg(process.pid, signal.SIGKILL)
    _until(lambda: not group & {*_living(ids)})
