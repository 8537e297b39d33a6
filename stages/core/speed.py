"""How long work takes on a device, from its data sheet: arithmetic, memory traffic and what ranks tell each other.

Formulas only, in seconds, bytes and floating-point operations. They are a guide to choose by, not a promise: each rests
on the assumptions below, which a plan prints.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from stages.core.memory import BYTES, ModelShape, Spread

MODEL_FLOPS_USED = 0.4  # of the peak, in training and scoring; PaLM reports 0.46 (Chowdhery et al. 2022, 2204.02311)
BANDWIDTH_USED = 0.6  # of the memory's, in decoding
NETWORK_USED = 0.7  # of links, in collectives
NODE_NETWORK = 50e9  # bytes a second and machine: 400 Gbit/s
HOST_LINK = 25e9  # bytes a second between a device and its machine's memory: PCIe 4 x16, in practice
HOST_BANDWIDTH = 150e9  # of the machine's memory
ADAM_TRAFFIC = 28  # bytes that a step of Adam moves for each parameter: weight, gradient and moments in, all but it out
STEP_SECONDS = 1e-3  # to start one decoding step of a block-wise model, per 32 blocks
ASSUMPTIONS = (
    f"{MODEL_FLOPS_USED:.0%} of peak arithmetic, {BANDWIDTH_USED:.0%} of memory bandwidth in decoding, "
    f"{NETWORK_USED:.0%} of links, {NODE_NETWORK / 1e9:.0f} GB/s between machines, responses of three quarters of "
    "response_length; nothing overlaps"
)


@dataclass(frozen=True)
class Device:
    """An accelerator's data sheet: bytes, dense operations a second, bytes a second."""

    memory: float
    flops: Mapping[str, float]  # by dtype
    bandwidth: float  # of its memory
    link: float  # to its neighbours on the same machine, one direction


# Vendor data sheets, dense figures (half of those quoted with sparsity). float32 runs as TF32 where there is it.
DEVICES: Mapping[str, Device] = {
    "a100-40gb": Device(40e9, {"bfloat16": 312e12, "float32": 156e12}, 1.555e12, 300e9),
    "a100-80gb": Device(80e9, {"bfloat16": 312e12, "float32": 156e12}, 2.039e12, 300e9),
    "h100-80gb": Device(80e9, {"bfloat16": 989e12, "float32": 494e12}, 3.35e12, 450e9),
    "h200-141gb": Device(141e9, {"bfloat16": 989e12, "float32": 494e12}, 4.8e12, 450e9),
    "l40s-48gb": Device(48e9, {"bfloat16": 362e12, "float32": 183e12}, 0.864e12, 32e9),
    "rtx4090-24gb": Device(24e9, {"bfloat16": 165e12, "float32": 82.6e12}, 1.008e12, 32e9),
}


@dataclass(frozen=True)
class Machine:
    """One kind of device, and how the ranks on it share the work."""

    device: Device
    spread: Spread
    dtype: str

    def compute_seconds(self, flops: float) -> float:
        """Arithmetic on one device."""
        return flops / (self.device.flops[self.dtype] * MODEL_FLOPS_USED)

    def read_seconds(self, size: float) -> float:
        """Reading from one device's memory."""
        return size / (self.device.bandwidth * BANDWIDTH_USED)

    def gather_seconds(self, size: float) -> float:
        """Until every rank has all of `size` bytes of which each holds its share; a reduce-scatter takes as long."""
        spread = self.spread
        if spread.ranks == 1:
            return 0.0
        local = min(spread.ranks, spread.ranks_per_node)
        inside = size * (local - 1) / local / (self.device.link * NETWORK_USED)
        between = size * (spread.nodes - 1) / spread.nodes / (NODE_NETWORK * NETWORK_USED)
        return max(inside, between)

    def offload_seconds(self, trained: float, weight_bytes: float, passes: float) -> float:
        """What offloading adds to an optimizer step: Adam on the machine's own memory, and the way there and back."""
        spread = self.spread
        if spread.offload == "none":
            return 0.0
        local = min(spread.ranks, spread.ranks_per_node)
        seconds = 2 * 4 * trained / spread.ranks / HOST_LINK + ADAM_TRAFFIC * trained / spread.nodes / HOST_BANDWIDTH
        if spread.offload == "parameters":
            seconds += 2 * passes * weight_bytes / local / HOST_LINK
        return seconds


def sent_bytes(size: float, spread: Spread) -> float:
    """What one rank sends in a ring gather of `size` bytes; an all-reduce is two of them (Patarasuk & Yuan 2009)."""
    return size * (spread.ranks - 1) / spread.ranks


def pass_flops(shape: ModelShape, tokens: float, length: float, *, head_tokens: float = 0.0) -> float:
    """Operations of one forward pass over `tokens` in sequences of `length`.

    Two for each weight of a linear layer and token (Kaplan et al. 2020, 2001.08361, sec. 2.1), attention's two products
    over half the length on average, and the head's on `head_tokens`.
    """
    linear = shape.layers * sum(inputs * outputs for inputs, outputs in shape.linear_shapes)
    attention = shape.layers * 2 * shape.query_width * length / 2
    head = shape.vocabulary * shape.hidden
    return 2 * (linear + attention) * tokens + 2 * head * head_tokens


def passes_of_training(*, full: bool, checkpointing: bool) -> float:
    """Forward passes that one training pass is worth.

    The backward pass takes two, or one where only adapters train: frozen weights have no gradient. Gradient
    checkpointing takes one more.
    """
    return 1 + (2 if full else 1) + (1 if checkpointing else 0)


def decode_seconds(
    shape: ModelShape, machine: Machine, *, prompts: float, responses: float, prompt: float, response: float
) -> float:
    """Sampling `responses` to `prompts` on one device; `prompt` and `response` are their mean lengths.

    Each prompt is read once, and each new token reads all weights once and the cache of every sequence.
    """
    if responses <= 0:
        return 0.0
    size = BYTES[machine.dtype]
    weights = machine.read_seconds((shape.trunk_parameters + shape.vocabulary * shape.hidden) * size)
    cache = machine.read_seconds(shape.kv_cache_bytes(1, size) * (prompt + response / 2) * responses)
    arithmetic = machine.compute_seconds(pass_flops(shape, responses, prompt + response / 2, head_tokens=responses))
    step = max(weights + cache, arithmetic) + STEP_SECONDS * shape.layers / 32
    return response * step + machine.compute_seconds(pass_flops(shape, prompts * prompt, prompt))


def step_traffic(
    trained_bytes: float, weight_bytes: float, passes: float, spread: Spread, *, live_bytes: float = 0.0
) -> float:
    """Bytes that all ranks gather, or reduce, which sends as much, in one optimizer step.

    The sum of all gradients on all ranks is a reduction and a gather. With ZeRO-1 and 2 ranks gather what each of them
    stepped; they could have done without the gather before, but DeepSpeed 0.19 sums all gradients everywhere first, so
    it sends half as much again as ddp (measured on two ranks: 9.16 MB against 6.09). ZeRO-3 only reduces them, and
    gathers the weights for every forward and every backward pass (Rajbhandari et al. 2020, 1910.02054, sec. 7), but for
    `live_bytes` of them that it keeps from the one to the other.
    """
    if spread.ranks == 1:
        return 0.0
    if spread.stage == 3:
        return trained_bytes + passes * (weight_bytes + max(weight_bytes - live_bytes, 0.0))
    return (2 if spread.stage == 0 else 3) * trained_bytes
