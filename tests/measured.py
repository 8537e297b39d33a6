"""The peak memory of a rank, measured in real launches: what the estimates of a plan are held against."""

import json
from dataclasses import replace
from pathlib import Path

import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import load_config
from pipeline.inputs import Run
from pipeline.plan_memory import memory_estimate, peak_bytes
from stages.core.memory import Spread
from tests.launches import launch
from tests.tiny import tiny_tokenizer

SIZES = {"tiny": (32, 2), "34M": (512, 10), "103M": (768, 14)}  # hidden size, layers
LONGEST = 48


def make_model(folder: Path, name: str) -> Path:
    """A config of full fine-tuning of a random Llama of a size, which takes nearly all memory for its weights."""
    hidden, layers = SIZES[name]
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    folder.mkdir(parents=True)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"the cat sat {row}", "response": "on the red mat " * 4} for row in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = {"data": [{"path": str(folder / "rows.jsonl")}], "max_steps": 3, "batch_size": 2, "microbatch_size": 1}
    sft |= {"holdout": 0.0}
    run = {"base_model": str(folder / "model"), "max_length": 64, "trackers": [], "threads": 1, "checkpoint_every": 9}
    run |= {"tuning": {"method": "full"}, "sft": sft}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def measured_bytes(config: Path, strategy: str) -> float:
    """The peak of rank 0 of two after the second step, before anything is saved."""
    out = config.parent / strategy
    freed = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system, and is not counted
    process = launch("sft", config, "--out", out, "--gpus", "2", f"distributed.strategy={strategy}", **freed)
    _, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr
    rows = [json.loads(line) for line in (out / "sft" / "metrics.jsonl").read_text().splitlines()]
    return rows[1]["memory/peak_bytes"]


def estimated_bytes(config: Path, strategy: str) -> int:
    """What a plan says of it."""
    loaded = load_config(str(config))
    run = Run(loaded.config, loaded.folder, config.parent / "out")
    sizes = memory_estimate(run, "sft", LONGEST, replace(Spread(), strategy=strategy, ranks=2, ranks_per_node=2))
    assert not isinstance(sizes, str), sizes
    return peak_bytes(sizes)
