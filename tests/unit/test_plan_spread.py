"""What one device holds and how long a step takes, by hand; and what a plan says of the choices."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import validate
from pipeline.inputs import Run
from pipeline.plan_choices import LADDER, Choice, Place, cheapest, stage_choices
from pipeline.plan_memory import memory_estimate, peak_bytes
from pipeline.plan_time import Work, ppo_seconds, supervised_seconds
from stages.core.config import Tuning
from stages.core.memory import Spread, model_shape, share_bytes
from stages.core.speed import (
    DEVICES,
    Device,
    Machine,
    decode_seconds,
    pass_flops,
    passes_of_training,
    sent_bytes,
    step_traffic,
)
from stages.ppo.config import PpoConfig
from stages.sft.config import SftConfig

# One block of hidden 4, feed-forward 8, 2 heads: 64 + 96 weights in its linear layers; vocabulary 10.
TINY = {
    "model_type": "llama",
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 10,
    "tie_word_embeddings": True,
}
SHAPE = model_shape(TINY)
# Used shares taken out: 0.4 of arithmetic, 0.6 of memory bandwidth, 0.7 of links.
PLAIN = Device(80e9, {"float32": 1 / 0.4, "bfloat16": 1 / 0.4}, 1 / 0.6, 1 / 0.7)


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "optimizer"),
    [("ddp", 100, 100, 200), ("zero1", 100, 100, 50), ("zero2", 100, 25, 50), ("zero3", 25, 25, 50)],
)
def test_each_stage_of_zero_shares_more(strategy: str, weights: int, gradients: int, optimizer: int) -> None:
    spread = Spread(strategy, ranks=4, ranks_per_node=4)
    found = [
        share_bytes(part, size, spread) for part, size in [("weights", 100), ("gradients", 100), ("optimizer", 200)]
    ]
    assert found == [weights, gradients, optimizer]
    assert share_bytes("activations", 100, spread) == 100
    assert share_bytes("optimizer", 200, replace(spread, offload="optimizer")) == 0


def test_a_share_is_rounded_up() -> None:
    assert share_bytes("optimizer", 10, Spread("zero1", ranks=4)) == 3


def test_policy_and_critic_take_turns_and_so_do_rollout_and_training() -> None:
    sizes = {"policy: weights": 100, "policy: activations": 30, "policy: logits": 5, "value: activations": 20}
    assert peak_bytes(sizes | {"rollout: KV cache": 10}) == 135
    assert peak_bytes(sizes | {"rollout: KV cache": 70}) == 170
    # what ZeRO-3 gathers for a pass is gone in the rollout
    assert peak_bytes(sizes | {"zero: gathered weights": 40, "rollout: KV cache": 70}) == 175
    assert peak_bytes(sizes | {"loading: whole weights": 300}) == 300


def test_operations_of_a_pass() -> None:
    # 160 weights and, over half of 6 tokens, two products of width 4: (160 + 24 / 2) x 2 a token; the head 2 x 40
    assert pass_flops(SHAPE, 3, 6) == 3 * 2 * (160 + 24)
    assert pass_flops(SHAPE, 3, 6, head_tokens=2) == 3 * 2 * (160 + 24) + 2 * 2 * 40


@pytest.mark.parametrize(("full", "checkpointing", "worth"), [(True, False, 3), (False, False, 2), (True, True, 4)])
def test_what_a_training_pass_is_worth(full: bool, checkpointing: bool, worth: float) -> None:
    assert passes_of_training(full=full, checkpointing=checkpointing) == worth


def test_a_gather_is_bound_by_the_slower_link() -> None:
    one = Machine(PLAIN, Spread("zero3", ranks=8, ranks_per_node=8), "float32")
    assert one.gather_seconds(16.0) == pytest.approx(16 * 7 / 8)
    fast = replace(PLAIN, link=1e30)
    four = Machine(fast, Spread("zero3", ranks=32, ranks_per_node=8), "float32")
    assert four.gather_seconds(50e9 * 0.7) == pytest.approx(3 / 4)
    assert Machine(PLAIN, Spread(), "float32").gather_seconds(16.0) == 0
    assert sent_bytes(16.0, one.spread) == 14


def test_decoding_reads_all_weights_for_every_token() -> None:
    machine = Machine(replace(PLAIN, flops={"float32": 1e30}), Spread(), "float32")
    weights, cache = 4 * (SHAPE.trunk_parameters + 40), 2 * 4 * 4 * (5 + 3 / 2)
    seconds = decode_seconds(SHAPE, machine, prompts=1, responses=1, prompt=5, response=3)
    assert seconds == pytest.approx(3 * (weights + cache + 1e-3 / 32))


def test_a_supervised_step_by_hand() -> None:
    section = SftConfig.model_validate({"data": [{"path": "x"}], "batch_size": 8, "microbatch_size": 2})
    work = Work(SHAPE, Tuning(method="full"), False, 6)
    machine = Machine(PLAIN, Spread("ddp", ranks=2, ranks_per_node=2), "float32")
    found = supervised_seconds(section, "sft", work, machine)
    assert found.phases["compute"] == pytest.approx(3 * pass_flops(SHAPE, 24, 6, head_tokens=24))
    # 212 float32 gradients: a reduce-scatter and a gather of half of them
    assert found.sent_bytes == pytest.approx(2 * 4 * 212 / 2)
    assert found.phases["communication"] == pytest.approx(4 * 212)
    zero2 = supervised_seconds(section, "sft", work, replace(machine, spread=replace(machine.spread, strategy="zero2")))
    # the same, and what each rank stepped goes to the other
    assert zero2.sent_bytes == pytest.approx(3 * 4 * 212 / 2)
    zero3 = supervised_seconds(section, "sft", work, replace(machine, spread=replace(machine.spread, strategy="zero3")))
    # gradients are reduced; 4 rows of a rank in 2 passes: so small a model's weights are gathered once in each
    assert zero3.sent_bytes == pytest.approx((1 + 2) * 4 * 212 / 2)


@pytest.mark.parametrize(("samples", "prompts", "minibatch_prompts"), [(1, 8, 4), (4, 2, 1), (8, 1, 1)])
def test_an_update_of_ppo_by_hand(samples: int, prompts: int, minibatch_prompts: int) -> None:
    """Half of 16 responses of 3 tokens (three quarters of 4), and of minibatches of 8; prompts of 5 are read once."""
    section = PpoConfig.model_validate(
        {"prompts": [{"path": "x"}], "reward": {"model": "x"}, "response_length": 4, "epochs": 2}
        | {"rollout_batch_size": 16, "minibatch_size": 8, "samples_per_prompt": samples, "critic": "adapter"}
    )
    work = Work(SHAPE, Tuning(), False, 5)
    machine = Machine(PLAIN, Spread("ddp", ranks=2, ranks_per_node=2), "float32")
    found = ppo_seconds(section, work, machine).phases
    forward = pass_flops(SHAPE, prompts * 5 + 8 * 3, 8, head_tokens=8 * 3)
    assert found["scoring"] == pytest.approx(3 * forward)  # reward model, reference, critic
    trained = pass_flops(SHAPE, minibatch_prompts * 5 + 4 * 3, 8, head_tokens=4 * 3)
    assert found["update"] == pytest.approx(2 * 2 * 2 * 2 * trained)  # epochs, minibatches, models, passes of each
    more = decode_seconds(SHAPE, machine, prompts=prompts, responses=8, prompt=5, response=3)
    assert found["rollout"] == pytest.approx(more)
    read = more - decode_seconds(SHAPE, machine, prompts=0, responses=8, prompt=5, response=3)
    assert read == pytest.approx(pass_flops(SHAPE, prompts * 5, 5))


def test_zero_3_gathers_again_what_it_does_not_keep() -> None:
    spread = Spread("zero3", ranks=2, ranks_per_node=2)
    assert step_traffic(10.0, 1000.0, 3, spread) == 10 + 3 * 2 * 1000
    assert step_traffic(10.0, 1000.0, 3, spread, live_bytes=300.0) == 10 + 3 * (1000 + 700)
    assert step_traffic(10.0, 1000.0, 3, spread, live_bytes=4000.0) == 10 + 3 * 1000
    assert step_traffic(10.0, 1000.0, 3, Spread("zero3")) == 0


def run(folder: Path, base: str, **more: Any) -> Run:
    rows = [{"path": str(folder / "rows.jsonl")}]
    tree = {"base_model": base, "dtype": "bfloat16", "tuning": {"method": "full"}, "sft": {"data": rows}, **more}
    return Run(validate(tree, []), folder, folder / "out")


@pytest.mark.parametrize(
    ("base", "ranks", "strategy"),
    [
        ("Qwen/Qwen2.5-0.5B", 1, "none"),
        ("meta-llama/Llama-3.1-8B", 8, "zero2"),  # zero1: 32 GB of weights, 32 of gradients, 8 + 8 of the rest
        ("Qwen/Qwen2.5-14B", 8, "zero3"),  # 59 GB of weights, which fit once, with nothing beside them
        ("meta-llama/Llama-3.1-70B", 32, None),  # 282 GB of them do not
    ],
)
def test_the_cheapest_strategy_that_fits(tmp_path: Path, base: str, ranks: int, strategy: str | None) -> None:
    place = Place([8] * (ranks // 8) or [1], "h100-80gb")
    small = {"sft": {"data": [{"path": "x"}], "microbatch_size": 1}, "gradient_checkpointing": True}
    choices = stage_choices(run(tmp_path, base, **small), "sft", (512, 256), place)
    best = cheapest(choices)
    assert (best.strategy if best is not None else None) == strategy
    assert [(choice.strategy, choice.offload) for choice in choices] == (
        LADDER and list(LADDER) if ranks > 1 else [("none", "none")]
    )
    assert all(choice.bytes > 80e9 - 1.5e9 for choice in choices if not choice.fits)


def test_where_nothing_fits_there_is_no_cheapest() -> None:
    assert cheapest([Choice("zero3", "parameters", 10**12, False, 1.0)]) is None


def test_every_device_has_both_dtypes() -> None:
    assert all(set(device.flops) == {"float32", "bfloat16"} for device in DEVICES.values())


def test_ranks_share_the_batch_too(tmp_path: Path) -> None:
    one = memory_estimate(run(tmp_path, "Qwen/Qwen2.5-0.5B"), "sft", 512)
    many = memory_estimate(run(tmp_path, "Qwen/Qwen2.5-0.5B"), "sft", 512, Spread("ddp", ranks=16, ranks_per_node=8))
    assert isinstance(one, dict)
    assert isinstance(many, dict)
    assert one["policy: activations"] == 4 * many["policy: activations"]  # 8 rows a pass; 2 of the 32
    assert one["policy: weights"] == many["policy: weights"]
