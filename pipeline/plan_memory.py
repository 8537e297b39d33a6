"""A stage's memory by role on one device, from configs alone."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from data.artifacts import MANIFEST
from pipeline.engines import stage_engine
from pipeline.inputs import Run, stage_inputs
from pipeline.model_files import model_config
from pipeline.plan_data import tokenizer_place
from stages.core.config import Tuning
from stages.core.memory import (
    ADAM_BYTES,
    BUCKET_BYTES,
    BYTES,
    CHUNK_LOGITS,
    GRADIENT_BYTES,
    ZERO_BUCKET,
    ZERO_LIVE,
    ModelShape,
    Spread,
    Training,
    base_bytes,
    model_shape,
    share_bytes,
    trained_parameters,
    training_bytes,
)
from stages.ppo.config import PpoConfig

_LOADING = "loading:"  # before anything else is held
_PASSING = (": activations", ": logits")  # held during a training pass only
_ROLLOUT_BATCH = 256  # responses the native engine decodes at once


def memory_estimate(run: Run, stage: str, longest: int, spread: Spread | None = None) -> dict[str, int] | str:
    """ "role: part" -> bytes on one device, or in words why no estimate can be made.

    `longest` row in tokens, 0 where unknown; `spread` over ranks, default one process.
    """
    if stage == "label" and not stage_inputs(run, stage):
        return "no model is loaded"
    shape = stage_shape(run, stage)
    if isinstance(shape, str):
        return shape
    spread = spread or Spread()
    if spread.stage == 3:  # there blocks run as transformers has them
        shape = replace(shape, written_out=False)
    sizes = _whole(run, stage, shape, longest, spread)
    shared = {name: share_bytes(name.partition(": ")[2], size, spread) for name, size in sizes.items()}
    return shared | _extras(run, stage, sizes, spread)


def peak_bytes(sizes: Mapping[str, int]) -> int:
    """The most that is held at once: what always is, and the larger of rollout and training.

    Policy and critic do not hold their activations at the same time.
    """
    passing = {name: size for name, size in sizes.items() if name.endswith(_PASSING)}
    roles = {name.partition(":")[0] for name in passing}
    training = [sum(size for name, size in passing.items() if name.startswith(f"{role}:")) for role in roles]
    rollout = sum(size for name, size in sizes.items() if name.startswith("rollout:"))
    loading = sum(size for name, size in sizes.items() if name.startswith(_LOADING))
    always = sum(sizes.values()) - sum(passing.values()) - rollout - loading
    buffers = sum(size for name, size in sizes.items() if name.startswith("zero: gathered"))
    return max(loading, always - buffers + max(rollout, max(training, default=0) + buffers))


def _whole(run: Run, stage: str, shape: ModelShape, longest: int, spread: Spread) -> dict[str, int]:
    """The parts, before ranks share any; batches are already a rank's own."""
    config = run.config
    tuning = getattr(getattr(config, stage), "tuning", None) or config.tuning
    if stage == "ppo" and config.ppo is not None:
        return _ppo(run, config.ppo, shape, tuning, spread)
    if (section := config.supervised(stage)) is not None:
        rows = min(section.rows_per_pass, math.ceil(section.batch_size / spread.ranks))
        tokens = rows * min(longest or config.max_length, config.max_length)
        tokens *= 1 if stage == "sft" else 2  # both sides of a pair
        most = {"rm": 0, "sft": tokens * shape.vocabulary, "dpo": CHUNK_LOGITS}[stage]  # sft holds all at once
        logits = min(tokens * shape.vocabulary, most)
        training = Training(tuning, config.dtype, tokens, logits, config.gradient_checkpointing)
        role = "reward model" if stage == "rm" else "policy"
        sizes = {f"{role}: {part}": size for part, size in training_bytes(shape, training).items()}
        if stage == "dpo":  # a copy of the adapter, or of the whole model in float32
            sizes["reference: weights"] = 4 * trained_parameters(shape, tuning)
        return sizes
    weights = {"one policy at a time: all weights": base_bytes(shape, tuning, config.dtype)}
    engine = stage_engine(run, stage)
    if engine is not None and engine.engine != "native":
        return weights  # the rollout's is in a process of its own
    if stage == "label" and config.label is not None:
        asked = config.label.max_prompts or _ROLLOUT_BATCH  # by one rank alone
    else:
        assert config.eval is not None
        asked = math.ceil(config.eval.max_prompts / spread.ranks)
    kv_tokens = min(asked, _ROLLOUT_BATCH) * config.max_length
    return weights | {"one policy at a time: KV cache": shape.kv_cache_bytes(kv_tokens, BYTES[config.dtype])}


