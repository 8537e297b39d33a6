"""This project's PPO on the shared workload: the public stage, timed by what it reports of itself.

Run as a worker: `python -m benchmarks.ppo_ours SPEC RESULT`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, clock, measure_peaks, read_spec, resident_peak, write_result
from benchmarks.stages import NEVER, run_stage


def config(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The run's config: what the spec fixes for both contestants; everything else keeps its default."""
    folder, tuning, arm = Path(spec["folder"]), spec["tuning"], spec["arm"]
    reward = {"model": str(folder / ("reward" if tuning == "lora" else "reward-full"))}
    if spec["reward"] == "function":
        reward = {"function": f"{ROOT / 'benchmarks' / 'text_reward.py'}:score"}
    return {
        "base_model": str(folder / "policy"),
        "seed": spec["seed"],
        "dtype": arm["dtype"],
        "threads": spec["threads"],
        "max_length": spec["max_length"],
        "trackers": [],
        "checkpoint_every": NEVER,
        "tuning": {"method": tuning, "rank": spec["rank"], "alpha": 2 * spec["rank"]},
        "ppo": {
            "prompts": [{"path": str(folder / "prompts.jsonl")}],
            "holdout": 0.0,
            "reward": reward,
            # One update more than is measured: the last one also evaluates and saves.
            "updates": spec["updates"] + 1,
            "rollout_batch_size": spec["batch"],
            "samples_per_prompt": arm["samples"],
            "minibatch_size": spec["minibatch"],
            "epochs": spec["epochs"],
            "response_length": spec["response_length"],
            "critic": arm["critic"],
            "learning_rate": spec["learning_rate"],
            "max_grad_norm": None,  # TRL clips none, whatever it is told
            "kl": {"coef": spec["kl_coef"]},
            "eval_every": NEVER,
            "eval_prompts": 1,
        },
    }


def records(rows: Sequence[Mapping[str, float]], batch: int, samples: int) -> list[dict[str, float]]:
    """The updates in the words that both contestants share; a prompt of several `samples` counts once."""
    updates: list[dict[str, float]] = []
    tokens_before = 0.0
    for row in rows:
        response = row["response/length_mean"] * batch
        phases = {"rollout": row["time/rollout_s"], "scoring": row["time/score_s"], "update": row["time/update_s"]}
        updates.append(
            {
                **phases,
                "other": row["seconds"] - sum(phases.values()),
                "total": row["seconds"],
                "cpu": row["cpu_s"],
                "prompt_tokens": (row["tokens"] - tokens_before - response) / samples,
                "response_tokens": response,
                "score": row["score/mean"],
                "explained_variance": row["value/explained_variance"],
                "kl": row["kl/ref_mean"],
                "eos_fraction": row["response/eos_fraction"],
            }
        )
        tokens_before = row["tokens"]
    return updates


def measure(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the stage in the worker's folder; its updates, memory and the machine's peaks."""
    torch.set_num_threads(spec["threads"])
    libraries = resident_peak()
    began = clock()
    recorder = run_stage("ppo", config(spec), Path.cwd() / "run")
    return {
        "updates": records(recorder.rows[:-1], spec["batch"], spec["arm"]["samples"]),
        "seconds": clock() - began,
        "peak_bytes": resident_peak(),
        "libraries_bytes": libraries,
        "peaks": measure_peaks(),
    }


if __name__ == "__main__":
    write_result(measure(read_spec()))
