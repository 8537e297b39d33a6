"""How long one step or update would take on a given device and number of ranks, by phase, and what they would send."""

import math
from dataclasses import dataclass

from pipeline.inputs import Run
from stages.core.config import Tuning
from stages.core.memory import BYTES, GRADIENT_BYTES, ZERO_LIVE, ModelShape, base_bytes, trained_parameters
from stages.core.speed import (
    Machine,
    decode_seconds,
    pass_flops,
    passes_of_training,
    sent_bytes,
    step_traffic,
)
from stages.core.supervised_config import SupervisedSection
from stages.ppo.config import PpoConfig

_ANSWERED = 0.75  # of response_length, the mean response where none is known


@dataclass(frozen=True)
class Seconds:
    """One optimizer step (sft, rm, dpo) or update (ppo): seconds by phase, bytes that each rank sends."""

    unit: str
    phases: dict[str, float]
    sent_bytes: float

    @property
    def total(self) -> float:
        """All phases."""
        return sum(self.phases.values())


@dataclass(frozen=True)
class Work:
    """What the time of a stage depends on beside the machine."""

    shape: ModelShape
    tuning: Tuning
    checkpointing: bool
    mean_tokens: float  # of a row, or of a prompt


def stage_work(run: Run, stage: str, shape: ModelShape, mean_tokens: float) -> Work:
    """The work of a training stage; `mean_tokens` 0: half of max_length."""
    tuning: Tuning = getattr(getattr(run.config, stage), "tuning", None) or run.config.tuning
    return Work(shape, tuning, run.config.gradient_checkpointing, mean_tokens or run.config.max_length / 2)


def stage_seconds(run: Run, stage: str, work: Work, machine: Machine) -> Seconds | None:
    """The estimate of a training stage; None for the others."""
    if (section := run.config.supervised(stage)) is not None:
        return supervised_seconds(section, stage, work, machine)
    if stage == "ppo" and run.config.ppo is not None:
        return ppo_seconds(run.config.ppo, work, machine)
    return None


def supervised_seconds(section: SupervisedSection, stage: str, work: Work, machine: Machine) -> Seconds:
    """One optimizer step of sft, rm or dpo, as the slowest rank takes it."""
    ranks = machine.spread.ranks
    rows = math.ceil(section.batch_size / ranks)
    tokens = rows * work.mean_tokens * (1 if stage == "sft" else 2)  # both sides of a pair
    head = 0.0 if stage == "rm" else tokens
    forward = pass_flops(work.shape, tokens, work.mean_tokens, head_tokens=head)
    worth = passes_of_training(full=work.tuning.method == "full", checkpointing=work.checkpointing)
    worth += 1 if stage == "dpo" else 0  # the reference's pass
    passes = math.ceil(rows / section.rows_per_pass)
    traffic, sent = _traffic(work, machine, passes)
    return Seconds("step", {"compute": machine.compute_seconds(worth * forward), "communication": traffic}, sent)


def ppo_seconds(section: PpoConfig, work: Work, machine: Machine) -> Seconds:
    """One update of PPO, as the slowest rank takes it: rollout by the trainer or by vLLM with the same device.

    Samples of one prompt are taken to stand on one rank, in one minibatch and pass, as far as these hold them.
    """
    ranks, shape = machine.spread.ranks, work.shape
    response, prompt = _ANSWERED * section.response_length, work.mean_tokens
    length = prompt + response
    prompts, responses, tokens = _read(section, section.rollout_batch_size, ranks, prompt, response)
    _, rows, minibatch = _read(section, section.minibatch_size, ranks, prompt, response)
    steps = section.epochs * section.minibatches
    forward = pass_flops(shape, tokens, length, head_tokens=responses * response)
    trained = steps * pass_flops(shape, minibatch, length, head_tokens=rows * response)
    has_trunk = section.has_critic and section.critic != "shared"
    models = sum(reward.function is None for reward in section.rewards)
    scoring = 1 + models + (1 if has_trunk else 0)  # reference, rewards, values
    worth = passes_of_training(full=work.tuning.method == "full", checkpointing=work.checkpointing)
    trained_models = 2 if has_trunk else 1
    per_minibatch = math.ceil(minibatch / section.microbatch_tokens)
    traffic, sent = _traffic(work, machine, per_minibatch * trained_models, trained_models)
    rollout = decode_seconds(shape, machine, prompts=prompts, responses=responses, prompt=prompt, response=response)
    # For rollout and scoring together.
    gathered = _weight_bytes(work, machine) if machine.spread.stage == 3 else 0.0
    phases = {
        "rollout": rollout + machine.gather_seconds(gathered),
        "scoring": machine.compute_seconds(scoring * forward),
        "update": machine.compute_seconds(worth * trained_models * trained),
        "communication": steps * traffic,
    }
    return Seconds("update", phases, steps * sent + sent_bytes(gathered, machine.spread))


def _read(section: PpoConfig, rows: int, ranks: int, prompt: float, response: float) -> tuple[int, int, float]:
    """Of `rows` responses, one rank's prompts, responses and tokens of both."""
    responses = math.ceil(rows / ranks)
    prompts = math.ceil(responses / section.samples_per_prompt)
    return prompts, responses, prompts * prompt + responses * response


def _traffic(work: Work, machine: Machine, passes: float, models: int = 1) -> tuple[float, float]:
    """Seconds and sent bytes of one optimizer step's collectives."""
    trained, weights = models * trained_parameters(work.shape, work.tuning), _weight_bytes(work, machine)
    live = ZERO_LIVE * (BYTES[machine.dtype] if work.tuning.method == "lora" else GRADIENT_BYTES)
    size = step_traffic(trained * GRADIENT_BYTES, weights, passes, machine.spread, live_bytes=live)
    seconds = machine.gather_seconds(size) + machine.offload_seconds(trained, weights, passes)
    return seconds, sent_bytes(size, machine.spread)


def _weight_bytes(work: Work, machine: Machine) -> float:
    """One model's weights as they are kept, and so travel, its adapter included."""
    adapter = work.shape.lora_parameters(work.tuning.rank) * GRADIENT_BYTES if work.tuning.method == "lora" else 0
    return base_bytes(work.shape, work.tuning, machine.dtype) + adapter
