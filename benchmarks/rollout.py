"""Native rollouts beside `transformers.generate` and vLLM: the same LoRA policy, prompts and budget, one table.

python -m benchmarks.rollout --model stories3M-llama --lengths eos
python -m benchmarks.rollout --vllm-python PATH/bin/python
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    MODELS,
    Run,
    Worker,
    add_common_options,
    alternate,
    best_peaks,
    disturbance,
    kept,
    machine,
    peaks_line,
    run_plain,
    spread,
    table,
    write_json,
)
from benchmarks.floors import Shape, Tokens, phase_floors


def _hf(dtype: str, *, logprobs: bool = False, merged: bool = False) -> dict[str, Any]:
    return {"engine": "transformers", "dtype": dtype, "logprobs": logprobs, "merged": merged}


ARMS: Mapping[str, Mapping[str, Any]] = {
    "native": {"engine": "native", "dtype": "float32"},
    "native-bf16": {"engine": "native", "dtype": "bfloat16"},
    "hf": _hf("float32"),
    "hf-bf16": _hf("bfloat16"),
    "hf-logprobs": _hf("float32", logprobs=True),
    "hf-merged": _hf("float32", merged=True),
    "hf-merged-bf16": _hf("bfloat16", merged=True),
    "vllm-server": {"engine": "vllm-server", "dtype": "float32"},
    "vllm": {"engine": "vllm", "dtype": "float32"},
    "vllm-bf16": {"engine": "vllm", "dtype": "bfloat16"},
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rollout", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    parser.add_argument("--model", choices=MODELS, default="stories3M-llama")
    parser.add_argument("--lengths", choices=("eos", "fixed"), default="eos")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--rollouts", type=int, default=6, help="per process; the first is dropped")
    parser.add_argument("--batch", type=int, default=64, help="prompts, each with one response")
    parser.add_argument("--response-length", type=int, default=64, help="most new tokens")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--vllm-python", metavar="PATH", help="interpreter that has vllm; default: this one")
    options = parser.parse_args(arguments)
    if options.rollouts < 2:
        parser.error("--rollouts: the first is dropped, so 2 at least")
    if options.vllm_python is None and importlib.util.find_spec("vllm") is None:
        options.arms = [arm for arm in options.arms if not arm.startswith("vllm")]
        print("vllm is not installed here: its arms are left out; --vllm-python names an interpreter", file=sys.stderr)
    elif options.vllm_python is not None:
        options.vllm_python = str(Path(options.vllm_python).absolute())  # a worker runs in a folder of its own
    return options


def main() -> None:
    """Runs the arms in alternation and prints the table."""
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).absolute()
        names = ("model", "lengths", "batch", "response_length", "rank")
        spec = {name: getattr(options, name) for name in names} | {"folder": str(folder / "workload"), "seed": 0}
        workload = run_plain(Worker("benchmarks.workload", spec), folder / "workload", options.threads)
        runs = alternate(
            options.arms,
            options.repeats,
            lambda arm, _: worker(options, arm, folder / "workload"),
            folder=folder / "runs",
            threads=options.threads,
        )
    facts = {"options": {name: str(value) for name, value in vars(options).items()}, "workload": workload}
    facts |= {"machine": machine(options.threads), "peaks": best_peaks(runs)}
    print(report(options, workload, runs))
    write_json(options.json, facts, runs)


def worker(options: argparse.Namespace, arm_name: str, workload: Path) -> Worker:
    """One process of an arm."""
    arm = ARMS[arm_name]
    spec = {name: getattr(options, name) for name in ("rank", "response_length", "rollouts", "threads")}
    spec |= {"arm": arm, "folder": str(workload), "max_length": options.response_length + 256}
    spec |= {"vllm_python": options.vllm_python}
    if arm["engine"] == "vllm":
        return Worker("benchmarks.rollout_vllm", spec, interpreter=options.vllm_python or sys.executable)
    return Worker("benchmarks.rollout_local", spec)


def report(options: argparse.Namespace, workload: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """The table, with what it was measured on above it."""
    peaks = best_peaks(runs)
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in options.arms}
    medians = {arm: statistics.median(each["total"] for each in kept(own)) for arm, own in by_arm.items()}
    headings = ["arm", "s/rollout", "CPU s", "response tokens/s", "tokens", "peak MB", "x floor", "x hf", "disturbed"]
    rows = [
        [
            arm,
            *cells(options, workload, peaks, by_arm[arm]),
            f"{medians['hf'] / medians[arm]:.2f}" if "hf" in medians else "-",
            disturbance(by_arm[arm]),
        ]
        for arm in options.arms
    ]
    above = [
        f"{options.model}, {options.lengths} lengths, {options.batch} prompts, at most {options.response_length} new "
        f"tokens, LoRA rank {options.rank}",
        f"{machine(options.threads)}; {peaks_line(peaks)}",
        f"medians [least-most] of {options.rollouts - 1} rollouts x {options.repeats} processes, the first dropped",
    ]
    return "\n".join([*above, "", table(headings, rows)])


def cells(
    options: argparse.Namespace, workload: Mapping[str, Any], peaks: Mapping[str, float], runs: Sequence[Run]
) -> list[str]:
    """Seconds, CPU seconds, tokens a second, tokens, memory, times over the floor."""
    rollouts, dtype = kept(runs), ARMS[runs[0].arm]["dtype"]
    over = [
        each["total"]
        / phase_floors(
            Shape(**workload["shape"]),
            Tokens(each["prompt_tokens"], each["response_tokens"], options.batch, 1),
            peaks,
            dtype,
        )["rollout"]
        for each in rollouts
    ]
    return [
        spread([each["total"] for each in rollouts]),
        spread([each["cpu"] for each in rollouts]),
        spread([each["response_tokens"] / each["total"] for each in rollouts]),
        spread([each["response_tokens"] for each in rollouts]),
        spread([run.output["peak_bytes"] / 1e6 for run in runs]),
        spread(over),
    ]


if __name__ == "__main__":
    main()
