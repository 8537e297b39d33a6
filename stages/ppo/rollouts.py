"""Which version of the policy samples which update's responses; with `staleness`, while the update before it runs.

Versions count updates: version 7 is the policy after seven of them. With staleness 0, update u learns from what version
u - 1 sampled. With staleness s, a flight of s rollouts is sampled by one version, one after the other, in a thread: at
the start of update u version u - 1 is handed over and the responses of updates u + 1 to u + s are asked for, which are
then 1 to s updates old when they train. The first update after a start or a resume has nothing to take: it waits for
its own, and is not stale. So a version depends on the updates alone, never on a clock.

A flight is not part of the state: prompts count as consumed when they have trained, so those of rollouts that were
under way are drawn again after a resume.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace

from data.encoded import EncodedPrompt
from stages.core import ranks
from stages.core.responses import Responses, Sampler
from stages.core.rollout.main_engine import own_engine
from stages.core.rollout.native import NativeEngine
from stages.core.rollout.protocol import Completion, EngineError
from stages.core.rollout.vllm import VllmEngine

PROBE_PROMPTS, PROBE_TOKENS = 4, 16


@dataclass(frozen=True)
class Rollout:
    """The responses of one update."""

    responses: Responses
    staleness: int = 0  # updates since the version that sampled it
    seconds: float = 0.0  # of sampling
    waited_seconds: float = 0.0  # that the training stood still for it


@dataclass(frozen=True)
class Flight:
    """One update's rollout under way."""

    prompts: list[EncodedPrompt]
    drawn: "Future[tuple[list[Completion], float]]"


@dataclass
class Rollouts:
    """Hands the policy over, and samples each update's responses once, in order.

    `prompts_of` gives the prompts of an update. Every method but the thread's own work is for the training's thread.
    """

    sampler: Sampler
    prompts_of: Callable[[int], list[EncodedPrompt]]
    updates: int
    samples: int
    staleness: int
    flights: dict[int, Flight] = field(default_factory=dict[int, Flight])
    version: int | None = None  # that the engine has
    told: set[str] = field(default_factory=set[str])  # servers whose loss was told
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "rollout"))

    def sync(self, version: int) -> None:
        """Hands over the policy as `version`, once nothing is sampled any more. Raises EngineError."""
        wait([flight.drawn for flight in self.flights.values()])
        if self.version != version:
            self.sampler.engine.sync(version)
            self.version = version

    def take(self, update: int) -> Rollout:
        """The responses of this update: sampled by version `update` - 1 here and now, or by an older one ahead of time.

        Raises EngineError where sampling failed, or where the version is older than the staleness allows.
        """
        began = time.perf_counter()
        flight = self.flights.pop(update, None)
        if flight is None:
            assert not self.flights, "rollouts are taken in order"
            self.sync(update - 1)
            prompts = self.prompts_of(update)
            completions, seconds = self._draw(prompts, update, update - 1)
        else:
            prompts = flight.prompts
            completions, seconds = ranks.on_main(flight.drawn.result, EngineError)
        waited = time.perf_counter() - began
        staleness = staleness_of(completions, update - 1, allowed=self.staleness)
        return Rollout(self.sampler.read(prompts, completions, self.samples), staleness, seconds, waited)

    def go_ahead(self, update: int) -> Responses | None:
        """Starts the flight of what comes after `update`, from the policy as it is now, where none is under way.

        Returns a few short responses of that policy, for the trainer to rescore; None where no flight was started.
        """
        ahead = range(update + 1, min(update + self.staleness, self.updates) + 1)
        if self.flights or not ahead:
            return None
        version = update - 1
        self.sync(version)
        probe = self._probe(update, version)
        for each in ahead:
            prompts = self.prompts_of(each)
            self.flights[each] = Flight(prompts, self.thread.submit(self._draw_ahead, prompts, each, version))
        return probe

    @property
    def is_policy(self) -> bool:
        """Whether the sampler is the policy itself: nothing to hand over, nothing to rescore."""
        return isinstance(self.sampler.engine, NativeEngine)

    def newly_lost(self) -> list[str]:
        """A line for each server given up since the last call, whose work the others do."""
        engine = own_engine(self.sampler.engine)
        lost = engine.lost if isinstance(engine, VllmEngine) else {}
        lines = [f"rollout server {name} is given up: {why}" for name, why in lost.items() if name not in self.told]
        self.told |= lost.keys()
        return lines

    def _probe(self, update: int, version: int) -> Responses:
        sampling = self.sampler.sampling
        short = replace(sampling, max_new_tokens=min(PROBE_TOKENS, sampling.max_new_tokens))
        sampler = replace(self.sampler, sampling=short)
        return sampler.respond(self.prompts_of(update)[:PROBE_PROMPTS], "probe", update, version=version)

    def close(self) -> None:
        """Stops what is under way and releases the engine, whatever state they are in."""
        self.thread.shutdown(wait=False, cancel_futures=True)
        self.sampler.engine.close()
        self.thread.shutdown()

    def _draw_ahead(
        self, prompts: Sequence[EncodedPrompt], update: int, version: int
    ) -> tuple[list[Completion], float]:
        """The same in the thread, where ranks cannot meet: by the rank that has the engine; others draw nothing."""
        engine = own_engine(self.sampler.engine)
        if engine is None:
            return [], 0.0
        began = time.perf_counter()
        sampler = replace(self.sampler, engine=engine)
        return sampler.draw(prompts, "train", update, self.samples, version=version), time.perf_counter() - began

    def _draw(self, prompts: Sequence[EncodedPrompt], update: int, version: int) -> tuple[list[Completion], float]:
        """Completions, and the seconds they took."""
        began = time.perf_counter()
        completions = self.sampler.draw(prompts, "train", update, self.samples, version=version)
        return completions, time.perf_counter() - began


def staleness_of(completions: Sequence[Completion], trained: int, *, allowed: int) -> int:
    """Updates from the version that sampled to version `trained`, which learns from it.

    Raises EngineError where it is more than allowed, or where the version is still to come.
    """
    ages = {trained - completion.version for completion in completions}
    oldest = max(ages)
    if min(ages) < 0 or oldest > allowed:
        raise EngineError(
            f"rollout engine: responses of policy version {trained - oldest} for version {trained}; "
            f"ppo.rollout.staleness={allowed} allows {trained - allowed} and newer, and none trains on others"
        )
    return oldest
