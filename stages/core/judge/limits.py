"""How fast and for how much an endpoint may be asked: calls at a time, per minute, tokens per minute, and dollars.

Nothing is ever over a limit: an open call counts with the most that it can take (no token is shorter than a byte), and
with what it did take once that is known.
"""

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from data.errors import UserError
from data.rows import Message
from stages.core.judge.client import Usage
from stages.core.judge.config import Endpoint

# A minute, and a second for calls that do not take equally long to arrive.
WINDOW_SECONDS = 61.0
_POLL_SECONDS = 0.02
_TEMPLATE_TOKENS = 64  # that a server's chat template may put around the messages


class CapReached(UserError):
    """The next call could cost more than is left."""


def most_usage(messages: Sequence[Message], max_tokens: int) -> Usage:
    """The most tokens that a call can take."""
    size = sum(len(json.dumps(message, ensure_ascii=False).encode("utf-8", "replace")) for message in messages)
    return Usage(size + _TEMPLATE_TOKENS, max_tokens)


def cost(endpoint: Endpoint, usage: Usage) -> float:
    """US dollars; 0 where no price is given."""
    if endpoint.price is None:
        return 0.0
    return (usage.prompt_tokens * endpoint.price.input + usage.completion_tokens * endpoint.price.output) / 1e6


@dataclass
class Slot:
    """One open call. What it took is `bound` until `used` says otherwise."""

    bound: Usage
    used: Usage | None = None


@dataclass
class Limits:
    """Lets calls to one endpoint begin when all its limits allow. `spent` is what earlier launches have paid."""

    endpoint: Endpoint
    spent: float = 0.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _begun: deque[float] = field(default_factory=deque[float])  # when the calls of the last minute began
    _ended: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])  # and when, with their tokens
    _held_tokens: int = 0  # of open calls and of those that ended in the last minute
    _open_cost: float = 0.0
    _paused_until: float = 0.0

    def __post_init__(self) -> None:
        self._gate = asyncio.Lock()
        self._room = asyncio.Semaphore(self.endpoint.max_concurrency)

    def pause(self, seconds: float) -> None:
        """No call begins for so long."""
        self._paused_until = max(self._paused_until, self.clock() + seconds)

    @property
    def paused_seconds(self) -> float:
        """How long no call will begin."""
        return max(0.0, self._paused_until - self.clock())

    @contextlib.asynccontextmanager
    async def slot(self, bound: Usage) -> AsyncGenerator[Slot]:
        """Waits until a call may begin. At its end, set `used` where it is known; else it counts with `bound`.

        Raises CapReached, and UserError where the call alone is over the limit of tokens.
        """
        async with self._room:
            async with self._gate:  # first come, first served
                while (wait := self._wait(bound)) > 0:
                    await self.sleep(wait)
                self._begin(bound)
            slot = Slot(bound)
            try:
                yield slot
            finally:
                self._end(bound, slot.used or bound)

    def _begin(self, bound: Usage) -> None:
        self._begun.append(self.clock())
        self._held_tokens += _tokens(bound)
        self._open_cost += cost(self.endpoint, bound)

    def _end(self, bound: Usage, used: Usage) -> None:
        self._ended.append((self.clock(), _tokens(used)))
        self._held_tokens += _tokens(used) - _tokens(bound)
        self._open_cost -= cost(self.endpoint, bound)
        self.spent += cost(self.endpoint, used)

    def _wait(self, bound: Usage) -> float:
        """Seconds until it is worth asking again whether a call may begin; 0 where it may."""
        now, endpoint = self.clock(), self.endpoint
        while self._begun and self._begun[0] <= now - WINDOW_SECONDS:
            self._begun.popleft()
        while self._ended and self._ended[0][0] <= now - WINDOW_SECONDS:
            self._held_tokens -= self._ended.popleft()[1]
        if self.paused_seconds > 0:
            return self.paused_seconds
        if endpoint.requests_per_minute is not None and len(self._begun) >= endpoint.requests_per_minute:
            return self._begun[0] + WINDOW_SECONDS - now
        return 0.0 if self._tokens_allow(_tokens(bound)) and self._cap_allows(bound) else _POLL_SECONDS

    def _tokens_allow(self, tokens: int) -> bool:
        limit = self.endpoint.tokens_per_minute
        if limit is not None and tokens > limit:
            raise UserError(
                f"tokens_per_minute={limit}: one question can take {tokens} tokens; raise it or lower max_tokens"
            )
        return limit is None or self._held_tokens + tokens <= limit

    def _cap_allows(self, bound: Usage) -> bool:
        """Whether the call fits under the cap with all open ones. Raises CapReached where it would not without them."""
        most, asked = self.endpoint.max_cost, cost(self.endpoint, bound)
        if most is None:
            return True
        if self.spent + asked > most:
            raise CapReached(
                f"max_cost={most:g}: {self.spent:.4f} US dollars are spent, and the next call may cost {asked:.4f}; "
                "raise it and run again: what was answered is kept"
            )
        return self.spent + self._open_cost + asked <= most


def _tokens(usage: Usage) -> int:
    return usage.prompt_tokens + usage.completion_tokens
