"""Ranks that are killed, stopped, out of memory or asked to stop: all end in time, the failing one is named, and the
same command resumes. Real processes, started by DeepSpeed's launcher; gloo on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.hosts import TwoHosts, two_hosts, why_not
from tests.launches import launch, make_project, ranks_of, steps_of, wait_until

ROOT = Path(__file__).resolve().parents[2]
WITHIN = 60  # seconds until every process is gone
LONG = ("sft.max_steps=3000", "checkpoint_every=5", "keep_checkpoints=2")

# A rank that is sent this signal asks for more memory than there is, wherever it stands.
TOO_LARGE = """
import os, signal
if os.environ.get("RANK") == "1":
    def ask(*_):
        import torch
        torch.empty(2**60)
    signal.signal(signal.SIGUSR1, ask)
"""

# Python's shutdown takes this object away, and the process is aborted as by a thread of gloo's that it catches.
ABORTED_AT_SHUTDOWN = """
import os, sys
class Last:
    def __del__(self, abort=os.abort):
        abort()
sys.last_of_all = Last()
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory):
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as pair:
        yield pair


def begin(config: Path, out: Path, **environment: str) -> tuple["subprocess.Popen[str]", list[psutil.Process]]:
    """A long sft on two ranks that has written a checkpoint, and all its processes."""
    process = launch("sft", config, "--out", out, "--gpus", "2", *LONG, **environment)
    wait_until(lambda: any((out / "sft" / "checkpoints").glob("step-*")), process)
    return process, psutil.Process(process.pid).children(recursive=True)


def ended(process: "subprocess.Popen[str]", everyone: list[psutil.Process], since: float) -> tuple[str, str]:
    """stdout and stderr of a launch, once all its processes are gone; none may outlive it by long."""
    output = process.communicate(timeout=WITHIN)
    _, alive = psutil.wait_procs(everyone, timeout=max(0.0, WITHIN - (time.monotonic() - since)))
    assert alive == []
    return output


