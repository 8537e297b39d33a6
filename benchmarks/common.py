"""What every benchmark needs: runs in alternation, each in a fresh pinned process; pressure; peaks; one table.

The parent process imports no torch, so that it takes neither memory nor threads from what it measures.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRL_PPO = ROOT / ".peers" / "trl-1.12"
MODELS = (
    *("stories3M-llama", "stories260K-llama", "random-tiny"),
    *("random-35m", "random-90m", "random-0.5b", "random-1.5b"),
)
PRESSURE_LIMIT = 1.0  # avg10 of /proc/pressure/cpu, in percent
OTHERS_LIMIT = 0.05  # cores that other processes may keep busy while one is measured
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
TAIL = 3000  # characters of a failed worker's output that are shown


@dataclass(frozen=True)
class Worker:
    """One process to measure: a module of this package, and what it needs around it."""

    module: str
    spec: Mapping[str, Any]  # its instructions, as JSON
    python_path: Path | None = None  # searched before the installed packages
    interpreter: str = sys.executable


@dataclass(frozen=True)
class Quiet:
    """How busy the machine was around one run; None where the system does not say."""

    pressure_before: float | None  # avg10, percent of time in which some task waited for a CPU
    pressure_after: float | None
    stalled_share: float | None  # share of the run in which some task waited, ours included
    other_cores: float | None  # cores kept busy by others, on average

    @property
    def disturbed(self) -> bool:
        """Pressure above the limit that is not our own load: there before, or there while others computed."""
        others = self.other_cores is None or self.other_cores > OTHERS_LIMIT
        return (self.pressure_before or 0.0) > PRESSURE_LIMIT or (
            (self.pressure_after or 0.0) > PRESSURE_LIMIT and others
        )


@dataclass(frozen=True)
class Run:
    """One finished process: what it wrote, and what was seen from outside."""

    arm: str
    repeat: int
    output: dict[str, Any]
    wall_seconds: float
    cpu_seconds: float
    quiet: Quiet = field(repr=False)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks share."""
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every process measured")
    parser.add_argument("--repeats", type=int, default=1, help="processes per arm, in alternation: ABAB")
    parser.add_argument("--json", type=Path, metavar="PATH", help="writes every raw figure there")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="models, data and outputs; default: temporary")


def alternate(
    arms: Sequence[str], repeats: int, worker_of: Callable[[str, int], Worker], *, folder: Path, threads: int
) -> list[Run]:
    """Every arm once, then every arm again: what drifts on the machine meets all of them alike."""
    runs: list[Run] = []
    for repeat in range(repeats):
        for arm in arms:
            worker = worker_of(arm, repeat)
            out = folder / f"{arm}-{repeat}"
            out.mkdir(parents=True, exist_ok=True)
            runs.append(_measured(arm, repeat, worker, out, threads))
            print(_one_line(runs[-1]), file=sys.stderr, flush=True)
    return runs


def run_plain(worker: Worker, out: Path, threads: int) -> dict[str, Any]:
    """What a worker wrote; nothing is measured from outside."""
    out.mkdir(parents=True, exist_ok=True)
    return _start(worker, out, threads)


def _measured(arm: str, repeat: int, worker: Worker, out: Path, threads: int) -> Run:
    pressure, stalled, busy = _pressure(), _stalled_seconds(), _busy_seconds()
    own, began = _children_seconds(), time.perf_counter()
    output = _start(worker, out, threads)
    wall, cpu = time.perf_counter() - began, _children_seconds() - own
    stalled_after, busy_after = _stalled_seconds(), _busy_seconds()
    quiet = Quiet(
        pressure_before=pressure,
        pressure_after=_pressure(),
        stalled_share=None if stalled is None or stalled_after is None else (stalled_after - stalled) / wall,
        other_cores=None if busy is None or busy_after is None else max(busy_after - busy - cpu, 0.0) / wall,
    )
    return Run(arm, repeat, output, wall, cpu, quiet)


