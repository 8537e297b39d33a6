"""SFT and the reward model beside TRL's stock SFTTrainer and RewardTrainer: the same rows, one table each.

python -m benchmarks.sft_rm --stage sft --model stories3M-llama
python -m benchmarks.sft_rm --stage rm --tuning lora full
"""

import argparse
import math
import statistics
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

KINDS: Mapping[str, Mapping[str, Any]] = {
    "trl": {"contestant": "trl", "dtype": "float32"},
    "trl-bf16": {"contestant": "trl", "dtype": "bfloat16"},
    "trl-bf16-weights": {"contestant": "trl", "dtype": "bfloat16", "bf16_weights": True},
    "trl-checkpointing": {"contestant": "trl", "dtype": "float32", "checkpointing": True},
    "ours": {"contestant": "ours", "dtype": "float32"},
    "ours-bf16": {"contestant": "ours", "dtype": "bfloat16"},
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sft_rm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    parser.add_argument("--stage", choices=("sft", "rm"), default="sft")
    parser.add_argument("--model", choices=MODELS, default="stories3M-llama")
    parser.add_argument("--arms", nargs="+", choices=KINDS, default=list(KINDS), metavar="ARM", help=", ".join(KINDS))
    parser.add_argument("--tuning", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps per process; the first is dropped")
    parser.add_argument("--batch", type=int, default=32, help="rows (pairs) per optimizer step")
    parser.add_argument("--microbatch", type=int, default=8, help="rows (pairs) per forward pass")
    parser.add_argument("--median-length", type=float, default=48, help="tokens of a prompt, and of a response")
    parser.add_argument("--sigma", type=float, default=0.8, help="of the lognormal lengths' logarithm")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps: the first is dropped, so 2 at least")
    return options


def main() -> None:
    """Runs the arms in alternation and prints the table."""
    options = parse()
    arms = [f"{kind}-{tuning}" for tuning in options.tuning for kind in options.arms]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).absolute()
        spec = {"model": options.model, "lengths": "fixed", "batch": 8, "response_length": 8, "rank": options.rank}
        spec |= {"folder": str(folder / "workload"), "seed": 0}
        workload = run_plain(Worker("benchmarks.workload", spec), folder / "workload", options.threads)
        runs = alternate(
            arms,
            options.repeats,
            lambda arm, repeat: worker(options, arm, repeat, folder / "workload" / "policy"),
            folder=folder / "runs",
            threads=options.threads,
        )
    facts = {"options": {name: str(value) for name, value in vars(options).items()}, "workload": workload}
    facts |= {"machine": machine(options.threads), "peaks": best_peaks(runs)}
    print(report(options, arms, workload, runs))
    write_json(options.json, facts, runs)


def worker(options: argparse.Namespace, arm: str, repeat: int, model: Path) -> Worker:
    """One process of an arm."""
    kind, _, tuning = arm.rpartition("-")
    names = ("stage", "steps", "batch", "microbatch", "max_length", "rank", "learning_rate", "threads")
    spec = {name: getattr(options, name) for name in names} | {
        "arm": {"bf16_weights": False, "checkpointing": False, "tuning": tuning} | dict(KINDS[kind]),
        "model": str(model),
        "seed": repeat,
        "log_median": math.log(options.median_length),
        "log_sigma": options.sigma,
    }
    return Worker("benchmarks.supervised_local", spec)


def report(options: argparse.Namespace, arms: Sequence[str], workload: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """The table, with what it was measured on above it; the ratio is of real tokens a second."""
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in arms}
    speeds = {
        arm: statistics.median(each["tokens"] / each["total"] for each in kept(own)) for arm, own in by_arm.items()
    }
    headings = [
        "arm",
        "s/step",
        "CPU s/step",
        "real tokens/s",
        "peak MB",
        "x flop floor",
        "loss first > last",
        "x trl, same dtype",
        "disturbed",
    ]
    peaks = best_peaks(runs)
    rows: list[list[str]] = []
    for arm, own in by_arm.items():
        steps, (kind, _, tuning) = kept(own), arm.rpartition("-")
        baseline = f"trl{'-bf16' if KINDS[kind]['dtype'] == 'bfloat16' else ''}-{tuning}"
        ends = [statistics.fmean(run.output["updates"][place]["loss"] for run in own) for place in (0, -1)]
        rows.append(
            [
                arm,
                spread([each["total"] for each in steps]),
                spread([each["cpu"] for each in steps]),
                spread([each["tokens"] / each["total"] for each in steps]),
                spread([run.output["peak_bytes"] / 1e6 for run in own]),
                spread([each["total"] / floor(options, workload, peaks, arm, each) for each in steps]),
                f"{ends[0]:.3f} > {ends[1]:.3f}",
                f"{speeds[arm] / speeds[baseline]:.2f}" if baseline in speeds else "-",
                disturbance(own),
            ]
        )
    above = [
        f"{options.stage} of {options.model}, batch {options.batch} in passes of {options.microbatch}, lognormal "
        f"lengths of median {options.median_length:.0f} and sigma {options.sigma}",
        f"{machine(options.threads)}; {peaks_line(peaks)}",
        f"medians [least-most] of {options.steps - 1} steps x {options.repeats} processes, the first dropped",
    ]
    return "\n".join([*above, "", table(headings, rows)])


def floor(
    options: argparse.Namespace,
    workload: Mapping[str, Any],
    peaks: Mapping[str, float],
    arm: str,
    step: Mapping[str, float],
) -> float:
    """Seconds for the products with trunk (and, in SFT, with the head at the learned half of the tokens)."""
    shape, (kind, _, tuning) = workload["shape"], arm.rpartition("-")
    head = shape["head"] / 2 if options.stage == "sft" else 0
    # Forward 2, towards the input 2, towards the weights 2 a parameter and token; frozen weights save the last.
    times = 4 if tuning == "lora" else 6
    flop = (times * (shape["trunk"] + head) + (6 * shape["lora"] if tuning == "lora" else 0)) * step["tokens"]
    return flop / peaks[KINDS[kind]["dtype"]]


if __name__ == "__main__":
    main()
