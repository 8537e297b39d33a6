"""SFT and the reward model on rows of lognormal lengths: this project's stages, or TRL's stock trainers.

Both read the same token ids (ours from texts that encode to them), take as many rows a step and a forward pass, the
same learning rate and schedule. Run as a worker: `python -m benchmarks.supervised_local SPEC RESULT`.
"""

import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from benchmarks.common import clock, measure_peaks, read_spec, resident_peak, write_result
from benchmarks.stages import NEVER, run_stage
from benchmarks.workload import read_tokenizer
from data.chat import ChatEncoder, load_tokenizer
from data.rows import Demonstration, Preference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def rows(spec: Mapping[str, Any], encoder: ChatEncoder) -> list[dict[str, str]]:
    """Prompts and responses of random words; response lengths are lognormal with the spec's median and sigma."""
    chance = random.Random(spec["seed"])
    special = set(encoder.tokenizer.all_special_ids)
    words = [token for token in range(3, len(encoder.tokenizer)) if token not in special]

    def text(most: int) -> str:
        length = min(max(round(chance.lognormvariate(spec["log_median"], spec["log_sigma"])), 2), most)
        return encoder.tokenizer.decode([chance.choice(words) for _ in range(length)]).strip() or "a"

    names = ("prompt", "response") if spec["stage"] == "sft" else ("prompt", "chosen", "rejected")
    most = spec["max_length"] // 4
    return [{name: text(most) for name in names} for _ in range(spec["batch"] * spec["steps"])]


def measure_ours(spec: Mapping[str, Any]) -> list[dict[str, float]]:
    """The steps of the stage, as its metrics tell them."""
    folder, stage = Path.cwd() / "run", spec["stage"]
    folder.mkdir(exist_ok=True)
    encoder = ChatEncoder(load_tokenizer(spec["model"]), max_length=spec["max_length"])
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(spec, encoder)), encoding="utf-8")
    section = {
        "data": [{"path": str(data)}],
        "holdout": 0.0,
        "max_steps": spec["steps"],
        "batch_size": spec["batch"],
        "microbatch_size": spec["microbatch"],
        "learning_rate": spec["learning_rate"],
        "schedule": "constant",
        "warmup": 0.0,
    } | ({"centering": 0.0} if stage == "rm" else {})
    config = {
        "base_model": spec["model"],
        "seed": spec["seed"],
        "dtype": spec["arm"]["dtype"],
        "threads": spec["threads"],
        "max_length": spec["max_length"],
        "trackers": [],
        "checkpoint_every": NEVER,
        "tuning": {"method": spec["arm"]["tuning"], "rank": spec["rank"], "alpha": 2 * spec["rank"]},
        stage: section,
    }
    recorder = run_stage(stage, config, folder)
    tokens = [0.0, *(row["tokens"] for row in recorder.rows)]
    return [
        {"total": row["wall_s"], "cpu": row["cpu_s"], "tokens": after - before, "loss": row["loss"]}
        for row, before, after in zip(recorder.rows, tokens, tokens[1:], strict=False)
    ]


class StepTimer(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next, of a transformers Trainer."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._before = (0.0, 0.0)

    def on_train_begin(self, *args: Any, **rest: Any) -> None:
        """The first step begins."""
        self._before = (clock(), time.process_time())

    def on_step_end(self, *args: Any, **rest: Any) -> None:
        """The optimizer has stepped."""
        now = (clock(), time.process_time())
        self.steps.append({"total": now[0] - self._before[0], "cpu": now[1] - self._before[1]})
        self._before = now

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **rest: Any) -> None:
        """The step's loss."""
        if logs and "loss" in logs:
            self.steps[-1]["loss"] = float(logs["loss"])


def trl_rows(spec: Mapping[str, Any]) -> tuple[Dataset, list[int]]:
    """The rows as token ids in TRL's columns, and each row's real tokens."""
    encoder = ChatEncoder(load_tokenizer(spec["model"]), max_length=spec["max_length"])
    if spec["stage"] == "sft":
        made = [encoder.demonstration(Demonstration(row["prompt"], row["response"], "")) for row in rows(spec, encoder)]
        masks = [list(map(int, each.loss_mask)) for each in made]
        columns = {"input_ids": [each.tokens for each in made], "completion_mask": masks}
        return Dataset.from_dict(columns), [len(each.tokens) for each in made]
    pairs = [
        encoder.preference(Preference(row["prompt"], row["chosen"], row["rejected"], "")) for row in rows(spec, encoder)
    ]
    columns = {"chosen_ids": [pair.chosen for pair in pairs], "rejected_ids": [pair.rejected for pair in pairs]}
    return Dataset.from_dict(columns), [len(pair.chosen) + len(pair.rejected) for pair in pairs]


def measure_trl(spec: Mapping[str, Any]) -> list[dict[str, float]]:
    """The steps of SFTTrainer or RewardTrainer on the same rows in the order they stand in."""
    arm, is_sft = spec["arm"], spec["stage"] == "sft"
    dataset, lengths = trl_rows(spec)
    options = {
        "output_dir": str(Path.cwd() / "trl"),
        "max_steps": spec["steps"],
        "per_device_train_batch_size": spec["microbatch"],
        "gradient_accumulation_steps": spec["batch"] // spec["microbatch"],
        "learning_rate": spec["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "bf16": arm["dtype"] == "bfloat16",
        "gradient_checkpointing": arm["checkpointing"],
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": spec["max_length"],
        "seed": spec["seed"],
        "use_cpu": not torch.cuda.is_available(),
    }
    task = "CAUSAL_LM" if is_sft else "SEQ_CLS"
    tuning = LoraConfig(
        r=spec["rank"],
        lora_alpha=2 * spec["rank"],
        target_modules="all-linear",
        task_type=task,
        modules_to_save=None if is_sft else ["score"],
    )
    loader = AutoModelForCausalLM if is_sft else AutoModelForSequenceClassification
    weights = DTYPES["bfloat16" if arm["bf16_weights"] else "float32"]
    model = loader.from_pretrained(spec["model"], dtype=weights, **({} if is_sft else {"num_labels": 1}))
    timer = StepTimer()
    trainer = (trl.SFTTrainer if is_sft else trl.RewardTrainer)(
        model=model,
        args=(trl.SFTConfig if is_sft else trl.RewardConfig)(
            **options, **({"completion_only_loss": True} if is_sft else {"center_rewards_coefficient": None})
        ),
        train_dataset=dataset,
        processing_class=read_tokenizer(Path(spec["model"])),
        peft_config=tuning if arm["tuning"] == "lora" else None,
        callbacks=[timer],
    )
    trainer.train()
    batch = spec["batch"]
    tokens = [float(sum(lengths[start : start + batch])) for start in range(0, len(lengths), batch)]
    return [step | {"tokens": count} for step, count in zip(timer.steps, tokens, strict=True)]


def measure(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Steps, memory and the machine's peaks."""
    torch.set_num_threads(spec["threads"])
    libraries = resident_peak()
    began = clock()
    steps = (measure_ours if spec["arm"]["contestant"] == "ours" else measure_trl)(spec)
    return {
        "updates": steps,
        "seconds": clock() - began,
        "peak_bytes": resident_peak(),
        "libraries_bytes": libraries,
        "peaks": measure_peaks(),
    }


if __name__ == "__main__":
    write_result(measure(read_spec()))
