"""The same rollouts by vLLM, in an interpreter of its own; imports nothing of this project but the shared helpers.

The adapter is merged beforehand, which is vLLM's fastest way; the time to hand it new weights is not counted.
Run as a worker: `PYTHON -m benchmarks.rollout_vllm SPEC RESULT`.
"""

import json
import os
import time
from pathlib import Path

from benchmarks.common import clock, measure_peaks, read_spec, resident_peak, write_result

# In this process, with the threads that OMP_NUM_THREADS gives, and a cache that holds the batch.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def main() -> None:
    """Seconds and tokens of each rollout, memory, and the machine's peaks."""
    from vllm import LLM, SamplingParams

    spec = read_spec()
    libraries = resident_peak()
    folder = Path(spec["folder"])
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    engine = LLM(
        model=str(folder / "policy-merged"),
        dtype=spec["arm"]["dtype"],
        max_model_len=spec["max_length"],
        max_num_seqs=len(rows),
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    updates = []
    # No seed of a request's own: with the same one for all, all responses end together.
    sampling = SamplingParams(temperature=1.0, max_tokens=spec["response_length"], logprobs=0, detokenize=False)
    for _ in range(spec["rollouts"]):
        began, cpu = clock(), time.process_time()
        outputs = engine.generate([{"prompt_token_ids": row["tokens"]} for row in rows], sampling, use_tqdm=False)
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        updates.append(
            {
                "total": clock() - began,
                "cpu": time.process_time() - cpu,
                "prompt_tokens": sum(len(row["tokens"]) for row in rows),
                "response_tokens": sum(lengths),
                "longest": max(lengths),
            }
        )
    peak = resident_peak()
    write_result({"updates": updates, "peak_bytes": peak, "libraries_bytes": libraries, "peaks": measure_peaks()})


if __name__ == "__main__":
    main()
