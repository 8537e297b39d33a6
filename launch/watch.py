"""The line between a launch and its ranks: who lives, who fell silent, who asked to stop, how each one ended.

The launch listens, every rank calls. A rank whose line breaks ends itself, so nothing outlives its launch; a rank whose
line breaks before it said how it ended has died. Messages are JSON objects, one a line; the first carries a token that
only the launch and its ranks can read.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

BEAT_SECONDS = 2.0
ENDED = 1  # exit status of a rank that the launch ended
_CHUNK = 65536


class Member:
    """A rank's end of the line. Its thread beats, and ends the process when told to or when the line breaks."""

    def __init__(self, address: tuple[str, int], token: str, rank: int) -> None:
        self.stop = threading.Event()  # the launch was asked to stop
        self._line = socket.create_connection(address, timeout=30)
        self._line.settimeout(BEAT_SECONDS)
        self._sending = threading.Lock()
        self._finished = False
        self._send({"token": token, "rank": rank, "pid": os.getpid()})
        threading.Thread(target=self._listen, daemon=True).start()

    def ready(self) -> None:
        """Says that the slow beginning is over: from now on silence means trouble."""
        self._send({"ready": True})

    def say(self, text: str) -> None:
        """Shows text to the person watching."""
        self._send({"say": text})

    def ask_to_stop(self) -> None:
        """Asks the launch to stop all ranks at the next checkpoint."""
        self._send({"stop": True})

    def finish(self, verdict: Mapping[str, Any]) -> None:
        """Says how this rank ended; nothing is sent after."""
        self._send({"verdict": verdict})
        self._finished = True

    def _send(self, message: Mapping[str, Any]) -> None:
        line = json.dumps(message, ensure_ascii=False, default=str).encode() + b"\n"
        with self._sending, contextlib.suppress(OSError):  # a broken line is the listening thread's to notice
            self._line.sendall(line)

    def _listen(self) -> None:
        waiting = b""
        while True:
            try:
                chunk = self._line.recv(_CHUNK)
            except TimeoutError:
                if not self._finished:
                    self._send({})
                continue
            except OSError:
                chunk = b""
            if not chunk:
                if self._finished:
                    return
                os._exit(ENDED)  # artifacts and checkpoints are published atomically
            *lines, waiting = (waiting + chunk).split(b"\n")
            for line in lines:
                word = json.loads(line)["do"]
                if word == "end":
                    os._exit(ENDED)
                self.stop.set()


@dataclass
class Peer:
    """What the launch knows of one rank."""

    rank: int
    pid: int
    heard: float  # when it last gave a sign of life, time.monotonic
    ready: bool = False
    verdict: dict[str, Any] | None = None  # how it says it ended
    is_gone: bool = False  # its line is broken


@dataclass
class _Line:
    waiting: bytes = b""
    peer: Peer | None = None


@dataclass
class Watch:
    """The launch's end of all lines; `say` gets what rank 0 shows."""

    host: str
    token: str
    say: Callable[[str], None]
    peers: dict[int, Peer] = field(default_factory=dict[int, Peer])
    stop_asked: bool = False

    def __post_init__(self) -> None:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self._listener = socket.create_server((self.host, 0), family=family, backlog=1024)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    @property
    def address(self) -> tuple[str, int]:
        """Where ranks call."""
        host, port, *_ = self._listener.getsockname()
        return host, port

    def poll(self, seconds: float) -> None:
        """Takes in what arrives, for `seconds` at most."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                line, _ = self._listener.accept()
                line.settimeout(5)
                self._selector.register(line, selectors.EVENT_READ, _Line())
            else:
                assert isinstance(key.fileobj, socket.socket)
                self._read(key.fileobj, key.data)

    def tell(self, word: str) -> None:
        """Sends `stop` or `end` to every rank that is there."""
        for line, _ in self._lines():
            with contextlib.suppress(OSError):  # the reader will see that it is gone
                line.sendall(json.dumps({"do": word}).encode() + b"\n")

    def close(self) -> None:
        """Breaks every line: ranks that are left end themselves. A second time does nothing."""
        if self._listener.fileno() < 0:
            return
        for line, _ in list(self._lines()):
            line.close()
        self._selector.close()
        self._listener.close()

    def _lines(self) -> Iterator[tuple[socket.socket, _Line]]:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Line) and isinstance(key.fileobj, socket.socket):
                yield key.fileobj, key.data

    def _read(self, line: socket.socket, state: _Line) -> None:
        try:
            chunk = line.recv(_CHUNK)
        except OSError:
            chunk = b""
        *lines, state.waiting = (state.waiting + chunk).split(b"\n")
        too_long = state.peer is None and len(state.waiting) > _CHUNK
        if chunk and not too_long and all(self._take(state, each) for each in lines):
            return
        if state.peer is not None:
            state.peer.is_gone = True
        self._selector.unregister(line)
        line.close()

    def _take(self, state: _Line, text: bytes) -> bool:
        """Notes one message; False where a stranger sent it."""
        message = _message(text)
        if state.peer is None:
            if not secrets.compare_digest(str(message.get("token")).encode(), self.token.encode()):
                return False
            state.peer = Peer(message["rank"], message["pid"], time.monotonic())
            self.peers[state.peer.rank] = state.peer
        peer = state.peer
        peer.heard = time.monotonic()
        peer.ready |= "ready" in message
        peer.verdict = message.get("verdict", peer.verdict)
        self.stop_asked |= "stop" in message
        if "say" in message:
            self.say(message["say"])
        return True


def _message(text: bytes) -> dict[str, Any]:
    """The JSON object of a line; an empty one where it is none."""
    try:
        message: Any = json.loads(text)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}
