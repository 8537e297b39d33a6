"""One process and two ranks side by side: time by phase and bytes that each rank sends; and what more would bring.

    python -m benchmarks.scaling --strategies ddp zero2 zero3 [--tuning full] [--json scaling.json]

PPO of the quickstart. The traffic is counted by the kernel: each run has a network namespace to itself (needs root),
and what two updates more send is divided by two. Beside it stands what the formulas of a plan say. The second table
is computed by the same formulas, with the assumptions printed below it.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.config import load_config
from pipeline.inputs import Run
from pipeline.plan_choices import Place, stage_time
from pipeline.plan_memory import stage_shape
from pipeline.plan_time import ppo_seconds, stage_work
from stages.core.memory import Spread
from stages.core.speed import ASSUMPTIONS, DEVICES, Machine

BATCH = ("ppo.rollout_batch_size=16", "ppo.minibatch_size=8", "ppo.holdout=0.01")
SMALL = ("toy.pretrain_steps=50", "sft.max_steps=4", "rm.max_steps=4", "threads=1", "ppo.eval_every=100", *BATCH)
PHASES = ("rollout", "score", "update")
FEW, MORE = 2, 4  # updates of the two runs whose traffic is compared
GPUS = (8, 64, 512)
LARGE = (  # what the second table is computed for
    ("LoRA, ddp", "ddp", ()),
    ("all weights, zero2", "zero2", ("tuning.method=full", "ppo.critic=shared")),
)


def prepared(folder: Path, tuning: str) -> Path:
    """A run folder with the quickstart's sft and reward model, from a few steps."""
    options = [*SMALL, f"tuning.method={tuning}", "ppo.updates=1", "eval.max_prompts=4"]
    _launch(["run", "quickstart", "--out", str(folder), *options])
    shutil.rmtree(folder / "ppo")
    return folder


def _launch(arguments: list[str]) -> int:
    """Bytes that a launch sent over its own loopback device."""
    counter = "awk '/lo:/ {print $10}' /proc/self/net/dev"  # of this namespace; /sys shows another's
    script = f'ip link set lo up && "$@" >&2; status=$?; {counter}; exit $status'
    command = ["unshare", "--net", "sh", "-c", script, "sh", sys.executable, "-m", "launch", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def measured(base: Path, ranks: int, strategy: str, tuning: str) -> dict[str, float]:
    """Median seconds of each phase, and bytes that one rank sends in an update."""
    sent: list[int] = []
    rows: list[dict[str, Any]] = []
    for updates in (FEW, MORE):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            shutil.copytree(base, out)
            options = [*SMALL, f"tuning.method={tuning}", f"ppo.updates={updates}"]
            options += [f"distributed.strategy={strategy}", "--gpus", str(ranks)]
            sent.append(_launch(["ppo", "quickstart", "--out", str(out), *options]))
            rows = [json.loads(line) for line in (out / "ppo" / "metrics.jsonl").read_text().splitlines()]
    figures = {phase: statistics.median(row[f"time/{phase}_s"] for row in rows[1:]) for phase in PHASES}
    return figures | {"sent": (sent[1] - sent[0]) / (MORE - FEW) / ranks}


def predicted_bytes(base: Path, ranks: int, strategy: str, tuning: str) -> float:
    """What the formulas say that one rank sends in an update."""
    loaded = load_config("quickstart", [*SMALL, f"tuning.method={tuning}"])
    run = Run(loaded.config, loaded.folder, base)
    shape = stage_shape(run, "ppo")
    assert not isinstance(shape, str), shape
    assert run.config.ppo is not None
    machine = Machine(DEVICES["h100-80gb"], Spread(strategy, ranks=ranks, ranks_per_node=ranks), "float32")
    return ppo_seconds(run.config.ppo, stage_work(run, "ppo", shape, 0), machine).sent_bytes


def print_measured(arms: list[dict[str, Any]]) -> None:
    """The first table."""
    print(f"{'ranks':<6}{'strategy':<10}" + "".join(f"{phase + ' s':>10}" for phase in PHASES) + "   MB sent  formula")
    for arm in arms:
        phases = "".join(f"{arm[phase]:>10.2f}" for phase in PHASES)
        print(f"{arm['ranks']:<6}{arm['strategy']:<10}{phases}{arm['sent'] / 1e6:>10.2f}{arm['formula'] / 1e6:>9.2f}")


def print_computed() -> None:
    """The second table: an 8B model's PPO with 16 responses a GPU and update."""
    print("\nllama-8b-8gpu on h100-80gb, 16 responses for each GPU, eight GPUs a machine, seconds of an update:")
    header = ("GPUs", "rollout", "scoring", "update", "communication", "together", "GB sent", "responses/s")
    print(f"{'':<20}" + "".join(f"{name:>15}" for name in header))
    for name, strategy, options in LARGE:
        for gpus in GPUS:
            sizes = (f"ppo.rollout_batch_size={16 * gpus}", f"ppo.minibatch_size={4 * gpus}")
            loaded = load_config("llama-8b-8gpu", [*options, *sizes])
            place = Place([8] * (gpus // 8), "h100-80gb")
            run = Run(loaded.config, loaded.folder, Path("runs/none"))
            found = stage_time(run, "ppo", 0, place, place.spread(strategy, "none"))
            assert found is not None
            values = [*found.phases.values(), found.total, found.sent_bytes / 1e9, 16 * gpus / found.total]
            print(f"{name:<20}{gpus:>15}" + "".join(f"{value:>15.2f}" for value in values))
    print(f"Assumptions: {ASSUMPTIONS}; prompts of half of max_length.")


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "zero2", "zero3"])
    parser.add_argument("--tuning", choices=["lora", "full"], default="lora")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    arms: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = prepared(Path(folder) / "base", options.tuning)
        for ranks, strategy in [(1, "ddp"), *((2, name) for name in options.strategies)]:
            figures = measured(base, ranks, strategy, options.tuning)
            formula = predicted_bytes(base, ranks, strategy, options.tuning)
            arms.append({"ranks": ranks, "strategy": strategy, **figures, "formula": formula})
    print_measured(arms)
    print_computed()
    if options.json is not None:
        options.json.write_text(json.dumps(arms, indent=2))


if __name__ == "__main__":
    main()
