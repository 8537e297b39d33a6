"""Side-by-side measurements; run from the project's root as `python -m benchmarks.ppo`, `.rollout` or `.sft_rm`."""