def _ppo(run: Run, section: PpoConfig, shape: ModelShape, tuning: Tuning, spread: Spread) -> dict[str, int]:
    """The bank of policy, value and reference on one base, the rewards beside it, and the rollout."""
    config = run.config
    tokens = min(section.microbatch_tokens, math.ceil(section.minibatch_size / spread.ranks) * config.max_length)
    logits = min(tokens * shape.vocabulary, CHUNK_LOGITS)
    policy = training_bytes(shape, Training(tuning, config.dtype, tokens, logits, config.gradient_checkpointing))
    sizes = {f"policy: {part}": size for part, size in policy.items()}
    sizes["reference: weights"] = 0 if tuning.method == "lora" else shape.parameters * BYTES[config.dtype]
    trained = trained_parameters(shape, tuning)
    if section.has_critic and section.critic == "model":
        sizes["value: weights"] = base_bytes(shape, tuning, config.dtype)
    if section.has_critic and section.critic != "shared":
        sizes["value: adapters"] = 4 * trained if tuning.method == "lora" else 0
        sizes["value: gradients"] = GRADIENT_BYTES * trained
        sizes["value: optimizer"] = ADAM_BYTES * trained
        sizes["value: activations"] = policy["activations"]
    for role, source in stage_inputs(run, "ppo").items():
        if role.startswith("reward") and ":" not in source:
            sizes[f"{role}: all weights"] = _reward_bytes(run, source, shape, tuning)
    engine = stage_engine(run, "ppo")
    if engine is not None and engine.engine != "native":
        return sizes  # the rollout's is in a process of its own
    if tuning.method == "lora" and config.dtype == "float32":
        sizes["rollout: weights with the adapter folded in"] = (
            4 * shape.layers * sum(inputs * outputs for inputs, outputs in shape.linear_shapes)
        )
    responses = min(math.ceil(section.rollout_batch_size / spread.ranks), _ROLLOUT_BATCH)
    sizes["rollout: KV cache"] = shape.kv_cache_bytes(responses * config.max_length, BYTES[config.dtype])
    return sizes


def _extras(run: Run, stage: str, sizes: Mapping[str, int], spread: Spread) -> dict[str, int]:
    """What sharing costs beside: buffers of the collectives, and weights that are whole for a while."""
    if (spread.ranks == 1 and spread.stage == 0) or stage == "eval":
        return {}
    trained = sum(size for name, size in sizes.items() if name.endswith(": gradients"))
    if spread.stage == 0:
        return {"ranks: gradient bucket": min(BUCKET_BYTES, trained)}
    extras = {"zero: gradient buckets": min(2 * ZERO_BUCKET * GRADIENT_BYTES, trained)}
    # The step lays out its share of the gradients once more; stages 1 and 2 step a flat copy of the weights' share too.
    copies = 1 if spread.stage == 3 or spread.offload != "none" else 2
    extras["zero: flat copies"] = copies * -(-trained // spread.ranks)
    if spread.stage == 3:
        whole = sum(size for name, size in sizes.items() if name.endswith((": weights", ": adapters")))
        ahead = min(ZERO_BUCKET * GRADIENT_BYTES, whole)
        extras["zero: gathered weights"] = min(ZERO_LIVE * GRADIENT_BYTES, whole) + ahead
        # Every rank loads the whole model before it gives up what is not its share; PPO gathers it to sample and score.
        extras["rollout: gathered weights" if stage == "ppo" else f"{_LOADING} whole weights"] = whole
    return extras


def _reward_bytes(run: Run, source: str, shape: ModelShape, tuning: Tuning) -> int:
    """A reward model's weights: only an adapter where this run trains it on the base that the policy has."""
    own = run.config.rm.tuning or run.config.tuning if run.config.rm is not None else run.config.tuning
    if Path(source) == run.stage_folder("rm") and own.method == tuning.method == "lora":
        return 4 * shape.lora_parameters(own.rank)
    reward = _shape_of(run, source)
    return (shape if isinstance(reward, str) else reward).parameters * BYTES[run.config.dtype]


def stage_shape(run: Run, stage: str) -> ModelShape | str:
    """The dimensions of the model that a stage works on, or in words why they are not known."""
    place = tokenizer_place(run, stage)
    return "its model comes from stage toy, which is not built yet" if place is None else _shape_of(run, place)


def _shape_of(run: Run, source: str) -> ModelShape | str:
    config = model_config(source)
    if config is None:
        unbuilt = Path(source).parent == run.folder and not (Path(source) / MANIFEST).is_file()
        return f"{source} is not built yet" if unbuilt else f"the estimate needs config.json of {source}; download it"
    try:
        return model_shape(config)
    except KeyError as error:
        return f"config.json of {source} has no {error}, which the estimate needs"
