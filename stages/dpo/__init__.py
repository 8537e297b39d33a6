"""Reads preference pairs and a policy or base model; writes a policy, trained without a reward model and rollouts.

Direct preference optimisation (Rafailov et al. 2023, 2305.18290) is the other way from preferences to a policy: one
stage in place of rm and ppo. It runs where the config has a `dpo:` section, and starts from the sft stage's policy:

    sft -> dpo -> eval          sections sft, dpo, eval
    sft -> rm -> dpo -> eval    the same with rm: eval scores both policies with the reward model
    sft -> rm -> ppo -> eval    and dpo beside it, where both sections stand: eval compares sft, dpo and ppo

`launch run` has no other rule for it: every section runs, dpo before ppo. `ppo.policy: stage:dpo` puts ppo after dpo.

LoRA: the reference is a frozen copy of the adapter that the policy started from (of a fresh one, whose output is zero,
where there was none), on the same base in memory. Full fine-tuning: a frozen copy of the whole model.
"""
