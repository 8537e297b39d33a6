"""This project's PPO beside TRL 1.12's: one command, one table.

    python -m benchmarks.ppo --model stories3M-llama --lengths eos --json ppo.json
    python -m benchmarks.ppo --model stories260K-llama --until-score 4 --updates 30 --seeds 0 1 2 3 --learning-rate 1e-3

The first compares seconds, memory and learning over a few updates; the second counts the seconds until the score, a
mean over the last three updates, reaches a value on a task with a programmatic reward.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import (
    MODELS,
    TRL_PPO,
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
from benchmarks.floors import CHEAPEST, Algorithm, Shape, Tokens, phase_floors

PHASES = ("rollout", "scoring", "update", "other")
SCORE_WINDOW = 3  # updates whose mean score must reach --until-score


def _trl(dtype: str, *, lora_critic: bool = False, tuning: str = "lora") -> dict[str, Any]:
    return {"contestant": "trl", "dtype": dtype, "lora_critic": lora_critic, "tuning": tuning}


def _ours(dtype: str, critic: str, *, tuning: str = "lora", samples: int = 1) -> dict[str, Any]:
    return {"contestant": "ours", "dtype": dtype, "critic": critic, "tuning": tuning, "samples": samples}


ARMS: Mapping[str, Mapping[str, Any]] = {
    "trl-default": _trl("float32"),
    "trl-bf16": _trl("bfloat16"),
    "trl-lora-critic": _trl("float32", lora_critic=True),
    "trl-lora-critic-bf16": _trl("bfloat16", lora_critic=True),
    "trl-full": _trl("float32", tuning="full"),
    "trl-full-bf16": _trl("bfloat16", tuning="full"),
    "ours-adapter": _ours("float32", "adapter"),
    "ours-adapter-bf16": _ours("bfloat16", "adapter"),
    "ours-shared": _ours("float32", "shared"),
    "ours-shared-bf16": _ours("bfloat16", "shared"),
    # As many responses, but four to each of a quarter of the prompts: TRL's PPO draws one.
    "ours-adapter-x4": _ours("float32", "adapter", samples=4),
    "ours-shared-x4": _ours("float32", "shared", samples=4),
    "ours-full": _ours("float32", "model", tuning="full"),
    "ours-full-bf16": _ours("bfloat16", "model", tuning="full"),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ppo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    parser.add_argument("--model", choices=MODELS, default="stories3M-llama")
    parser.add_argument("--lengths", choices=("eos", "fixed"), default="eos")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--updates", type=int, default=6, help="updates per process; the first is dropped")
    parser.add_argument("--batch", type=int, default=64, help="responses per update, and prompts in all")
    parser.add_argument("--minibatch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--response-length", type=int, default=64, help="most new tokens")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of LoRA arms; full ones take a tenth")
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--until-score", type=float, metavar="X", help="seconds to this score; reward is a function")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="for --until-score: a process per arm and seed"
    )
    options = parser.parse_args(arguments)
    if any(arm.startswith("trl") for arm in options.arms) and not (TRL_PPO / "trl").is_dir():
        parser.error(f"no TRL 1.12 in {TRL_PPO.relative_to(TRL_PPO.parents[1])}: run `make peers` first")
    if options.updates < 2:
        parser.error("--updates: the first is dropped, so 2 at least")
    return options


def main() -> None:
    """Runs the arms in alternation and prints the table."""
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).absolute()
        workload = make_workload(options, folder / "workload")
        repeats = options.repeats if options.until_score is None else len(options.seeds)
        runs = alternate(
            options.arms,
            repeats,
            lambda arm, repeat: worker(options, arm, repeat, folder / "workload"),
            folder=folder / "runs",
            threads=options.threads,
        )
    facts = {"options": {name: str(value) for name, value in vars(options).items()}, "workload": workload}
    facts |= {"machine": machine(options.threads), "peaks": best_peaks(runs)}
    print(report(options, workload, runs) if options.until_score is None else report_seconds(options, runs))
    write_json(options.json, facts, runs)


def make_workload(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Saves checkpoint, reward model and prompts for both contestants; what they are."""
    spec = {name: getattr(options, name) for name in ("model", "lengths", "batch", "response_length", "rank")}
    task = Worker("benchmarks.workload", spec | {"folder": str(folder), "seed": 0})
    return run_plain(task, folder, options.threads)


