"""A stage's memory by role, from configs alone."""

from pathlib import Path

from data.artifacts import MANIFEST
from pipeline.engines import stage_engine
from pipeline.inputs import Run, stage_inputs
from pipeline.model_files import model_config
from pipeline.plan_data import tokenizer_place
from stages.core.config import Tuning
from stages.core.memory import (
    BYTES,
    CHUNK_LOGITS,
    ModelShape,
    Training,
    base_bytes,
    model_shape,
    trained_parameters,
    training_bytes,
)
from stages.ppo.config import PpoConfig

_ROLLOUT_BATCH = 256  # responses the native engine decodes at once


def memory_estimate(run: Run, stage: str, longest: int) -> dict[str, int] | str:
    """ "role: part" -> bytes, or in words why no estimate can be made; `longest` row in tokens, 0 where unknown."""
    if stage == "label" and not stage_inputs(run, stage):
        return "no model is loaded"
    shape = _shape(run, stage)
    if isinstance(shape, str):
        return shape
    config = run.config
    tuning = getattr(getattr(config, stage), "tuning", None) or config.tuning
    if stage == "ppo" and config.ppo is not None:
        return _ppo(run, config.ppo, shape, tuning)
    if (section := config.supervised(stage)) is not None:
        tokens = section.rows_per_pass * min(longest or config.max_length, config.max_length)
        tokens *= 1 if stage == "sft" else 2  # both sides of a pair
        most = {"rm": 0, "sft": tokens * shape.vocabulary, "dpo": CHUNK_LOGITS}[stage]  # sft holds all at once
        logits = min(tokens * shape.vocabulary, most)
        parts = training_bytes(shape, Training(tuning, config.dtype, tokens, logits))
        role = "reward model" if stage == "rm" else "policy"
        sizes = {f"{role}: {part}": size for part, size in parts.items()}
        if stage == "dpo":  # a copy of the adapter, or of the whole model in float32
            sizes["reference: weights"] = 4 * trained_parameters(shape, tuning)
        return sizes
    if stage == "label" and config.label is not None:
        asked = config.label.max_prompts or _ROLLOUT_BATCH
    else:
        assert config.eval is not None
        asked = config.eval.max_prompts
    weights = {"one policy at a time: weights": base_bytes(shape, tuning, config.dtype)}
    engine = stage_engine(run, stage)
    if engine is not None and engine.engine != "native":
        return weights  # the rollout's is in a process of its own
    kv_tokens = min(asked, _ROLLOUT_BATCH) * config.max_length
    return weights | {"one policy at a time: KV cache": shape.kv_cache_bytes(kv_tokens, BYTES[config.dtype])}


def _ppo(run: Run, section: PpoConfig, shape: ModelShape, tuning: Tuning) -> dict[str, int]:
    """The bank of policy, value and reference on one base, the rewards beside it, and the rollout."""
    config = run.config
    tokens = section.microbatch_tokens
    logits = min(tokens * shape.vocabulary, CHUNK_LOGITS)
    policy = training_bytes(shape, Training(tuning, config.dtype, tokens, logits))
    sizes = {f"policy: {part}": size for part, size in policy.items()}
    sizes["reference: weights"] = 0 if tuning.method == "lora" else shape.parameters * BYTES[config.dtype]
    trained = trained_parameters(shape, tuning)
    if section.has_critic and section.critic == "model":
        sizes["value: weights"] = base_bytes(shape, tuning, config.dtype)
    if section.has_critic and section.critic != "shared":
        sizes["value: adapters"] = 4 * trained if tuning.method == "lora" else 0
        sizes["value: gradients and optimizer"] = 12 * trained
        sizes["value: activations"] = policy["activations"]
    for role, source in stage_inputs(run, "ppo").items():
        if role.startswith("reward") and ":" not in source:
            sizes[f"{role}: weights"] = _reward_bytes(run, source, shape, tuning)
    engine = stage_engine(run, "ppo")
    if engine is not None and engine.engine != "native":
        return sizes  # the rollout's is in a process of its own
    if tuning.method == "lora" and config.dtype == "float32":
        sizes["rollout: weights with the adapter folded in"] = (
            4 * shape.layers * sum(inputs * outputs for inputs, outputs in shape.linear_shapes)
        )
    responses = min(section.rollout_batch_size, _ROLLOUT_BATCH)
    sizes["rollout: KV cache"] = shape.kv_cache_bytes(responses * config.max_length, BYTES[config.dtype])
    return sizes


def _reward_bytes(run: Run, source: str, shape: ModelShape, tuning: Tuning) -> int:
    """A reward model's weights: only an adapter where this run trains it on the base that the policy has."""
    own = run.config.rm.tuning or run.config.tuning if run.config.rm is not None else run.config.tuning
    if Path(source) == run.stage_folder("rm") and own.method == tuning.method == "lora":
        return 4 * shape.lora_parameters(own.rank)
    reward = _shape_of(run, source)
    return (shape if isinstance(reward, str) else reward).parameters * BYTES[run.config.dtype]


def _shape(run: Run, stage: str) -> ModelShape | str:
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
