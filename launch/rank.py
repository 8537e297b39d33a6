"""`python -m launch.rank FILE`: one rank of a launch, as DeepSpeed's launcher starts it. FILE is the launch's request.

What it shows goes to `rank-N.log` beside FILE, and rank 0's to the launch too. How it ends is told to the launch, which
speaks for all ranks; the exit status only wakes DeepSpeed's launcher.
"""

import codecs
import json
import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from data.errors import UserError
from launch.answer import end_rank
from launch.watch import Member
from launch.worker import Request, carry_out_as_rank
from stages.core.context import Interrupted
from stages.core.rollout.protocol import EngineError

_CHUNK = 65536
_KEPT: list[socket.socket] = []  # open as long as the process


def main(file: Path) -> int:
    """The exit status of this rank."""
    launch = json.loads(file.read_text(encoding="utf-8"))
    rank = int(os.environ["RANK"])
    os.environ.update(launch["environment"])
    member = Member(tuple(launch["address"]), launch["token"], rank)
    output = Output(file.parent / f"rank-{rank}.log", member if rank == 0 else None)
    _tell_of_crashes(member, output)
    _hand_on_signals(member)
    request = Request.from_data(launch["request"])
    os.chdir(request.folder)
    verdict = _verdict(request, member)
    output.drain()
    member.finish(verdict)
    return verdict["status"]


def _verdict(request: Request, member: Member) -> dict[str, Any]:
    try:
        return {"status": 0, "stages": carry_out_as_rank(request, member.stop, member.ready)}
    except UserError as error:
        return {"status": 2, "problems": list(error.problems)}
    except Interrupted as error:
        return {"status": 75, "reason": str(error)}
    except EngineError as error:
        return {"status": 1, "problems": [str(error)]}


class Output:
    """Where stdout and stderr go, C code's too: to the log, and with a `member` stderr to the launch as well."""

    def __init__(self, log: Path, member: Member | None) -> None:
        self._file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._copier: threading.Thread | None = None
        os.dup2(self._file, 1)  # what a rank answers goes with its verdict
        if member is None:
            os.dup2(self._file, 2)
            return
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        os.close(writer)
        self._copier = threading.Thread(target=self._copy, args=(reader, member), daemon=True)
        self._copier.start()

    def drain(self) -> None:
        """Returns when all that was written has been shown."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(self._file, 2)  # closes the pipe, where no child holds it
        if self._copier is not None:
            self._copier.join(timeout=2)

    def _copy(self, reader: int, member: Member) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        while chunk := os.read(reader, _CHUNK):
            os.write(self._file, chunk)
            member.say(decoder.decode(chunk))


def _tell_of_crashes(member: Member, output: Output) -> None:
    """What is not foreseen ends the process with its traceback, and the launch hears of it."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        output.drain()
        member.finish({"status": 1, "problems": traceback.format_exception_only(error)[-1].splitlines()})

    sys.excepthook = hook


def _hand_on_signals(member: Member) -> None:
    """A signal to one rank stops all of them, kindly, by way of the launch.

    A thread hears of it at once; a handler would wait until the main thread comes back from talking to other ranks.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _nothing)

    def listen() -> None:
        while numbers := reader.recv(64):  # of every signal that has a handler, libraries' own too
            if set(numbers) & {signal.SIGTERM, signal.SIGINT}:
                member.ask_to_stop()

    threading.Thread(target=listen, daemon=True).start()
    _KEPT.append(writer)


def _nothing(number: int, _: FrameType | None) -> None:
    """A handler there must be, or the signal would end the process."""


if __name__ == "__main__":
    end_rank(main(Path(sys.argv[1])))
