"""Rollouts by a real vLLM server whose whole weights are replaced: fully trained policies, and merged adapters."""

import time
from collections.abc import Generator
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig

from stages.core.bank import PolicyBank, View
from stages.core.models import load_model
from stages.core.rollout.policy_files import policy_files
from stages.core.rollout.protocol import EngineError, Sampling
from stages.core.rollout.vllm import VllmEngine
from stages.core.trunk import Trunk
from tests.vllm import (
    TIMEOUT,
    answers,
    largest_difference,
    living,
    move,
    needs_vllm,
    processes_of,
    start_engine,
    tiny_bank,
    tiny_base,
)

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> PolicyBank:
    return tiny_bank(tiny_base(tmp_path_factory.mktemp("base")), "full")


@pytest.fixture(scope="module")
def engine(bank: PolicyBank, tmp_path_factory: pytest.TempPathFactory) -> Generator[VllmEngine]:
    with start_engine(bank, tmp_path_factory.mktemp("engine"), sleep=True) as engine:
        engine.sync(1)
        processes = processes_of(engine)
        yield engine
    assert living(processes) == []


def test_whole_weights_are_replaced(engine: VllmEngine, bank: PolicyBank):
    before = answers(engine)
    assert {completion.version for completion in before} == {1}
    worst = largest_difference(bank, before)
    print(f"largest difference to the trainer: {worst:.2e} nats")
    assert worst <= 1e-3
    move(bank, 2)
    assert answers(engine) == before
    engine.sync(2)
    after = answers(engine)
    assert {completion.version for completion in after} == {2}
    assert [completion.tokens for completion in after] != [completion.tokens for completion in before]
    assert largest_difference(bank, after) <= 1e-3


def test_a_prompt_seen_before_new_weights_is_computed_anew(engine: VllmEngine, bank: PolicyBank):
    """vLLM keeps what it computed of prompts; after new weights that would be another policy's."""
    prompt, seeds, sampling = [list(range(3, 43))], [[1, 2]], Sampling(4, 1.0, ())
    engine.sync(3)
    engine.generate(prompt, sampling, seeds)
    move(bank, 3)
    engine.sync(4)
    cached = engine.generate(prompt, sampling, seeds)
    engine.servers[0].client.post("/reset_prefix_cache")
    assert cached == engine.generate(prompt, sampling, seeds)


def test_an_adapter_that_vllm_cannot_serve_is_merged_into_a_copy(engine: VllmEngine, bank: PolicyBank):
    trunk = Trunk(load_model(bank.source, head="lm"), torch.device("cpu"))
    trunk.add_adapter("dora", LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"))
    dora = replace(bank, policy=View(trunk, "dora"))
    move(dora, 4)
    weight = trunk.backbone.layers[0].mlp.up_proj.base_layer.weight
    untouched = weight.clone()
    served, engine.policy = engine.policy, policy_files(dora, "float32")
    assert engine.policy.form == "full"
    try:
        engine.sync(5)
        completions = answers(engine)
        assert largest_difference(dora, completions) <= 1e-3
        assert largest_difference(bank, completions) > 0.01
    finally:
        engine.policy = served
    assert torch.equal(weight, untouched)


def test_a_server_with_another_version_than_the_engines_is_refused(engine: VllmEngine):
    """The last one here: it costs the server."""
    engine.sync(6)
    client = engine.servers[0].client
    client.post("/wake_up")
    client.post("/update_weight_version", {"new_version": "somebody-elses"})
    processes = processes_of(engine)
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"vllm-0: asked for weights .*-v6, and it has 'somebody-elses'"):
        answers(engine)
    assert time.monotonic() - began < TIMEOUT + 10
    assert living(processes) == []
    with pytest.raises(EngineError, match="vllm-0: asked for weights"):
        engine.sync(7)
