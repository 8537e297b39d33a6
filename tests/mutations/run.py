"""Applies every mutant of the list to a copy of the project and runs the tests that must notice it.

`python -m tests.mutations.run [part of a name …]`. Fails where fewer than 95 % are caught, where the list is stale, or
where the tests fail on the project as it stands. The heavy imports are made once: each mutant's tests run in a fork of
this process, which imports the project afresh from its copy.
"""

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.mutations.mutants import Mutant, all_mutants

ROOT = Path(__file__).parents[2]
OURS = ("data", "launch", "pipeline", "stages", "tests")
HEAVY = (
    "torch",
    "torch.utils.checkpoint",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "peft",
    "datasets",
    "hypothesis",
    "pytest",
    "trl.trainer.dpo_trainer",
)
NEEDED_SHARE = 0.95
TIME_LIMIT = 180.0  # seconds for one mutant's tests; running longer counts as caught
BASELINE_LIMIT = 1800.0
PASSED, FAILED = 0, 1  # pytest's exit codes; every other one means that the tests did not run


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant."""

    mutant: Mutant
    outcome: str  # caught, survived or broken
    detail: str
    seconds: float


@dataclass
class Job:
    """A running fork and the copy that it works on."""

    mutant: Mutant
    copy: Path
    original: str
    process: int
    started: float
    log: Path


def copy_project(target: Path) -> Path:
    """A copy of the tracked files and of those that git does not ignore, as they stand in the working tree."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def fork_tests(copy: Path, tests: Sequence[str], log: Path) -> int:
    """The process id of a fork that runs `tests` in `copy`; its exit status is pytest's."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = _run_tests(copy, tests)
    finally:
        sys.stdout.flush()
        os._exit(status)  # no exit handlers: they belong to the parent


def _run_tests(copy: Path, tests: Sequence[str]) -> int:
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path.insert(0, str(copy))
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(copy), "-c", str(copy / "pyproject.toml")]
    status = int(pytest.main([*options, *tests]))
    strangers = [
        name
        for name, module in sys.modules.items()
        if name.split(".")[0] in OURS and not str(getattr(module, "__file__", None) or copy).startswith(str(copy))
    ]
    assert not strangers, f"imported from elsewhere: {strangers}"
    return status


def wait_for(process: int, limit: float) -> int | None:
    """The exit status, or None where the fork ran past its limit and was ended."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def first_failure(log: Path) -> str:
    """The first test that failed by pytest's summary, or the last line of the log."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else (lines or ["no output"])[-1]


def check_tests(copy: Path, mutants: Iterable[Mutant]) -> str | None:
    """None where the tests pass on the project as it stands, else what failed."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    whole = {test.split("::")[0] for test in tests if "::" not in test}
    log = copy.parent / "baseline.log"
    chosen = [test for test in tests if "::" not in test or test.split("::")[0] not in whole]
    status = wait_for(fork_tests(copy, chosen, log), BASELINE_LIMIT)
    return None if status == PASSED else f"exit status {status}: {first_failure(log)} (log: {log})"


def start(mutant: Mutant, copy: Path) -> Job:
    """The mutant's tests, running in the copy that holds the mutant."""
    path = copy / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(mutant.apply(original), encoding="utf-8")
    log = copy.parent / f"{mutant.name.replace(' ', '-')}.log"
    return Job(mutant, copy, original, fork_tests(copy, mutant.tests, log), time.monotonic(), log)


def finish(job: Job) -> Verdict:
    """What became of a mutant; its copy is whole again."""
    status = wait_for(job.process, TIME_LIMIT)
    (job.copy / job.mutant.file).write_text(job.original, encoding="utf-8")
    seconds = time.monotonic() - job.started
    if status is None:
        return Verdict(job.mutant, "caught", "ran past the time limit", seconds)
    outcome = {FAILED: "caught", PASSED: "survived"}.get(status, "broken")
    detail = "" if status == PASSED else first_failure(job.log)
    return Verdict(job.mutant, outcome, detail, seconds)


def run_all(mutants: Sequence[Mutant], copies: Sequence[Path]) -> list[Verdict]:
    """A verdict for each mutant, as many at a time as there are copies."""
    waiting, running, verdicts = deque(mutants), deque[Job](), list[Verdict]()
    free = deque(copies)
    while waiting or running:
        while waiting and free:
            running.append(start(waiting.popleft(), free.popleft()))
        job = running.popleft()
        verdicts.append(finish(job))
        free.append(job.copy)
        print(line(verdicts[-1]), flush=True)
    return verdicts


def line(verdict: Verdict) -> str:
    """One line of the table."""
    return f"{verdict.outcome:9}{verdict.seconds:6.1f} s  {verdict.mutant.name:58} {verdict.detail}"


def warm_up() -> None:
    """Imports what every fork needs, so that none pays for it again."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork must find no running threads
    sys.dont_write_bytecode = True  # a mutant has the size and, to the second, the age of what it replaces
    for name in HEAVY:
        importlib.import_module(name)


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 where enough mutants were caught and all could be tried."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; default: all mutants")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="mutants at a time")
    options = parser.parse_args(arguments)
    mutants = [each for each in all_mutants() if not options.names or any(name in each.name for name in options.names)]
    warm_up()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = [copy_project(Path(folder) / f"copy-{place}" / "project") for place in range(options.jobs)]
        stale = stale_entries(mutants, copies[0])
        fitting = [mutant for mutant in mutants if mutant not in [each.mutant for each in stale]]
        print(f"{len(mutants)} mutants; first their tests on the project as it stands", flush=True)
        if failure := check_tests(copies[0], fitting):
            print(f"the tests must pass before a mutant is made: {failure}")
            return 1
        verdicts = stale + run_all(fitting, copies)
    return summary(verdicts)


def stale_entries(mutants: Iterable[Mutant], root: Path) -> list[Verdict]:
    """A verdict for each mutant whose text does not occur exactly once in its file."""
    stale: list[Verdict] = []
    for mutant in mutants:
        try:
            mutant.apply((root / mutant.file).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError) as error:
            stale.append(Verdict(mutant, "broken", str(error), 0.0))
    return stale


def summary(verdicts: Sequence[Verdict]) -> int:
    """Prints the counts and those not caught; the exit status."""
    counts = {name: sum(each.outcome == name for each in verdicts) for name in ("caught", "survived", "broken")}
    print("\n" + ", ".join(f"{count} {name}" for name, count in counts.items()))
    for verdict in verdicts:
        if verdict.outcome != "caught":
            print(line(replace(verdict, detail=f"{verdict.mutant.file} {verdict.detail}")))
    enough = counts["caught"] >= NEEDED_SHARE * len(verdicts)
    print(f"caught {counts['caught']} of {len(verdicts)}, needed {NEEDED_SHARE:.0%}: {'ok' if enough else 'too few'}")
    return 0 if enough and not counts["broken"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
