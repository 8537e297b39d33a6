"""What DeepSpeed is made to do: to learn the order of each kind of pass, and to step from new values of parameters."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stages.core.config import Distributed
from stages.core.engine import Training
from stages.core.engines import open_engine

ROUNDS = 3
WIDTH = 320  # layers of 100,000 weights and less DeepSpeed keeps whole


class Modules(nn.Module):
    """Two chains of layers with the first in common."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.policy, self.critic = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))


def gathers(kinds: tuple[str, str], answers: "multiprocessing.Queue[Any]") -> None:
    """How many parameters are gathered in each round of a policy's and a critic's pass, which are of these kinds."""
    modules = Modules()
    named = dict(modules.named_parameters())
    training = Training([modules], named, torch.optim.SGD(named.values(), lr=0.1), max_grad_norm=1.0)
    engine: Any = open_engine(training, Distributed(strategy="zero3"))
    counted: list[int] = []
    count = [0]

    def counting(original: Any) -> Any:
        def gather(params: Any, *arguments: Any, **options: Any) -> Any:
            count[0] += len(list(params))
            return original(params, *arguments, **options)

        return gather

    for parameter in named.values():
        parameter.all_gather_coalesced = counting(parameter.all_gather_coalesced)
    x = torch.ones(2, WIDTH)
    for _ in range(ROUNDS):
        count[0] = 0
        for module, kind in zip((modules.policy, modules.critic), kinds, strict=True):
            engine.backward(lambda module=module: module(modules.first(x)).sum(), kind)
        engine.step()
        counted.append(count[0])
    answers.put((counted, [each.is_complete_trace() for each in engine.coordinators.values()]))


def rewritten(strategy: str, answers: "multiprocessing.Queue[Any]") -> None:
    """The weights after they were tripled and then stepped by 0.1 along a gradient of 1, and what they were before."""
    module = nn.Linear(WIDTH, WIDTH, bias=False)
    before = module.weight.detach().clone()
    training = Training([module], {"weight": module.weight}, torch.optim.SGD([module.weight], lr=0.1), None)
    engine: Any = open_engine(training, Distributed(strategy=strategy))
    with engine.rewriting([module.weight]), torch.no_grad():
        module.weight.mul_(3)
    engine.backward(lambda: module(torch.eye(WIDTH)).sum())
    engine.step()
    engine.close()
    answers.put((module.weight.detach().tolist(), before.tolist()))


def in_a_process(target: Callable[..., None], argument: object) -> Any:
    """What the target puts into the queue that it gets as its last argument."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=target, args=(argument, answers))
    process.start()
    found = answers.get(timeout=120)
    process.join(120)
    assert process.exitcode == 0
    return found


@pytest.mark.slow
def test_passes_of_two_kinds_in_turns_gather_each_weight_once() -> None:
    counted, complete = in_a_process(gathers, ("policy", "value"))
    as_one, complete_as_one = in_a_process(gathers, ("", ""))
    assert complete == [True, True]
    assert complete_as_one == [False]
    # Two layers a pass: gathered for the forward pass, kept for the backward.
    assert counted[-1] == 2 * 2
    assert as_one[-1] > counted[-1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_a_step_goes_on_from_what_was_written(strategy: str) -> None:
    after, before = in_a_process(rewritten, strategy)
    torch.testing.assert_close(torch.tensor(after), 3 * torch.tensor(before) - 0.1)
