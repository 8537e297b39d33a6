"""The training engine: backward passes and optimizer steps of one optimizer, whatever number of ranks takes part.

Every rank makes passes over its own rows; a step sums their gradients over all ranks. A loss is therefore a sum over
rows divided by what the whole batch weighs, never by what a rank's part does. Adam's moments are told and taken by
parameter name and in full, so a checkpoint fits any number of ranks and any strategy.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from stages.core import ranks
from stages.core.config import Distributed

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"
GroupT = TypeVar("GroupT")
BUCKET_BYTES = 64 * 2**20  # gradients that are summed over the ranks at a time


@dataclass(frozen=True)
class Training:
    """What trains: the modules, their parameters that train by a stable name, the optimizer that was made of them."""

    modules: Sequence[nn.Module]
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    max_grad_norm: float
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

    def backward(self, compute: Callable[[], Tensor]) -> Tensor:
        """The loss that `compute` gives, detached; its gradients are added to those of the passes before."""
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

    def moments(self) -> dict[str, Tensor]:
        """Adam's state on the CPU: `NAME/exp_avg`, `NAME/exp_avg_sq` and `NAME/step` of each parameter that has one."""
        ...

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Takes over what `moments` gave; to be called before the first step."""
        ...

    def close(self) -> None:
        """Gives the models back as they are, whole."""
        ...


def open_engine(training: Training, distributed: Distributed) -> Engine:
    """The engine of the config's strategy. The models hold the weights to begin with."""
    if not distributed.is_zero:
        return PlainEngine(training)
    from stages.core.zero import ZeroEngine

    return ZeroEngine(training, distributed)


def passes(engine: Engine, groups: Sequence[GroupT], spare: GroupT) -> Iterator[tuple[GroupT, bool]]:
    """This rank's groups of rows, each with True; then `spare` with False, for passes that only others need.

    A spare pass's loss is to be weighed by 0.
    """
    needed = engine.passes(len(groups))  # asked before the first pass, in which ranks may meet
    yield from ((group, True) for group in groups)
    yield from ((spare, False) for _ in range(needed - len(groups)))


class PlainEngine:
    """Every rank holds all parameters, gradients and moments; at the step the gradients are summed."""

    def __init__(self, training: Training) -> None:
        self.training = training

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one that was given."""
        return self.training.optimizer

    def passes(self, count: int) -> int:
        """As many as its rows need: ranks meet at the step only."""
        return count

    def backward(self, compute: Callable[[], Tensor]) -> Tensor:
        """The loss; gradients stay on this rank."""
        loss = compute()
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    def discard(self) -> None:
        """Forgets the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, idle: Sequence[int] = ()) -> float:
        """Sums over the ranks, clips, and steps. torch leaves out what has no gradient."""
        groups = [group for place, group in enumerate(self.optimizer.param_groups) if place not in idle]
        parameters = [each for group in groups for each in group["params"]]
        _sum_gradients(parameters)
        gradients = [each.grad for each in parameters if each.grad is not None]
        norm = get_total_norm(gradients)
        if torch.isfinite(norm):
            clip_grad_norm_(parameters, self.training.max_grad_norm)
            self.optimizer.step()
        return float(norm)

    @contextlib.contextmanager
    def gathered(self) -> Generator[None]:
        """They always are."""
        yield

    def moments(self) -> dict[str, Tensor]:
        """Adam's state; the same on every rank."""
        state = self.optimizer.state
        return {
            f"{name}/{key}": state[parameter][key].detach().cpu().clone()
            for name, parameter in self.training.parameters.items()
            if parameter in state
            for key in (*MOMENTS, STEP)
        }

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Each parameter's state, where it has one."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state.pop(parameter, None)
        places = {id(each): group for group in self.optimizer.param_groups for each in group["params"]}
        for name, parameter in self.training.parameters.items():
            if f"{name}/{STEP}" in moments:
                self.optimizer.state[parameter] = adam_state(
                    parameter, places[id(parameter)], {key: moments[f"{name}/{key}"] for key in (*MOMENTS, STEP)}
                )

    def close(self) -> None:
        """Nothing to give back."""


def adam_state(parameter: Tensor, group: Mapping[str, Any], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What torch's Adam keeps of a parameter, from `values` of its shape; fused steps count on the device."""
    step_device = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
    state = {STEP: values[STEP].to(device=step_device, dtype=torch.float32, copy=True)}
    return state | {key: values[key].to(device=parameter.device, dtype=parameter.dtype, copy=True) for key in MOMENTS}


def _sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sums the gradients over all ranks, in place.

    A parameter without one on every rank keeps none; where any rank has one, no gradient counts as zero.
    """
    if not ranks.current().are_many:
        return
    device = parameters[0].device
    present = ranks.sum_over_ranks(torch.tensor([float(each.grad is not None) for each in parameters], device=device))
    bucket: list[Tensor] = []
    for parameter, has_gradient in zip(parameters, present.tolist(), strict=True):
        if not has_gradient:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(each.nbytes for each in bucket) >= BUCKET_BYTES:
            _sum_bucket(bucket)
            bucket = []
    _sum_bucket(bucket)


def _sum_bucket(gradients: Sequence[Tensor]) -> None:
    if not gradients:
        return
    flat = ranks.sum_over_ranks(torch.cat([each.flatten() for each in gradients]))
    for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
