"""Rollouts of one LoRA policy by the native engine, or by `transformers.generate` on a padded batch.

Run as a worker: `python -m benchmarks.rollout_local SPEC RESULT`. Legend: B prompts, S prompt and response.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.common import clock, measure_peaks, read_spec, resident_peak, write_result
from benchmarks.workload import read_prompts, read_tokenizer
from pipeline.config import validate
from stages.core.bank import BankBuilder
from stages.core.rollout.native import NativeEngine
from stages.core.rollout.protocol import Sampling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Rollout = Callable[[int], list[int]]
"""A seed -> the length of each response."""


def native(spec: Mapping[str, Any], prompts: list[list[int]]) -> Rollout:
    """The engine that PPO uses, on the bank that PPO builds; it gives log-probabilities with the tokens."""
    folder = Path(spec["folder"])
    tuning = {"method": "lora", "rank": spec["rank"], "alpha": 2 * spec["rank"]}
    shared = validate({"base_model": str(folder / "policy"), "dtype": spec["arm"]["dtype"], "tuning": tuning}, [folder])
    policy = BankBuilder(shared).policy_bank(str(folder / "policy-lora"), shared.tuning, 1.0).policy
    engine = NativeEngine(policy.trunk, policy.adapter)
    sampling = Sampling(spec["response_length"], 1.0, (read_tokenizer(folder / "policy").eos_token_id,))

    def rollout(seed: int) -> list[int]:
        seeds = [[seed * len(prompts) + place] for place in range(len(prompts))]
        return [len(own[0].tokens) for own in engine.generate(prompts, sampling, seeds)]

    return rollout


def transformers_generate(spec: Mapping[str, Any], prompts: list[list[int]]) -> Rollout:
    """The usual way: left-padded prompts; with `logprobs` also the sampled tokens' log-probabilities, as PPO needs."""
    folder, arm = Path(spec["folder"]), spec["arm"]
    tokenizer = read_tokenizer(folder / "policy")
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=DTYPES[arm["dtype"]])
    model = PeftModel.from_pretrained(model, folder / "policy-lora")
    if arm["merged"]:
        model = model.merge_and_unload()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(device)
    width = batch["input_ids"].shape[1]

    @torch.no_grad()
    def rollout(seed: int) -> list[int]:
        torch.manual_seed(seed)
        output = model.generate(
            **batch,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=spec["response_length"],
            return_dict_in_generate=True,
            output_scores=arm["logprobs"],
        )
        if arm["logprobs"]:
            model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
        ended_BR = (output.sequences[:, width:] == tokenizer.eos_token_id).cumsum(1)
        return ((ended_BR == 0).sum(1) + (ended_BR[:, -1] > 0)).tolist()

    return rollout


ENGINES = {"native": native, "transformers": transformers_generate}


def measure(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds and tokens of each rollout, memory, and the machine's peaks."""
    torch.set_num_threads(spec["threads"])
    libraries = resident_peak()
    prompts = [row["tokens"] for row in read_prompts(Path(spec["folder"]))]
    rollout = ENGINES[spec["arm"]["engine"]](spec, prompts)
    updates: list[dict[str, float]] = []
    for seed in range(spec["rollouts"]):
        began, cpu = clock(), time.process_time()
        lengths = rollout(seed)
        updates.append(
            {
                "total": clock() - began,
                "cpu": time.process_time() - cpu,
                "prompt_tokens": sum(map(len, prompts)),
                "response_tokens": sum(lengths),
                "longest": max(lengths),
            }
        )
    peak = resident_peak()
    return {"updates": updates, "peak_bytes": peak, "libraries_bytes": libraries, "peaks": measure_peaks()}


if __name__ == "__main__":
    write_result(measure(read_spec()))
