"""Limits on a clock that stands until somebody sleeps: never over, and no slower than they must be."""

import asyncio
import heapq
from collections.abc import Awaitable
from typing import Any

import pytest

from data.errors import UserError
from stages.core.judge.client import Usage
from stages.core.judge.config import Endpoint, Price
from stages.core.judge.limits import CapReached, Limits, cost, most_usage

MINUTE = 60.0


class Clock:
    """Time that passes when everybody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._number = 0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> Awaitable[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._number += 1
        heapq.heappush(self._sleepers, (self.now + seconds, self._number, future))
        return future

    async def run(self, tasks: list[asyncio.Task[Any]]) -> None:
        while not all(task.done() for task in tasks):
            for _ in range(20):
                await asyncio.sleep(0)
            if self._sleepers and not all(task.done() for task in tasks):
                self.now, _, future = heapq.heappop(self._sleepers)
                if not future.done():
                    future.set_result(None)


def begun(
    endpoint: Endpoint, calls: list[tuple[Usage, Usage, float]]
) -> tuple[list[tuple[float, float, Usage]], Limits]:
    """Begin, end and use of each call (bound, use, seconds), and the limits after them."""
    clock, done = Clock(), []
    limits = Limits(endpoint, clock=clock, sleep=clock.sleep)

    async def call(bound: Usage, used: Usage, seconds: float) -> None:
        async with limits.slot(bound) as slot:
            start = clock.now
            await clock.sleep(seconds)
            slot.used = used
            done.append((start, clock.now, used))

    async def everything() -> None:
        tasks = [asyncio.create_task(call(*each)) for each in calls]
        await clock.run(tasks)
        for task in tasks:
            task.result()

    asyncio.run(everything())
    return done, limits


def test_calls_at_a_time_and_per_minute() -> None:
    endpoint = Endpoint(max_concurrency=3, requests_per_minute=10)
    done, _ = begun(endpoint, [(Usage(1, 1), Usage(1, 1), 2.0)] * 35)
    starts = sorted(start for start, _, _ in done)
    assert max(sum(begin <= start < end for begin, end, _ in done) for start in starts) == 3
    assert max(sum(start <= other < start + MINUTE for other in starts) for start in starts) == 10
    assert starts[10] < 1.05 * MINUTE  # the eleventh waits for a minute, and for little more
    assert starts[-1] < 3.2 * MINUTE


def test_tokens_per_minute_count_open_calls_with_the_most_they_can_take() -> None:
    endpoint = Endpoint(max_concurrency=50, tokens_per_minute=1000)
    done, _ = begun(endpoint, [(Usage(200, 100), Usage(100, 50), 1.0)] * 20)
    for start, _, _ in done:
        open_or_recent = [used for begin, end, used in done if begin <= start and end > start - MINUTE]
        assert sum(used.prompt_tokens + used.completion_tokens for used in open_or_recent) <= 1000
    first = [start for start, _, _ in done if start < 30]
    # 3 x 300 at once; as they end they count 150 each, so 4 more fit in pairs: 6 x 150 = 900 is the most below 1000.
    assert len(first) == 5  # at 750, one more open call of 300 would be over
    with pytest.raises(UserError, match="one question can take 1200 tokens"):
        begun(endpoint, [(Usage(1100, 100), Usage(1, 1), 1.0)])


def test_a_pause_holds_all_calls() -> None:
    clock = Clock()
    limits = Limits(Endpoint(), clock=clock, sleep=clock.sleep)
    limits.pause(7.5)
    limits.pause(2.0)  # a shorter one does not end it

    async def call() -> float:
        async with limits.slot(Usage(1, 1)):
            return clock.now

    async def everything() -> float:
        task = asyncio.create_task(call())
        await clock.run([task])
        return task.result()

    assert asyncio.run(everything()) == 7.5


def test_the_cap_counts_open_calls_and_is_never_passed() -> None:
    """A call may cost (1000 x 1 + 500 x 2) / 1e6 = 0.002 and does cost half of it."""
    endpoint = Endpoint(price=Price(input=1.0, output=2.0), max_cost=0.01, max_concurrency=50)
    bound, used = Usage(1000, 500), Usage(500, 250)
    assert cost(endpoint, bound) == pytest.approx(0.002)
    with pytest.raises(CapReached, match=r"max_cost=0\.01"):
        begun(endpoint, [(bound, used, 1.0)] * 10)
    done, limits = begun(endpoint, [(bound, used, 1.0)] * 9)
    assert len(done) == 9
    assert limits.spent == pytest.approx(0.009)
    at_once = sorted(start for start, _, _ in done)
    assert sum(start == 0 for start in at_once) == 5  # 5 x 0.002 are reserved; the others wait for what these leave
    with pytest.raises(CapReached):
        Limits(endpoint, spent=0.0081)._cap_allows(bound)  # what earlier launches paid counts


def test_no_token_is_shorter_than_a_byte() -> None:
    messages = [{"role": "user", "content": "三 words here"}]
    usage = most_usage(messages, 32)  # type: ignore[arg-type]
    assert usage.prompt_tokens >= len("三 words here".encode())
    assert usage.completion_tokens == 32
