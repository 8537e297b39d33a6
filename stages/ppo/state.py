"""All of PPO's state between two updates: what a checkpoint holds and a resumed run starts from."""

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.core.bank import PolicyBank
from stages.ppo.control import KlController, ScoreShaper

WEIGHTS, MOMENTS, STATE, GENERATORS = "weights.safetensors", "moments.safetensors", "state.json", "generators.pt"
FIELDS = ("update", "cursor", "episodes", "tokens", "best", "last", "unlogged")


@dataclass
class PpoState:
    """Counters and controllers; weights and optimizer stand beside it in a checkpoint."""

    kl: KlController
    shaper: ScoreShaper
    update: int = 0  # updates done
    cursor: int = 0  # prompts consumed
    episodes: int = 0  # responses sampled for training
    tokens: int = 0  # prompt and response tokens of those
    best: dict[str, float] = field(default_factory=dict[str, float])  # the evaluation with the highest score so far
    last: dict[str, float] = field(default_factory=dict[str, float])  # figures of the latest update
    # Figures of an update that trained, but whose evaluation an engine's failure prevented; a resume goes on with it.
    unlogged: dict[str, float] = field(default_factory=dict[str, float])

    def save(self, folder: Path, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Writes everything into an empty folder; `weights` and `moments` of all that trains, whole, by name.

        The same files whatever the number of ranks and the strategy.
        """
        save_file(dict(weights), folder / WEIGHTS)
        save_file(dict(moments), folder / MOMENTS)
        torch.save({"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}, folder / GENERATORS)
        counters = {name: getattr(self, name) for name in FIELDS}
        scores = {name: value for name, value in asdict(self.shaper).items() if name != "config"}
        state = counters | {
            "kl_coef": self.kl.coef,
            "scores": scores,
            "python_generator": random.getstate(),
            "numpy_generator": _numpy_state(),
        }
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Restores the counters and controllers; the files were verified against the checkpoint's manifest."""
        generators = torch.load(folder / GENERATORS, weights_only=True)
        torch.set_rng_state(generators["torch"])
        torch.cuda.set_rng_state_all(generators["cuda"])
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        for name in FIELDS:
            setattr(self, name, state[name])
        self.kl.coef = state["kl_coef"]
        for name, value in state["scores"].items():
            setattr(self.shaper, name, value)
        version, internal, gauss = state["python_generator"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = state["numpy_generator"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def load_weights(folder: Path, bank: PolicyBank) -> None:
    """Puts a checkpoint's weights into the bank; to be done before an engine takes the bank over."""
    weights = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for name, parameter in bank.trained().items():
            parameter.copy_(weights[name])


def load_moments(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's optimizer state, as `Engine.load_moments` takes it."""
    return load_file(folder / MOMENTS)


def _numpy_state() -> list[Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return [name, np.asarray(keys).tolist(), *rest]
