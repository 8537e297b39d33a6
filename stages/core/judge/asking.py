"""Puts questions to an endpoint until they are answered: the ledger first, then calls within the limits, with retries.

A verdict is in the ledger before it counts, so what was answered is never asked, nor paid for, again. A question
without a usable answer is quarantined with its cause; the next launch asks it anew.
"""

import asyncio
import contextlib
import random
import sqlite3
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from stages.core.context import Interrupted
from stages.core.judge.client import CallFailed, ChatClient, Reply, Usage
from stages.core.judge.config import Endpoint
from stages.core.judge.ledger import Ledger, Verdict
from stages.core.judge.limits import WINDOW_SECONDS, Limits, cost, most_usage
from stages.core.judge.question import Question, Request
from stages.core.judge.revision import Revise
from stages.core.judge.verdict import Unusable

Asked = Question | Request | Revise
"""What a model behind an endpoint can be asked: to judge, to answer, to rewrite its answer."""

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_LONGEST_BACKOFF = 60.0
_MOST_WAITS = 100  # times that a question is told to wait before that counts as a fault too
_DRAIN_SECONDS = 10.0  # that open calls may take after a signal to stop
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Unanswered:
    """No usable answer, and why."""

    cause: str


@dataclass
class Recorder:
    """Enters what comes in at about the same time in one transaction, in a thread: a flush of the disk takes long."""

    ledger: Ledger
    _waiting: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = field(default_factory=list[Any])
    _writer: asyncio.Task[None] | None = None

    async def enter(self, entry: Callable[[], ResultT]) -> ResultT:
        """What `entry` gives, once it is on the disk."""
        entered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((entry, entered))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        return cast(ResultT, await entered)

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            results: list[Any]
            try:
                results = await asyncio.to_thread(self._commit, [entry for entry, _ in batch])
            except (sqlite3.Error, ValueError) as error:
                results = [error] * len(batch)
            for (_, entered), result in zip(batch, results, strict=True):
                if entered.done():
                    continue  # nobody waits for it any more
                if isinstance(result, Exception):
                    entered.set_exception(result)
                else:
                    entered.set_result(result)

    def _commit(self, entries: Sequence[Callable[[], Any]]) -> list[Any]:
        with self.ledger.together():
            return [entry() for entry in entries]


@dataclass
class Asker:
    """One model behind an endpoint, under its name in the ledger."""

    endpoint: Endpoint
    source: str
    client: ChatClient
    limits: Limits
    recorder: Recorder
    known: dict[str, Verdict]  # by key
    calls: int = 0
    turned_away: int = 0  # calls in a row that were told to come back later
    failures: Counter[str] = field(default_factory=Counter[str])  # calls without a usable answer, by kind
    _jitter: random.Random = field(default_factory=random.Random)  # of waiting times alone

    async def answer(self, question: Asked) -> Verdict | Unanswered:
        """The verdict on a question, from the ledger or asked for; or why it was quarantined.

        Raises UserError where no call is served, or the money is spent.
        """
        if question.key in self.known:
            return self.known[question.key]
        faults, waits, cause, words = 0, 0, "", ""
        while faults < self.endpoint.attempts:
            wait: float | None = None
            try:
                self.known[question.key] = await self._attempt(question)
                self.turned_away = 0
                return self.known[question.key]
            except Unusable as error:
                cause, words = str(error), error.words
            except CallFailed as error:
                cause, words, wait = str(error), "", error.wait
                if not error.again:
                    break
            self.failures[cause.partition(":")[0]] += 1
            if wait is not None and waits < _MOST_WAITS:
                waits += 1
                self.turned_away += 1
                if self.turned_away > 1:  # not by chance: it is too fast for the endpoint, so all calls wait
                    self.limits.pause(wait)
                await self.limits.sleep(wait)
            else:
                self.turned_away = 0
                faults += 1
                await self.limits.sleep(self._backoff(faults))
        await self._enter(question, lambda ledger: ledger.quarantine(question.key, self.source, cause, raw=words))
        return Unanswered(cause)

    async def _attempt(self, question: Asked) -> Verdict:
        """One call. Raises CallFailed and Unusable; what was paid for is in the ledger all the same."""
        messages = question.messages()
        bound = most_usage(messages, int(question.options()["max_tokens"]))
        async with self.limits.slot(bound) as slot:
            self.calls += 1
            try:
                reply = await self.client.complete(messages, **question.options())
            except CallFailed as error:
                slot.used = bound if error.billed else Usage(0, 0)
                if error.billed:
                    await self._charge(question, self._usage(bound))
                raise
            slot.used = reply.usage or bound
            usage = self._usage(slot.used)
            try:
                verdict = _read(reply, question)
            except Unusable:
                await self._charge(question, usage)
                raise
            return await self._enter(
                question,
                lambda ledger: ledger.record(question.key, self.source, verdict, raw=reply.text, usage=usage),
            )

    async def _charge(self, question: Asked, usage: dict[str, float]) -> None:
        await self._enter(question, lambda ledger: ledger.charge(question.key, self.source, usage))

    async def _enter(self, question: Asked, entry: Callable[[Ledger], ResultT]) -> ResultT:
        """What `entry` gives, once it and the question are on the disk."""
        ledger = self.recorder.ledger

        def both() -> ResultT:
            ledger.ask(question.key, question.content())
            return entry(ledger)

        return await self.recorder.enter(both)

    def _usage(self, usage: Usage) -> dict[str, float]:
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cost": cost(self.endpoint, usage),
        }

    def _backoff(self, faults: int) -> float:
        longest = min(_LONGEST_BACKOFF, self.endpoint.backoff_s * 2 ** (faults - 1))
        return longest * (0.5 + 0.5 * self._jitter.random())


