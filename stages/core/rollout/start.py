"""Starts the engine that a config comes to."""

import os
from collections.abc import Callable
from pathlib import Path

from data.errors import UserError
from stages.core.rollout.choice import Choice
from stages.core.rollout.config import EngineConfig
from stages.core.rollout.main_engine import MainEngine
from stages.core.rollout.native import NativeEngine
from stages.core.rollout.policy_files import Dtype, PolicyFiles
from stages.core.rollout.protocol import RolloutEngine
from stages.core.rollout.vllm import VllmEngine
from stages.core.rollout.vllm_servers import VllmOptions
from stages.core.trunk import Trunk

FOLDER = "engine"  # in a stage's folder: what servers were handed and what they say
MOST_AT_ONCE = 256  # responses that a server decodes at a time


def start_engine(
    choice: Choice,
    config: EngineConfig,
    native: NativeEngine,
    files: Callable[[], PolicyFiles],
    *,
    max_length: int,
    responses: int,
    folder: Path,
) -> RolloutEngine:
    """`native`, or an engine of rank 0's that is handed `files`, for up to `responses` at once; close it.

    Servers started here log to `folder`, and read the policy's weights there. Raises UserError where the choice has
    problems, or a server does not start.
    """
    if choice.problems:
        raise UserError(*choice.problems)
    if choice.engine == "native":
        return native
    options = vllm_options(config, max_length=max_length, responses=responses)
    return MainEngine.start(lambda: VllmEngine.start(files(), options, folder))


def vllm_options(config: EngineConfig, *, max_length: int, responses: int) -> VllmOptions:
    """A config's keys as the engine takes them."""
    return VllmOptions(
        max_length=max_length,
        batch_size=min(responses, MOST_AT_ONCE),
        timeout_s=config.timeout_s,
        server_count=config.server_count,
        urls=tuple(config.servers),
        token=os.environ.get(config.token_env) if config.token_env else None,
        python=config.vllm_python,
        memory_share=config.gpu_memory_share,
        devices=tuple(config.devices),
        sleep=config.sleep,
    )


def computing_dtype(trunk: Trunk) -> Dtype:
    """What a trunk multiplies in: a server that is to agree with it must do the same."""
    return "bfloat16" if trunk.autocast or trunk.model.dtype.itemsize == 2 else "float32"
