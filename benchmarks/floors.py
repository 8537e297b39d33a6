"""The least time that one PPO update can take: FLOP and bytes of an algorithm, from the tokens that were real.

`CHEAPEST` is the denominator for everybody: one LoRA trunk for policy and critic, values read while decoding, no
padding, each base weight read once a decoding step. With N trunk parameters and T real tokens it costs, head and
attention aside, N x T times 2 for the rollout, 4 for reference and reward model, 4 an epoch. A critic with a trunk of
its own adds 2 to the scoring, and 4 an epoch, or 6 where all its weights train.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Shape:
    """What the formulas need to know of a model."""

    trunk: int  # N: parameters of the blocks' linear layers
    head: int  # V x d
    lora: int  # parameters of one adapter
    layers: int
    hidden: int
    kv_width: int  # key and value heads x head size


@dataclass(frozen=True)
class Tokens:
    """The real tokens of one update."""

    prompt: float
    response: float
    sequences: int
    epochs: int

    @property
    def total(self) -> float:
        """T."""
        return self.prompt + self.response

    @property
    def length(self) -> float:
        """Mean tokens of prompt and response: the sum of squares over sequences is at least T x this."""
        return self.total / self.sequences


@dataclass(frozen=True)
class Algorithm:
    """What trains."""

    policy: Literal["lora", "full"]
    critic: Literal["shared", "lora", "full"]  # on the policy's trunk, or by its own: an adapter, all weights


CHEAPEST = Algorithm(policy="lora", critic="shared")


def phase_floors(
    shape: Shape, tokens: Tokens, peaks: Mapping[str, float], dtype: str, algorithm: Algorithm = CHEAPEST
) -> dict[str, float]:
    """Seconds that rollout, scoring and update cannot go below at the measured peaks of `dtype`."""
    attention = 2 * shape.layers * shape.hidden * tokens.length * tokens.total  # causal
    trunk, head = 2 * shape.trunk * tokens.total, 2 * shape.head * tokens.response
    forward = trunk + attention
    # Forward, towards the input, and for the weights where they train; an adapter on frozen ones is trained itself.
    trained = {
        "lora": 2 * trunk + 6 * shape.lora * tokens.total + 3 * attention,
        "full": 3 * trunk + 3 * attention,
        "shared": 0.0,  # read from the policy's
    }
    update = trained[algorithm.policy] + trained[algorithm.critic] + (3 if algorithm.policy == "full" else 2) * head
    scored = 2 if algorithm.critic == "shared" else 3  # reference, reward model, values
    flop = {"rollout": forward + head, "scoring": scored * forward + head, "update": tokens.epochs * update}
    floors = {phase: count / peaks[dtype] for phase, count in flop.items()}
    floors["rollout"] = max(floors["rollout"], _decode_bytes(shape, tokens, dtype) / peaks["copy"])
    return floors


def _decode_bytes(shape: Shape, tokens: Tokens, dtype: str) -> float:
    """Weights once a step, for the fewest steps (every sequence at work in each), and the cache behind each token."""
    size = 2 if dtype == "bfloat16" else 4
    steps = tokens.response / tokens.sequences
    cached = tokens.prompt / tokens.sequences + steps / 2
    cache = 2 * shape.layers * shape.kv_width * cached * tokens.response
    return size * (steps * (shape.trunk + shape.head) + cache)
