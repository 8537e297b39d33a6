"""Starts the ranks of a command through DeepSpeed's launcher, watches over them, and ends them all when one fails.

`OUT/logs/<time>/` keeps what each rank and the launcher said. The launch knows its ranks by the lines they keep open to
it (launch/watch.py): a rank that died, fell silent or failed is named, and no process is left on any host.
"""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from launch.hosts import Reached, kill_on, reach
from launch.places import Host
from launch.watch import Peer, Watch

STARTING_SECONDS = 180.0  # until every rank has called
READY_SECONDS = 900.0  # until it has imported its libraries, perhaps from a slow disk
SILENT_SECONDS = 25.0  # a rank that gives no sign of life for so long counts as lost
GRACE_SECONDS = 3.0  # for more news of a failure, before the ranks are ended
ENDING_SECONDS = 10.0  # for ranks to end themselves, before they are killed
PARTING_SECONDS = 120.0  # between the first rank's good end and the last one's
_LAST_LINES = 12
# Settings of the libraries; a host elsewhere gets them too. Secrets are not carried: set them on each host.
_CARRIED = ("NCCL_", "GLOO_", "OMP_", "MKL_", "TORCH_", "CUDA_", "HF_HO", "HF_HUB_", "TRANSFORMERS_", "RLHF_", "DS_")


class RankError(Exception):
    """A rank failed, died or fell silent; `lines` are the last it said."""

    def __init__(self, problem: str, lines: Sequence[str] = ()) -> None:
        super().__init__(problem)
        self.lines = list(lines)


@dataclass
class Signals:
    """How often the user asked to stop: once is kindly, twice at once."""

    asked: int = 0

    def __post_init__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked += 1
        if self.asked == 1:
            name = signal.Signals(number).name
            print(f"{name}: stopping at the next checkpoint; again to stop at once", file=sys.stderr, flush=True)


