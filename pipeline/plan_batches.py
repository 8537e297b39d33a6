"""Batch arithmetic, spelled out: which numbers make which, and how many optimizer steps they come to."""

import math

from stages.core.supervised_config import SupervisedSection
from stages.ppo.config import PpoConfig


def supervised_arithmetic(section: SupervisedSection, train_rows: int | None, ranks: int = 1) -> list[str]:
    """The lines for sft, rm and dpo; without row counts where the rows are not known yet."""
    rows = math.ceil(section.batch_size / ranks)
    at_once = min(section.microbatch_size, rows)
    lines = [
        f"batch {section.batch_size} = {'at most ' if section.batch_size % ranks else ''}{at_once} rows per device "
        f"x {math.ceil(rows / at_once)} accumulation x {_count(ranks, 'rank', 'ranks')}"
    ]
    if section.max_steps is not None:
        lines.append(f"{section.max_steps} optimizer steps (max_steps), {section.max_steps * section.batch_size} rows")
    elif train_rows is None:
        lines.append(f"{_count(section.epochs, 'epoch', 'epochs')}; steps depend on the rows")
    else:
        steps = math.ceil(round(train_rows * section.epochs) / section.batch_size)
        lines.append(
            f"{train_rows} rows / {section.batch_size} = {train_rows / section.batch_size:.1f} steps per epoch; "
            f"x {_count(section.epochs, 'epoch', 'epochs')} = {steps} optimizer steps"
        )
    return lines


def ppo_arithmetic(section: PpoConfig, ranks: int = 1) -> list[str]:
    """The lines for ppo."""
    prompts = section.prompts_per_update
    minibatches = section.minibatches
    per_update = minibatches * section.epochs
    lines = [
        f"{section.rollout_batch_size} responses per update = {prompts} prompts "
        f"x {_count(section.samples_per_prompt, 'sample', 'samples')}, on {_count(ranks, 'rank', 'ranks')}",
        f"{section.rollout_batch_size} responses / {section.minibatch_size} per minibatch "
        f"= {_count(minibatches, 'minibatch', 'minibatches')}; "
        f"x {_count(section.epochs, 'epoch', 'epochs')} = {per_update} optimizer steps per update",
        f"{section.updates} updates = {section.updates * section.rollout_batch_size} episodes, "
        f"{section.updates * per_update} optimizer steps",
        f"at most {section.response_length} new tokens a response, {section.microbatch_tokens} tokens a forward pass",
    ]
    if section.ptx is not None:
        lines.append(f"ptx: {section.ptx.batch_size} demonstrations in every optimizer step of the policy")
    return lines


def _count(number: float, one: str, many: str) -> str:
    return f"{number:g} {one if number == 1 else many}"