@contextlib.asynccontextmanager
async def open_asker(
    endpoint: Endpoint,
    source: str,
    ledger: Ledger,
    *,
    base_url: str | None = None,
    token: str | None = None,
    say: Callable[[str], None] | None = None,
) -> AsyncGenerator[Asker]:
    """An asker of an endpoint, or of another address under its limits; what the ledger knows as spent counts.

    `say` is told where it will ask nothing for a while.
    """
    async with ChatClient(endpoint, base_url=base_url, token=token) as client:
        limits = Limits(endpoint, spent=ledger.total("cost", source))
        if endpoint.has_rates:  # the minute of a launch that was killed goes on
            limits.pause(WINDOW_SECONDS - ledger.seconds_since_answer(source))
        if say is not None and (seconds := limits.paused_seconds) > 0:
            say(f"{source} is asked nothing new for {seconds:.0f} s: limits per minute hold over launches")
        known = {verdict.key: verdict for verdict in ledger.verdicts(source) if verdict.source == source}
        yield Asker(endpoint, source, client, limits, Recorder(ledger), known)


def _read(reply: Reply, question: Asked) -> Any:
    if reply.refused:
        raise Unusable("refused")
    try:
        return question.read(reply.text)
    except Unusable as error:
        cause = f"{error} (cut at max_tokens)" if reply.finish == "length" else str(error)
        raise Unusable(cause, words=reply.text) from error


async def for_each(
    items: Iterable[ItemT],
    work: Callable[[ItemT], Awaitable[None]],
    *,
    at_a_time: int,
    should_stop: Callable[[], bool],
) -> None:
    """Works on every item, `at_a_time` of them. What one raises ends all, open ones first given ten seconds to finish.

    Raises Interrupted where `should_stop` said so before the end.
    """
    waiting = iter(items)
    stopping = False

    async def worker() -> None:
        for item in waiting:
            await work(item)
            if stopping:
                return

    workers = [asyncio.create_task(worker()) for _ in range(at_a_time)]
    open_workers: set[asyncio.Task[None]] = set(workers)
    try:
        while open_workers:
            done, open_workers = await asyncio.wait(
                open_workers, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_EXCEPTION
            )
            failed = any(task.exception() for task in done)
            stopping = stopping or failed or should_stop()
            if stopping and open_workers:
                _, open_workers = await asyncio.wait(open_workers, timeout=_DRAIN_SECONDS)
                break
    finally:
        for task in workers:
            task.cancel()
        results = await asyncio.gather(*workers, return_exceptions=True)
    errors = [result for result in results if isinstance(result, Exception)]
    if errors:
        raise errors[0]
    if stopping:
        raise Interrupted
