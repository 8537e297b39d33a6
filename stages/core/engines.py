"""The engines of a run's strategies: DeepSpeed's, and one without it that sums gradients over ranks."""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from stages.core import ranks
from stages.core.config import Distributed
from stages.core.engine import MOMENTS, STEP, Engine, Training, adam_state

BUCKET_BYTES = 64 * 2**20  # gradients that are summed over the ranks at a time


def open_engine(training: Training, distributed: Distributed) -> Engine:
    """The engine of the config's strategy. The models hold the weights to begin with."""
    if not distributed.is_zero:
        return PlainEngine(training)
    from stages.core.zero import ZeroEngine

    return ZeroEngine(training, distributed)


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

    def backward(self, compute: Callable[[], Tensor], kind: str = "") -> Tensor:
        """The loss; gradients stay on this rank, and every kind of pass is alike."""
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
            if self.training.max_grad_norm is not None:
                clip_grad_norm_(parameters, self.training.max_grad_norm)
            self.optimizer.step()
        return float(norm)

    @contextlib.contextmanager
    def gathered(self) -> Generator[None]:
        """They always are."""
        yield

    @contextlib.contextmanager
    def rewriting(self, parameters: Sequence[nn.Parameter]) -> Generator[None]:
        """They always may."""
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