def _start(worker: Worker, out: Path, threads: int) -> dict[str, Any]:
    """Runs `python -m MODULE SPEC RESULT`; the result is read from the file it writes."""
    spec, result = out / "spec.json", out / "result.json"
    spec.write_text(json.dumps(worker.spec), encoding="utf-8")
    result.unlink(missing_ok=True)
    path = [str(each) for each in (worker.python_path, ROOT) if each is not None]
    environment = (
        os.environ
        | dict.fromkeys(THREAD_VARIABLES, str(threads))
        | {
            "PYTHONPATH": os.pathsep.join(path),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }
    )
    command = [worker.interpreter, "-m", worker.module, str(spec), str(result)]
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, check=False)
    (out / "output.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode != 0 or not result.is_file():
        raise SystemExit(
            f"{worker.module} failed ({done.returncode}), see {out}:\n{(done.stdout + done.stderr)[-TAIL:]}"
        )
    return json.loads(result.read_text(encoding="utf-8"))


def _one_line(run: Run) -> str:
    quiet = run.quiet
    seen = f"pressure {_number(quiet.pressure_before)} before, {_number(quiet.pressure_after)} after, "
    seen += f"others {_number(quiet.other_cores)} cores"
    mark = "  DISTURBED" if quiet.disturbed else ""
    return f"{run.arm} #{run.repeat}: {run.wall_seconds:.1f} s wall, {run.cpu_seconds:.1f} s CPU; {seen}{mark}"


def _pressure() -> float | None:
    values = _pressure_line()
    return None if values is None else float(values["avg10"])


def _stalled_seconds() -> float | None:
    values = _pressure_line()
    return None if values is None else float(values["total"]) / 1e6


def _pressure_line() -> dict[str, str] | None:
    try:
        line = Path("/proc/pressure/cpu").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None
    return dict(part.split("=", 1) for part in line.split()[1:])


def _busy_seconds() -> float | None:
    """CPU seconds that the whole machine has spent on anything but idling and waiting for disks."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:]
    except (OSError, IndexError):
        return None
    user, nice, system, _, _, *rest = map(int, fields[:8])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure_peaks() -> dict[str, float]:
    """FLOP/s of a square product in fp32 and bf16, and bytes/s of a copy, on the first GPU or the CPU.

    The best of ten, or of as many as begin within two seconds. Called in the measured process after its run, with the
    threads and the machine that the run had.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024

    def best(work: Callable[[], object]) -> float:
        times: list[float] = []
        while len(times) < 10 and sum(times) < 2:
            began = clock()
            work()
            times.append(clock() - began)
        return min(times)

    peaks: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        peaks[name] = 2 * size**3 / best(lambda left=left, right=right: left @ right)
    source = torch.empty(2**26, device=device)  # 256 MB: larger than the caches
    target = torch.empty_like(source)
    source.fill_(1.0)
    peaks["copy"] = 2 * source.numel() * source.element_size() / best(lambda: target.copy_(source))
    return peaks


def clock() -> float:
    """Seconds, once the GPU (where there is one) has finished what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def best_peaks(runs: Iterable[Run]) -> dict[str, float]:
    """The highest of each peak over all processes: what the machine can do when nothing disturbs it."""
    found = [run.output["peaks"] for run in runs]
    return {name: max(peaks[name] for peaks in found) for name in found[0]}


def peaks_line(peaks: Mapping[str, float]) -> str:
    """The peaks in words."""
    return (
        f"peaks {peaks['float32'] / 1e9:.0f} fp32, {peaks['bfloat16'] / 1e9:.0f} bf16 GFLOP/s, "
        f"copy {peaks['copy'] / 1e9:.0f} GB/s"
    )


def kept(runs: Sequence[Run]) -> list[dict[str, float]]:
    """All updates of an arm but the first of each process."""
    return [update for run in runs for update in run.output["updates"][1:]]


def resident_peak() -> float:
    """The most bytes this process has held: on the GPU where there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`median [least - most]` to so many significant digits."""
    if not values:
        return "-"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{_number(middle, digits)} [{_number(low, digits)}-{_number(high, digits)}]"


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    cells = [list(headings), *map(list, rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(headings))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def machine(threads: int) -> str:
    """The machine in one line."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores, {threads} threads used, Python {platform.python_version()}"


def disturbance(runs: Sequence[Run]) -> str:
    """How many of an arm's runs were disturbed, and the worst that was seen."""
    worst = max((run.quiet.other_cores or 0.0 for run in runs), default=0.0)
    return f"{sum(run.quiet.disturbed for run in runs)}/{len(runs)}, others <= {worst:.2f} cores"


def write_json(path: Path | None, facts: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """Every raw figure, where a path is given."""
    if path is not None:
        rows = [asdict(run) | {"disturbed": run.quiet.disturbed} for run in runs]
        path.write_text(json.dumps({**facts, "runs": rows}, indent=1), encoding="utf-8")


def read_spec() -> dict[str, Any]:
    """A worker's instructions: the file named first on its command line."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def write_result(result: Mapping[str, Any]) -> None:
    """What a worker found, to the file named second on its command line."""
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