def worker(options: argparse.Namespace, arm_name: str, repeat: int, workload: Path) -> Worker:
    """One process: an arm under what is the same for all arms."""
    arm = ARMS[arm_name]
    shared = ("batch", "minibatch", "epochs", "response_length", "rank", "kl_coef", "updates", "threads")
    spec = {name: getattr(options, name) for name in shared} | {
        "arm": arm,
        "tuning": arm["tuning"],
        "folder": str(workload),
        "seed": repeat if options.until_score is None else options.seeds[repeat],
        "max_length": 2 * options.response_length + 128,
        "learning_rate": options.learning_rate * (1.0 if arm["tuning"] == "lora" else 0.1),
        "reward": "model" if options.until_score is None else "function",
    }
    module = f"benchmarks.ppo_{arm['contestant']}"
    return Worker(module, spec, python_path=TRL_PPO if arm["contestant"] == "trl" else None)


def report(options: argparse.Namespace, workload: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """The table, with what it was measured on above it."""
    peaks = best_peaks(runs)
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in options.arms}
    memory = {arm: statistics.median(run.output["peak_bytes"] for run in own) for arm, own in by_arm.items()}
    medians = {arm: statistics.median(update["total"] for update in kept(own)) for arm, own in by_arm.items()}
    headings = [
        "arm",
        "s/update",
        *(f"{phase} s" for phase in PHASES),
        "CPU s/update",
        "response tokens/s",
        "peak MB",
        "x floor",
        "x own floor",
        "tokens/update",
        "score first > last",
        "EV last",
        "x TRL default",
        "x best TRL",
        "memory / TRL default",
        "disturbed",
    ]
    rows = [
        [
            arm,
            *timing_cells(options, workload, peaks, by_arm[arm]),
            *learning_cells(by_arm[arm]),
            *ratio_cells(arm, medians),
            f"{memory[arm] / memory['trl-default']:.2f}" if "trl-default" in memory else "-",
            disturbance(by_arm[arm]),
        ]
        for arm in options.arms
    ]
    above = [
        f"{options.model} ({workload['parameters'] / 1e6:.1f}M parameters), {options.lengths} lengths, "
        f"{options.batch} responses of at most {options.response_length} tokens, minibatch {options.minibatch}, "
        f"{options.epochs} epochs, LoRA rank {options.rank}",
        f"{machine(options.threads)}; {peaks_line(peaks)}",
        f"medians [least-most] of {options.updates - 1} updates x {options.repeats} processes, first update dropped",
    ]
    return "\n".join([*above, "", table(headings, rows)])


def algorithm_of(arm: Mapping[str, Any]) -> Algorithm:
    """What an arm trains, whoever computes it."""
    if arm["contestant"] == "trl":
        return Algorithm(arm["tuning"], "lora" if arm["lora_critic"] else "full")
    return Algorithm(arm["tuning"], {"shared": "shared", "adapter": "lora", "model": arm["tuning"]}[arm["critic"]])


def timing_cells(
    options: argparse.Namespace, workload: Mapping[str, Any], peaks: Mapping[str, float], runs: Sequence[Run]
) -> list[str]:
    """Seconds in all and by phase (with times over the floor), CPU seconds, tokens/s, memory, floors, tokens."""
    updates, arm = kept(runs), ARMS[runs[0].arm]
    shape = Shape(**workload["shape"])

    def floors(algorithm: Algorithm) -> list[dict[str, float]]:
        """Of each update."""
        tokens = [
            Tokens(update["prompt_tokens"], update["response_tokens"], options.batch, options.epochs)
            for update in updates
        ]
        return [phase_floors(shape, each, peaks, arm["dtype"], algorithm) for each in tokens]

    def over_floor(phase: str) -> str:
        return f"x{statistics.median(u[phase] / f[phase] for u, f in zip(updates, cheapest, strict=True)):.1f}"

    def in_all(floors: Sequence[Mapping[str, float]]) -> str:
        return spread([update["total"] / sum(floor.values()) for update, floor in zip(updates, floors, strict=True)])

    cheapest = floors(CHEAPEST)
    phases = [spread([update[phase] for update in updates]) for phase in PHASES]
    peak = spread([run.output["peak_bytes"] / 1e6 for run in runs])
    libraries = statistics.median(run.output["libraries_bytes"] / 1e6 for run in runs)
    return [
        spread([update["total"] for update in updates]),
        *(f"{cell} {over_floor(phase)}" for cell, phase in zip(phases[:3], PHASES, strict=False)),
        phases[3],
        spread([update["cpu"] for update in updates]),
        spread([update["response_tokens"] / update["total"] for update in updates]),
        f"{peak}, {libraries:.0f} of it libraries",
        in_all(cheapest),
        in_all(floors(algorithm_of(arm))),
        spread([update["response_tokens"] for update in updates]),
    ]