@dataclass
class Cluster:
    """The ranks of one command, on one host or several; `is_local`: this one, without ssh."""

    hosts: Sequence[Host]
    folder: Path  # OUT/logs/<time>
    is_local: bool
    signals: Signals
    watch: Watch = field(init=False)
    runner: "subprocess.Popen[bytes] | None" = None

    def run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Rank 0's verdict on `request`, which every rank carries out. Raises UserError, RankError."""
        reached = None if self.is_local else reach(self.hosts, self.folder)
        token = secrets.token_hex(16)
        self.watch = Watch("127.0.0.1" if reached is None else reached.caller, token, _show)
        file = self.folder / "launch.json"
        content = {"address": self.watch.address, "token": token, "environment": _carried(), "request": request}
        try:
            _write_private(file, json.dumps(content))
            self._start(file, reached)
            return self._verdict(self._supervise())
        finally:
            self._end()
            self.watch.close()
            file.unlink(missing_ok=True)

    def _start(self, file: Path, reached: Reached | None) -> None:
        """DeepSpeed's launcher, in a session of its own: Ctrl-C is ours to hand on."""
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
        if reached is None:
            port = os.environ.get("MASTER_PORT") or _free_port()
            command += ["--hostfile", "", "--num_gpus", str(self.hosts[0].slots), "--master_port", str(port)]
        else:
            hostfile = self.folder / "hostfile"
            hostfile.write_text("".join(f"{host.name} slots={host.slots}\n" for host in self.hosts), encoding="utf-8")
            command += ["--hostfile", str(hostfile), "--force_multi", "--no_ssh_check"]
            command += ["--master_addr", reached.master, "--master_port", str(reached.port)]
        command += ["--no_local_rank", "--module", "launch.rank", str(file)]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        with (self.folder / "launcher.log").open("wb") as log:
            self.runner = subprocess.Popen(
                command,
                cwd=self.folder,  # a folder without packages: it comes first on the ranks' import path
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _supervise(self) -> "Peer | str | None":
        """Returns when all ranks have ended well (None), or with the first that did not, or why some never began."""
        begun, told = time.monotonic(), False
        parting: float | None = None
        while True:
            self.watch.poll(0.5)
            if self.signals.asked > 1:
                raise RankError("stopped at once, without a new checkpoint; the same command resumes from the last one")
            if not told and (self.signals.asked or self.watch.stop_asked):
                told = True
                self.watch.tell("stop")
            now, peers = time.monotonic(), list(self.watch.peers.values())
            if (lost := self._lost(now)) is not None:
                return lost
            has_ended = self.runner is None or self.runner.poll() is not None
            if len(peers) < self._count and (has_ended or now - begun > STARTING_SECONDS):
                why = "ended before it called" if has_ended else f"not there after {STARTING_SECONDS:.0f} s"
                return self._absent(why)
            ended = [peer for peer in peers if peer.verdict is not None]
            if len(ended) == self._count:
                return None
            parting = parting or (now if ended else None)
            if parting is not None and now - parting > PARTING_SECONDS:
                return next(peer for peer in peers if peer.verdict is None)

    @property
    def _count(self) -> int:
        return sum(host.slots for host in self.hosts)

    def _lost(self, now: float) -> Peer | None:
        """The first rank that failed, died or fell silent."""
        for peer in self.watch.peers.values():
            if peer.verdict is not None and peer.verdict["status"] not in (0, 75):
                return peer
            bound = SILENT_SECONDS if peer.ready else READY_SECONDS
            if peer.verdict is None and (peer.is_gone or now - peer.heard > bound):
                return peer
        return None

    def _absent(self, why: str) -> str:
        missing = [rank for rank in range(self._count) if rank not in self.watch.peers]
        names = ", ".join(f"rank {rank} on {self._host(rank).name}" for rank in missing[:8])
        return f"{names}: {why}"

    def _verdict(self, lost: "Peer | str | None") -> dict[str, Any]:
        """What is to be told of the end; the ranks are ended first where it was a bad one."""
        if lost is None:
            verdict = self.watch.peers[0].verdict
            assert verdict is not None
            return verdict
        told = self.watch.peers.get(0)
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until:
            self.watch.poll(0.2)
        silent = isinstance(lost, Peer) and lost.verdict is None and not lost.is_gone
        dead = [peer for peer in self.watch.peers.values() if peer.is_gone and peer.verdict is None]
        self._end()
        if isinstance(lost, str):
            raise RankError(f"{lost}; {self.folder / 'launcher.log'} ends with", _tail(self.folder / "launcher.log"))
        verdicts = [each for each in (told, lost) if each is not None and (each.verdict or {}).get("status") == 2]
        if verdicts:
            return verdicts[0].verdict or {}
        if lost.verdict is not None and dead:  # it only says that it lost the connection to one that died
            lost = dead[0]
        log = self.folder / f"rank-{lost.rank}.log"
        how = self._how(lost, silent=silent)
        name = f"rank {lost.rank} on {self._host(lost.rank).name} (process {lost.pid})"
        raise RankError(f"{name} {how}; all ranks were ended, the same command resumes; {log} ends with", _tail(log))

    def _how(self, lost: Peer, *, silent: bool) -> str:
        if silent:
            return f"gave no sign of life for {SILENT_SECONDS:.0f} s: it was stopped, or its host is gone"
        if lost.verdict is not None:
            return f"failed: {' '.join(lost.verdict['problems'])}"
        text = (self.folder / "launcher.log").read_text(encoding="utf-8", errors="replace")
        codes = {int(code) for code in re.findall(r"return code = (-?\d+)", text)}
        names = [signal.Signals(-code).name for code in sorted(codes) if -64 <= code < 0]
        return f"was killed ({names[0]}): out of memory, or by hand" if names else "ended without a word"

    def _host(self, rank: int) -> Host:
        for host in self.hosts:
            if rank < host.slots:
                return host
            rank -= host.slots
        raise AssertionError(rank)

    def _end(self) -> None:
        """Ends every rank that is left, kindly at first, and the launcher; a second time does nothing."""
        if self.runner is None:
            return
        left = [peer for peer in self.watch.peers.values() if not peer.is_gone]
        if any(peer.verdict is None for peer in left) or len(self.watch.peers) < self._count:
            self.watch.tell("end")
            self._kill([peer for peer in left if time.monotonic() - peer.heard > SILENT_SECONDS])
        until = time.monotonic() + ENDING_SECONDS
        while time.monotonic() < until and any(not peer.is_gone for peer in self.watch.peers.values()):
            self.watch.poll(0.2)
        self._kill([peer for peer in self.watch.peers.values() if not peer.is_gone])
        self._end_runner(self.runner)
        self.runner = None

    def _kill(self, peers: Sequence[Peer]) -> None:
        for peer in peers:
            if self.is_local:
                os.kill(peer.pid, signal.SIGKILL)
            else:
                kill_on(self._host(peer.rank), peer.pid)

    def _end_runner(self, runner: "subprocess.Popen[bytes]") -> None:
        """Waits for the launcher, which ends when its ranks have; one that does not is made to."""
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number is not None:
                os.killpg(runner.pid, number)
            try:
                runner.wait(ENDING_SECONDS)
                return
            except subprocess.TimeoutExpired:
                continue


def _show(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _carried() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_CARRIED)}


def _write_private(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tail(path: Path) -> list[str]:
    """The last lines of a log; none where there is no log."""
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
