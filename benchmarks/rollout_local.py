"""Rollouts of one LoRA policy by the engines of PPO, or by `transformers.generate` on a padded batch.

Run as a worker: `python -m benchmarks.rollout_local SPEC RESULT`. Legend: B prompts, S prompt and response.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.common import clock, measure_peaks, read_spec, resident_peak, write_result
from benchmarks.workload import read_prompts, read_tokenizer
from pipeline.config import validate
from stages.core.bank import BankBuilder, PolicyBank
from stages.core.rollout.native import NativeEngine
from stages.core.rollout.policy_files import policy_files
from stages.core.rollout.protocol import RolloutEngine, Sampling
from stages.core.rollout.vllm import VllmEngine, VllmOptions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Rollout = Callable[[int], list[int]]
"""A seed -> the length of each response."""


@contextmanager
def native(spec: Mapping[str, Any], prompts: list[list[int]]) -> Iterator[Rollout]:
    """The engine that PPO uses, on the bank that PPO builds; it gives log-probabilities with the tokens."""
    policy = _bank(spec).policy
    yield _by_engine(spec, prompts, NativeEngine(policy.trunk, policy.adapter))


@contextmanager
def vllm_server(spec: Mapping[str, Any], prompts: list[list[int]]) -> Iterator[Rollout]:
    """A server as PPO starts one; each rollout begins with handing the adapter over."""
    policy = policy_files(_bank(spec), spec["arm"]["dtype"])
    options = VllmOptions(spec["max_length"], batch_size=len(prompts), python=spec["vllm_python"])
    with tempfile.TemporaryDirectory() as folder, VllmEngine.start(policy, options, Path(folder)) as engine:
        yield _by_engine(spec, prompts, engine)


def _bank(spec: Mapping[str, Any]) -> PolicyBank:
    folder = Path(spec["folder"])
    tuning = {"method": "lora", "rank": spec["rank"], "alpha": 2 * spec["rank"]}
    shared = validate({"base_model": str(folder / "policy"), "dtype": spec["arm"]["dtype"], "tuning": tuning}, [folder])
    return BankBuilder(shared).policy_bank(str(folder / "policy-lora"), shared.tuning, 1.0)


def _by_engine(spec: Mapping[str, Any], prompts: list[list[int]], engine: RolloutEngine) -> Rollout:
    ends = (read_tokenizer(Path(spec["folder"]) / "policy").eos_token_id,)
    sampling = Sampling(spec["response_length"], 1.0, ends)

    def rollout(seed: int) -> list[int]:
        engine.sync(seed + 1)
        seeds = [[seed * len(prompts) + place] for place in range(len(prompts))]
        return [len(own[0].tokens) for own in engine.generate(prompts, sampling, seeds)]

    return rollout


@contextmanager
def transformers_generate(spec: Mapping[str, Any], prompts: list[list[int]]) -> Iterator[Rollout]:
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

    yield rollout


ENGINES = {"native": native, "vllm-server": vllm_server, "transformers": transformers_generate}


def measure(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds and tokens of each rollout, memory, and the machine's peaks."""
    torch.set_num_threads(spec["threads"])
    libraries = resident_peak()
    prompts = [row["tokens"] for row in read_prompts(Path(spec["folder"]))]
    updates: list[dict[str, float]] = []
    with ENGINES[spec["arm"]["engine"]](spec, prompts) as rollout:
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
