"""Ranks among themselves, and what each has of the work."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from data.errors import UserError
from stages.core import ranks
from stages.core.engine import Training
from stages.core.engines import PlainEngine

TIMEOUT = 10.0


def of(rank: int, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as if it were that rank; nothing may be sent."""
    monkeypatch.setattr(ranks, "_current", ranks.Ranks(rank, world_size, rank))


@pytest.mark.parametrize(("count", "parts"), [(5, [[0, 1], [2, 3, 4]]), (1, [[], [0]]), (0, [[], []])])
def test_shares_are_consecutive_and_of_one_size(
    count: int, parts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[int]] = []
    for rank in range(2):
        of(rank, 2, monkeypatch)
        found.append(list(ranks.share(range(count))))
    assert found == parts


def test_balanced_shares_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes 5 1 4 1 1: 5 to the first, 4 to the second, 1 to the second (4 < 5), then 1 to the first (5 = 5), and the
    last to the second (5 < 6). Each keeps the order of the rows."""
    found: list[list[str]] = []
    for rank in range(2):
        of(rank, 2, monkeypatch)
        found.append(ranks.balanced_share(list("abcde"), [5, 1, 4, 1, 1]))
    assert found == [["a", "d"], ["b", "c", "e"]]


def test_one_process_has_everything() -> None:
    assert ranks.current() == ranks.Ranks(0, 1, 0)
    assert ranks.current().is_main
    assert list(ranks.share([3, 1, 2])) == [3, 1, 2]
    assert ranks.balanced_share([3, 1, 2], [1, 9, 4]) == [3, 1, 2]
    assert ranks.gather_lists([1]) == [1]
    assert ranks.from_main("x") == "x"
    assert ranks.on_main(lambda: 7) == 7
    assert ranks.sum_over_ranks(torch.ones(2)).tolist() == [1, 1]
    assert not ranks.any_rank(False)


def refuse() -> None:
    raise UserError("the first line", "the second")


def work_alone() -> tuple[ranks.Ranks, bool]:
    """Longer than the others' patience with one message; a rank that counts itself alone asks nobody."""
    time.sleep(TIMEOUT + 1)
    return ranks.current(), ranks.any_rank(False)


def one_step(rank: int) -> list[float]:
    """The gradient's norm and the parameters after a step: the loss is 2 w_0 on rank 0, 4 w_1 + 4 b on rank 1."""
    weight, bias = (torch.nn.Parameter(torch.zeros(size)) for size in (2, 1))
    named = {"weight": weight, "bias": bias}
    training = Training([], named, torch.optim.SGD(named.values(), lr=1.0), max_grad_norm=3.0)
    engine = PlainEngine(training)
    engine.backward(lambda: 4 * weight[1] + 4 * bias[0] if rank else 2 * weight[0])
    return [engine.step(), *weight.tolist(), *bias.tolist()]


def talk(rank: int, port: int, answers: "multiprocessing.SimpleQueue[Any]") -> None:
    """What one of two ranks hears."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    ranks.join(timeout_seconds=TIMEOUT)
    ranks.BEAT_SECONDS = 0.2

    def problems(call: Callable[[], object]) -> object:
        try:
            return call()
        except UserError as error:
            return tuple(error.problems)

    heard = {
        "lists": ranks.gather_lists(["a", "b"] if rank else []),
        "main": ranks.from_main(rank + 5),
        "sum": ranks.sum_over_ranks(torch.tensor([1.0, rank])).tolist(),
        "any": ranks.any_rank(rank == 1),
        "none": ranks.any_rank(False),
        "on_main": ranks.on_main(lambda: rank + 7),
        "refused": problems(lambda: ranks.on_main(refuse)),
        "step": one_step(rank),
        "together": problems(lambda: ranks.check_together(["row 3"] if rank else [])),
        "alone": ranks.alone(work_alone),
        "refused alone": problems(lambda: ranks.alone(refuse)),
        "after": ranks.current().rank,
    }
    ranks.barrier()
    ranks.leave()
    answers.put((rank, heard, ranks.current()))


@pytest.mark.slow
def test_two_ranks_hear_the_same() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    processes = [context.Process(target=talk, args=(rank, port, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    for _ in processes:
        rank, heard, after = answers.get()
        assert heard == {
            "lists": ["a", "b"],
            "main": 5,
            "sum": [2.0, 1.0],
            "any": True,
            "none": False,
            "on_main": 7,
            "refused": ("the first line", "the second"),
            # Gradients 2 and 4 of the weights and 4 of the bias: their norm is 6, clipped to 3.
            "step": [pytest.approx(value, rel=1e-5) for value in (6.0, -1.0, -2.0, -2.0)],
            "together": ("row 3",),
            "alone": (ranks.Ranks(), False),
            "refused alone": ("the first line", "the second"),
            "after": rank,
        }
        assert after == ranks.Ranks()
