"""Servers that die, hang or fail to start: retried elsewhere or an error that names them, in time, and no orphan."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest

from data.errors import UserError
from stages.core.bank import PolicyBank
from stages.core.rollout.client import Client, UnixConnection
from stages.core.rollout.protocol import Completion, EngineError, Sampling
from stages.core.rollout.vllm import VllmEngine
from tests.tiny import tiny_model_folder
from tests.vllm import PYTHON, ROOT, living, needs_vllm, processes_of, start_engine, tiny_bank, tiny_base

pytestmark = needs_vllm

# Long enough to be in the middle of when something happens to a server.
LONG = Sampling(200, 1.0, ())
MANY = [[0, place] for place in range(3, 35)]
SEEDS = [[place] for place in range(len(MANY))]
HUNG = 5.0


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> PolicyBank:
    return tiny_bank(tiny_base(tmp_path_factory.mktemp("base")), "lora")


@pytest.fixture(scope="module")
def engine(bank: PolicyBank, tmp_path_factory: pytest.TempPathFactory) -> Generator[VllmEngine]:
    folder = tmp_path_factory.mktemp("engine")
    with start_engine(bank, folder, server_count=2, max_length=512, batch_size=8) as engine:
        engine.sync(1)
        yield engine


def long_answers(engine: VllmEngine) -> list[Completion]:
    return [completion for group in engine.generate(MANY, LONG, SEEDS) for completion in group]


def server_process(engine: VllmEngine, name: str) -> psutil.Process:
    """The process that `vllm serve` would be."""
    (own,) = [server.own for server in engine.servers if server.name == name]
    assert own is not None
    return psutil.Process(own.pid).children()[0]


def in_the_middle(engine: VllmEngine, name: str, number: int) -> threading.Thread:
    """Sends a signal to a server once it says that it is at work on requests."""
    process = server_process(engine, name)
    (client,) = [server.client for server in engine.servers if server.name == name]

    def send() -> None:
        while not re.search(r"^vllm:num_requests_running\{.*\} [1-9]", told(client), re.MULTILINE):
            time.sleep(0.02)
        process.send_signal(number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def told(client: Client) -> str:
    """What a server counts of itself."""
    connection = UnixConnection(client.address, 5)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def test_requests_of_a_server_that_is_killed_in_the_middle_are_answered_by_the_other(engine: VllmEngine):
    processes = processes_of(engine)
    undisturbed = long_answers(engine)
    signalled = in_the_middle(engine, "vllm-0", signal.SIGKILL)
    disturbed = long_answers(engine)
    signalled.join()
    assert [each.tokens for each in disturbed] == [each.tokens for each in undisturbed]
    for one, other in zip(disturbed, undisturbed, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert list(engine.lost) == ["vllm-0"]
    assert [server.name for server in engine.servers] == ["vllm-1"]
    assert set(living(processes)) == set(processes_of(engine))
    engine.sync(2)
    assert {each.version for each in long_answers(engine)} == {2}


def test_the_last_server_hanging_is_an_error_that_names_it_within_the_time_out(engine: VllmEngine):
    processes = processes_of(engine)
    engine.servers[0].client.timeout_s = HUNG
    signalled = in_the_middle(engine, "vllm-1", signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(
        EngineError, match=r"vllm-1: /v1/completions: no answer within 5 s; see .*vllm-1\.log"
    ) as caught:
        long_answers(engine)
    assert time.monotonic() - began < HUNG + 10
    signalled.join()
    assert "vllm-0: " in str(caught.value)  # the one that was lost before
    assert "\n" not in str(caught.value)
    assert living(processes) == []
    for act in (lambda: long_answers(engine), lambda: engine.sync(3)):
        with pytest.raises(EngineError, match="no server is left"):
            act()
    engine.close()
    engine.close()


START = """
import sys
from pathlib import Path
from tests.vllm import answers, start_engine, tiny_bank
bank = tiny_bank(Path(sys.argv[1]), "lora")
engine = start_engine(bank, Path(sys.argv[2]))
engine.sync(1)
answers(engine)
print("ready", flush=True)
while True:
    answers(engine)
"""


def test_nothing_is_left_of_a_trainer_that_is_killed_while_it_samples(bank: PolicyBank, tmp_path: Path):
    trainer = subprocess.Popen(
        [sys.executable, "-c", START, bank.source, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    try:
        assert trainer.stdout.readline() == "ready\n"
        processes = psutil.Process(trainer.pid).children(recursive=True)
        assert len(processes) >= 4
    finally:
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.wait()
    gone, left = psutil.wait_procs(processes, timeout=15)
    assert len(gone) >= 4
    assert living(left) == []


def test_a_model_that_vllm_cannot_run_is_refused_before_training_with_its_reason(tmp_path: Path):
    """Heads of 8: vLLM starts, and fails at its first request on a CPU."""
    bank = tiny_bank(tiny_model_folder(tmp_path / "base"), "lora")
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(
        UserError, match=r"vllm-0: .*head_dim=8.*vllm-0\.log, or use ppo\.rollout\.engine=native"
    ) as caught:
        start_engine(bank, tmp_path / "engine")
    assert "\n" not in str(caught.value)
    assert set(psutil.Process().children(recursive=True)) == before


def test_a_server_that_ends_while_it_starts_says_why(tmp_path: Path):
    """The model has 512 positions."""
    bank = tiny_bank(tiny_base(tmp_path / "base"), "lora")
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"vllm-0: did not start \(.*max_model_len.*513.*\); the whole log is .*vllm-0\.log"
    ):
        start_engine(bank, tmp_path / "engine", max_length=513)
    assert time.monotonic() - began < 120


def test_an_interpreter_without_vllm_is_named(bank: PolicyBank, tmp_path: Path):
    with pytest.raises(UserError, match=r"vllm: /bin/sh is no interpreter with vllm in it"):
        start_engine(bank, tmp_path, python="/bin/sh")
    assert PYTHON != "/bin/sh"