def resume(config: Path, out: Path, *options: str) -> None:
    """Goes on to a few steps past the newest checkpoint, and checks that no step is missing or twice."""
    reached = max(int(path.name[5:]) for path in (out / "sft" / "checkpoints").glob("step-*"))
    process = launch("sft", config, "--out", out, *options, *LONG, "--json")
    wait_until(lambda: max(steps_of(out / "sft"), default=0) > reached + 5, process)
    process.terminate()
    stdout, stderr = process.communicate(timeout=WITHIN)
    assert process.returncode == 75, stderr
    assert "resuming after step" in stderr
    assert json.loads(stdout)["status"] == "stopped"
    steps = steps_of(out / "sft")
    assert steps == list(range(1, steps[-1] + 1))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_rank_ends_all_and_the_run_resumes(config: Path, tmp_path: Path) -> None:
    process, everyone = begin(config, tmp_path)
    since = time.monotonic()
    victim = ranks_of(process)[1]
    victim.kill()
    _, stderr = ended(process, everyone, since)
    assert process.returncode == 1
    assert f"rank 1 on localhost (process {victim.pid}) was killed (SIGKILL)" in stderr
    assert "Traceback (most recent call last)" not in stderr.split("error: ")[0]
    (logs,) = (tmp_path / "logs").iterdir()
    assert {path.name for path in logs.iterdir()} == {"launcher.log", "rank-0.log", "rank-1.log"}
    resume(config, tmp_path, "--gpus", "2")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_signal_leaves_a_checkpoint_in_time_and_one_process_resumes(config: Path, tmp_path: Path) -> None:
    process, everyone = begin(config, tmp_path)
    since = time.monotonic()
    process.terminate()
    _, stderr = ended(process, everyone, since)
    assert process.returncode == 75, stderr
    assert time.monotonic() - since < 30
    assert "stopped after step" in stderr
    steps = steps_of(tmp_path / "sft")
    assert (tmp_path / "sft" / "checkpoints" / f"step-{steps[-1]:08d}").is_dir()
    resume(config, tmp_path, "distributed.strategy=none")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_stopped_rank_is_found_and_ended(config: Path, tmp_path: Path, rank: int) -> None:
    process, everyone = begin(config, tmp_path)
    since = time.monotonic()
    ranks_of(process)[rank].send_signal(signal.SIGSTOP)
    _, stderr = ended(process, everyone, since)
    assert process.returncode == 1
    assert f"rank {rank} on localhost" in stderr
    assert "gave no sign of life" in stderr
    resume(config, tmp_path, "--gpus", "2")


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_ranks_do_not_outlive_their_launch(config: Path, tmp_path: Path) -> None:
    process, everyone = begin(config, tmp_path)
    since = time.monotonic()
    process.kill()
    ended(process, everyone, since)
    assert not any(each.is_running() for each in everyone)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_signal_to_one_rank_stops_all_kindly(config: Path, tmp_path: Path) -> None:
    process, everyone = begin(config, tmp_path)
    since = time.monotonic()
    ranks_of(process)[1].terminate()
    _, stderr = ended(process, everyone, since)
    assert process.returncode == 75, stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_out_of_memory_is_named_with_its_last_lines(config: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(TOO_LARGE)
    process, everyone = begin(config, tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    since = time.monotonic()
    ranks_of(process)[1].send_signal(signal.SIGUSR1)
    _, stderr = ended(process, everyone, since)
    assert process.returncode == 1, stderr
    last = stderr[stderr.rindex("error: ") :]
    assert last.startswith("error: rank 1 on localhost")
    assert "memory" in last
    assert "  | " in last
    resume(config, tmp_path, "--gpus", "2")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_hosts_train_together(config: Path, tmp_path: Path, hosts: TwoHosts) -> None:
    """The whole chain on two network namespaces, by ssh and pdsh."""
    common = ("--out", tmp_path / "out", "--hostfile", hosts.hostfile(tmp_path), "--json")
    process = launch("run", config, *common, inside=hosts.inside, **hosts.environment)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert [stage["action"] for stage in json.loads(stdout)["stages"]] == ["built"] * 4
    (logs,) = (tmp_path / "out" / "logs").iterdir()
    assert {path.name for path in logs.iterdir()} == {"launcher.log", "rank-0.log", "rank-1.log", "hostfile"}
    for stage in ("sft", "rm", "ppo", "eval"):
        assert (tmp_path / "out" / stage / "artifact.json").is_file()
    assert steps_of(tmp_path / "out" / "sft") == [1, 2, 3, 4]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_quickstart_itself_runs_on_two_hosts(tmp_path: Path, hosts: TwoHosts) -> None:
    out = tmp_path / "out"
    common = ("--out", out, "--hostfile", hosts.hostfile(tmp_path), "--json")
    process = launch("run", "quickstart", *common, inside=hosts.inside, **hosts.environment)
    stdout, stderr = process.communicate(timeout=3500)
    assert process.returncode == 0, stderr
    gain = json.loads(stdout)["report"]["figures"]["differences"]["ppo - sft"]["gold"]
    assert gain["mean"] >= 0.2
    (logs,) = (out / "logs").iterdir()
    assert all((logs / f"rank-{rank}.log").is_file() for rank in range(2))


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_on_another_host_ends_all(
    config: Path, tmp_path: Path, hosts: TwoHosts, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    arguments = ("sft", config, "--out", out, "--hostfile", hosts.hostfile(tmp_path), *LONG)
    process = launch(*arguments, inside=hosts.inside, **hosts.environment)
    wait_until(lambda: any((out / "sft" / "checkpoints").glob("step-*")), process)
    everyone = [each for each in psutil.process_iter() if str(out) in " ".join(_command(each))]
    (victim,) = [each for each in everyone if "launch.rank" in _command(each) and _rank(each) == "1"]
    since = time.monotonic()
    victim.send_signal(number)
    _, stderr = ended(process, [each for each in everyone if each.pid != process.pid], since)
    assert process.returncode == 1
    assert f"rank 1 on {hosts.addresses[1]} (process {victim.pid})" in stderr


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _rank(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


def test_an_unreachable_host_is_named_in_time(config: Path, tmp_path: Path, hosts: TwoHosts) -> None:
    hostfile = tmp_path / "hostfile"
    absent = hosts.addresses[0].rpartition(".")[0] + ".9"
    hostfile.write_text(f"{hosts.addresses[0]} slots=1\n{absent} slots=1\n")
    since = time.monotonic()
    arguments = ("run", config, "--out", tmp_path / "out", "--hostfile", hostfile)
    process = launch(*arguments, inside=hosts.inside, **hosts.environment)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert time.monotonic() - since < 45
    (line,) = stderr.splitlines()
    assert line.startswith(f"error: {absent}: cannot be reached by ssh (")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_that_srun_started_find_each_other_and_what_differs(config: Path, tmp_path: Path) -> None:
    """Slurm's variables make this process a rank; another config and other code on a host are named before training."""
    elsewhere = tmp_path / "elsewhere"
    for package in ("data", "launch", "pipeline", "stages", "configs"):
        shutil.copytree(ROOT / package, elsewhere / package)
    (elsewhere / "stages" / "core" / "odd.py").write_text("")

    def start(rank: int, *more: str, **environment: str) -> "subprocess.Popen[str]":
        slurm = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
        slurm["SLURM_JOB_ID"] = str(os.getpid())
        return launch("sft", config, "--out", tmp_path / "out", *more, **slurm, **environment)

    odd = {"PYTHONPATH": str(elsewhere)}
    processes = [start(0), start(1, "sft.learning_rate=0.5", **odd)]
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], told
    assert [line.split(" than ")[0] for line in told[0].splitlines()] == [
        f"error: rank 1 on {os.uname().nodename} has another code",
        f"error: rank 1 on {os.uname().nodename} has another config",
    ]
    assert told[1] == ""
    (tmp_path / "sitecustomize.py").write_text(ABORTED_AT_SHUTDOWN)
    shutdown = {"PYTHONPATH": str(tmp_path)}
    processes = [start(0, **shutdown), start(1, **shutdown)]
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert steps_of(tmp_path / "out" / "sft") == [1, 2, 3, 4]
    assert told[1] == ""


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_ranks_that_torchrun_started_find_each_other(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "launch"]
    done = subprocess.run(
        [*command, "sft", str(config), "--out", str(tmp_path / "out"), "--json"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stages"][0]["action"] == "built"
