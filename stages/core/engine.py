"""The training engine: backward passes and optimizer steps of one optimizer, whatever number of ranks takes part.

Every rank makes passes over its own rows; a step sums their gradients over all ranks. A loss is therefore a sum over
rows divided by what the whole batch weighs, never by what a rank's part does. Adam's moments are told and taken by
parameter name and in full, so a checkpoint fits any number of ranks and any strategy.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"
GroupT = TypeVar("GroupT")


@dataclass(frozen=True)
class Training:
    """What trains: the modules, their parameters that train by a stable name, the optimizer that was made of them."""

    modules: Sequence[nn.Module]
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    max_grad_norm: float | None  # None: no bound
    read_directly: Sequence[nn.Parameter] = ()  # parameters that are read by others than their own module


class Engine(Protocol):
    """Backward passes, then a step; every method is for all ranks alike."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """torch's optimizer: its groups' learning rates are those of the next step."""
        ...

    def passes(self, count: int) -> int:
        """How many passes a rank that needs `count` must make: as many as all the others, where that matters."""
        ...

    def backward(self, compute: Callable[[], Tensor], kind: str = "") -> Tensor:
        """The loss that `compute` gives, detached; its gradients are added to those of the passes before.

        Passes of one `kind` run the same modules in the same order.
        """
        ...

    def discard(self) -> None:
        """Forgets the gradients of all passes since the last step."""
        ...

    def step(self, idle: Sequence[int] = ()) -> float:
        """One optimizer step; the norm of the gradient, summed over ranks, before clipping.

        Where the norm is not finite no step is made. The parameter groups `idle` do not take part: none of their
        parameters had a gradient in any step so far.
        """
        ...

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """While it is open every parameter is whole on every rank, and the models may be run outside a pass."""
        ...

    def rewriting(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
        """While it is open these may be given new values, the same on every rank. Before the first step only."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """Adam's state on the CPU: `NAME/exp_avg`, `NAME/exp_avg_sq` and `NAME/step` of each parameter that has one."""
        ...

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Takes over what `moments` gave; to be called before the first step."""
        ...

    def close(self) -> None:
        """Gives the models back as they are, whole."""
        ...


def passes(engine: Engine, groups: Sequence[GroupT], spare: GroupT) -> Iterator[tuple[GroupT, bool]]:
    """This rank's groups of rows, each with True; then `spare` with False, for passes that only others need.

    A spare pass's loss is to be weighed by 0.
    """
    needed = engine.passes(len(groups))  # asked before the first pass, in which ranks may meet
    yield from ((group, True) for group in groups)
    yield from ((spare, False) for _ in range(needed - len(groups)))


def adam_state(parameter: Tensor, group: Mapping[str, Any], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What torch's Adam keeps of a parameter, from `values` of its shape; fused steps count on the device."""
    step_device = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
    state = {STEP: values[STEP].to(device=step_device, dtype=torch.float32, copy=True)}
    return state | {key: values[key].to(device=parameter.device, dtype=parameter.dtype, copy=True) for key in MOMENTS}
