"""A rollout engine that one rank alone has: it answers for all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stages.core import ranks
from stages.core.rollout.protocol import Completion, EngineError, RolloutEngine, Sampling


@dataclass(frozen=True)
class MainEngine:
    """Rank 0's engine behind the protocol; every rank makes every call, and gets the answer or the error."""

    own: RolloutEngine | None  # None: this rank is not the one

    @classmethod
    def start(cls, start: Callable[[], RolloutEngine]) -> RolloutEngine:
        """What `start` gives, started by rank 0 alone; by itself where there is no other rank."""
        started: list[RolloutEngine] = []
        ranks.alone(lambda: started.append(start()), EngineError)
        if not ranks.current().are_many:
            return started[0]
        return cls(started[0] if started else None)

    def sync(self, version: int) -> None:
        """Hands over the policy as it is now."""
        ranks.alone(lambda: self._engine.sync(version), EngineError)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """For each prompt one completion a seed."""
        return ranks.alone(lambda: self._engine.generate(prompts, sampling, seeds), EngineError)

    def close(self) -> None:
        """Releases what rank 0 holds; the others need not take part."""
        if self.own is not None:
            self.own.close()

    @property
    def _engine(self) -> RolloutEngine:
        assert self.own is not None
        return self.own


def own_engine(engine: RolloutEngine) -> RolloutEngine | None:
    """The engine that this rank can ask by itself, in a thread of its own; None where another rank has it."""
    return engine.own if isinstance(engine, MainEngine) else engine
