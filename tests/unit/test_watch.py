"""The line between a launch and its ranks, over real sockets; the ranks here are processes of a few lines."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from launch.watch import ENDED, Member, Watch

TOKEN = "secret"
RANK = """
import sys, time
from launch.watch import Member
member = Member(("127.0.0.1", int(sys.argv[1])), "secret", int(sys.argv[2]))
member.ready()
{body}
"""


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def watch(said: list[str]) -> Iterator[Watch]:
    watch = Watch("127.0.0.1", TOKEN, said.append)
    yield watch
    watch.close()


def start(watch: Watch, rank: int, body: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", RANK.format(body=body), str(watch.address[1]), str(rank)]
    return subprocess.Popen(command, text=True)


def poll_until(watch: Watch, condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        watch.poll(0.1)


def test_ranks_report_and_say_how_they_ended(watch: Watch, said: list[str]) -> None:
    body = "member.say('half' + chr(228)); member.finish({'status': 0, 'stages': [int(sys.argv[2])]})"
    processes = [start(watch, rank, body) for rank in (0, 1)]
    poll_until(watch, lambda: len(watch.peers) == 2 and all(peer.is_gone for peer in watch.peers.values()))
    assert {rank: (peer.verdict or {})["stages"] for rank, peer in watch.peers.items()} == {0: [0], 1: [1]}
    assert said == ["halfä", "halfä"]
    assert [process.wait(30) for process in processes] == [0, 0]


def test_a_rank_that_dies_leaves_no_verdict(watch: Watch) -> None:
    process = start(watch, 3, "time.sleep(60)")
    poll_until(watch, lambda: 3 in watch.peers and watch.peers[3].ready)
    assert watch.peers[3].pid == process.pid
    process.kill()
    poll_until(watch, lambda: watch.peers[3].is_gone)
    assert watch.peers[3].verdict is None
    process.wait(30)


def test_ranks_stop_kindly_and_end_at_once(watch: Watch) -> None:
    kind = start(watch, 0, "member.stop.wait(30); member.finish({'status': 75})")
    stubborn = start(watch, 1, "time.sleep(60)")
    poll_until(watch, lambda: len(watch.peers) == 2)
    watch.tell("stop")
    assert kind.wait(30) == 0
    assert stubborn.poll() is None
    watch.tell("end")
    assert stubborn.wait(30) == ENDED


def test_a_rank_ends_when_its_launch_is_gone(watch: Watch) -> None:
    process = start(watch, 0, "time.sleep(60)")
    poll_until(watch, lambda: 0 in watch.peers)
    watch.close()
    assert process.wait(30) == ENDED


def test_a_silent_rank_is_not_heard(watch: Watch) -> None:
    process = start(watch, 0, "time.sleep(60)")
    poll_until(watch, lambda: 0 in watch.peers and watch.peers[0].ready)
    psutil.Process(process.pid).suspend()
    watch.poll(0.1)
    heard = watch.peers[0].heard
    for _ in range(30):
        watch.poll(0.1)
    assert watch.peers[0].heard == heard
    psutil.Process(process.pid).resume()
    poll_until(watch, lambda: watch.peers[0].heard > heard)
    process.kill()
    process.wait(30)


def test_a_rank_asks_all_to_stop(watch: Watch) -> None:
    member = Member(watch.address, TOKEN, 0)
    member.ask_to_stop()
    poll_until(watch, lambda: watch.stop_asked)
    assert watch.peers[0].verdict is None
    member.finish({"status": 75})
    poll_until(watch, lambda: watch.peers[0].verdict is not None)
    assert watch.peers[0].verdict == {"status": 75}


@pytest.mark.parametrize("message", [b'{"token": "guess", "rank": 0, "pid": 1}\n', b"GET / HTTP/1.1\n", b"[1]\n"])
def test_strangers_are_turned_away(watch: Watch, message: bytes) -> None:
    with socket.create_connection(watch.address) as line:
        line.sendall(message)
        line.settimeout(0.1)
        for _ in range(20):
            watch.poll(0.1)
            try:
                assert line.recv(10) == b""
                break
            except TimeoutError:
                continue
        else:
            pytest.fail("the line is still open")
    assert watch.peers == {}


TWO_SIGNALS = """
import os, signal, threading, time
from launch import rank

class Member:
    asked = threading.Event()
    def ask_to_stop(self):
        self.asked.set()

signal.signal(signal.SIGUSR1, lambda *_: None)
rank._hand_on_signals(Member())
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.5)
assert not Member.asked.is_set()
os.kill(os.getpid(), signal.SIGTERM)
assert Member.asked.wait(20)
"""


def test_a_rank_hears_of_a_stop_after_signals_that_mean_nothing_to_it() -> None:
    done = subprocess.run([sys.executable, "-c", TWO_SIGNALS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