def learning_cells(runs: Sequence[Run]) -> list[str]:
    """Mean score at the first and at the last update, explained variance at the last."""
    first, last = ([run.output["updates"][place] for run in runs] for place in (0, -1))
    ends = [statistics.fmean(update["score"] for update in updates) for updates in (first, last)]
    explained = statistics.fmean(update["explained_variance"] for update in last)
    return [f"{ends[0]:.3f} > {ends[1]:.3f}", f"{explained:.2f}"]


def ratio_cells(arm_name: str, medians: Mapping[str, float]) -> list[str]:
    """How many times faster than TRL's default, and than its fastest arm here of the same dtype and tuning."""
    arm = ARMS[arm_name]
    alike = [
        medians[name]
        for name in medians
        if (ARMS[name]["contestant"], ARMS[name]["dtype"], ARMS[name]["tuning"]) == ("trl", arm["dtype"], arm["tuning"])
    ]
    default = f"{medians['trl-default'] / medians[arm_name]:.2f}" if "trl-default" in medians else "-"
    return [default, f"{min(alike) / medians[arm_name]:.2f}" if alike else "-"]


class Reached(NamedTuple):
    """What it took to reach a score."""

    seconds: float
    cpu: float  # process seconds: what other processes take is not in it
    updates: int


def reach(run: Run, target: float) -> Reached | None:
    """Until the mean score of the last updates reaches the target; None where it never does."""
    updates = run.output["updates"]
    for place in range(SCORE_WINDOW, len(updates) + 1):
        if statistics.fmean(update["score"] for update in updates[place - SCORE_WINDOW : place]) >= target:
            done = updates[:place]
            return Reached(sum(each["total"] for each in done), sum(each["cpu"] for each in done), place)
    return None


def report_seconds(options: argparse.Namespace, runs: Sequence[Run]) -> str:
    """Seconds and updates to the score, every seed shown; the curves at quarters of the run."""
    rows: list[list[str]] = []
    places = sorted({max(round(options.updates * part / 4) - 1, 0) for part in range(5)})
    for arm in options.arms:
        own = [run for run in runs if run.arm == arm]
        reached = [reach(run, options.until_score) for run in own]
        found = [each for each in reached if each is not None]
        everywhere = len(found) == len(own)
        curve = [spread([run.output["updates"][place]["score"] for run in own]) for place in places]
        rows.append(
            [
                arm,
                spread([each.seconds for each in found]) if everywhere else "not in every seed",
                spread([each.cpu for each in found]) if everywhere else "-",
                ", ".join("-" if each is None else f"{each.cpu:.0f}" for each in reached),
                ", ".join("-" if each is None else str(each.updates) for each in reached),
                *curve,
                f"{statistics.fmean(run.output['updates'][-1]['explained_variance'] for run in own):.2f}",
                disturbance(own),
            ]
        )
    headings = [
        "arm",
        "seconds",
        "CPU s",
        "CPU s of each seed",
        "updates",
        *(f"score at {place + 1}" for place in places),
        "EV last",
    ]
    above = f"{options.model}, {options.lengths} lengths, to score {options.until_score}, seeds {options.seeds}"
    return "\n".join([above, machine(options.threads), "", table([*headings, "disturbed"], rows)])


if __name__ == "__main__":
    sys.exit(main())
