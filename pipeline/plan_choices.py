"""Which strategies would fit a device, what each would take, and the cheapest that does."""

from collections.abc import Sequence
from dataclasses import dataclass

from data.errors import UserError
from pipeline.inputs import TRAINING, Run
from pipeline.plan_memory import memory_estimate, peak_bytes, stage_shape
from pipeline.plan_time import Seconds, stage_seconds, stage_work
from stages.core.memory import Spread
from stages.core.speed import DEVICES, Machine

FRAMEWORK_BYTES = 1.5e9  # CUDA's context, its libraries' workspaces, and what the allocator cannot use
LADDER = (  # each trades speed for memory; several processes need one
    ("ddp", "none"),
    ("zero1", "none"),
    ("zero2", "none"),
    ("zero3", "none"),
    ("zero2", "optimizer"),
    ("zero3", "optimizer"),
    ("zero3", "parameters"),
)


@dataclass(frozen=True)
class Place:
    """What a plan is made for: so many ranks on each machine, of a device or of none in particular."""

    hosts: Sequence[int] = (1,)  # ranks on each machine
    device: str | None = None

    @property
    def ranks(self) -> int:
        """All of them."""
        return sum(self.hosts)

    def spread(self, strategy: str, offload: str) -> Spread:
        """How a strategy shares the work here."""
        return Spread(strategy, offload, self.ranks, max(self.hosts))


@dataclass(frozen=True)
class Choice:
    """One strategy: bytes on each device, whether they fit, seconds of a step or update."""

    strategy: str
    offload: str
    bytes: int
    fits: bool
    seconds: float


def check_device(name: str | None) -> None:
    """Raises UserError for a device that is not known."""
    if name is not None and name not in DEVICES:
        raise UserError(f"--device {name}: is not known; use one of {', '.join(DEVICES)}")


def stage_time(run: Run, stage: str, mean_tokens: float, place: Place, spread: Spread) -> Seconds | None:
    """Time and traffic of a training stage on the place's device; None where there is nothing to say."""
    shape = stage_shape(run, stage) if stage in TRAINING else ""
    if place.device is None or isinstance(shape, str):
        return None
    machine = Machine(DEVICES[place.device], spread, run.config.dtype)
    return stage_seconds(run, stage, stage_work(run, stage, shape, mean_tokens), machine)


def stage_choices(run: Run, stage: str, tokens: tuple[int, float], place: Place) -> list[Choice]:
    """Every strategy that the place allows, simplest first; `tokens` of the longest and of the mean row."""
    if place.device is None or stage not in TRAINING:
        return []
    longest, mean = tokens
    choices: list[Choice] = []
    for strategy, offload in LADDER if place.ranks > 1 else [("none", "none")]:
        spread = place.spread(strategy, offload)
        sizes = memory_estimate(run, stage, longest, spread)
        seconds = stage_time(run, stage, mean, place, spread)
        if isinstance(sizes, str) or seconds is None:
            return []
        size = peak_bytes(sizes)
        fits = size + FRAMEWORK_BYTES <= DEVICES[place.device].memory
        choices.append(Choice(strategy, offload, size, fits, seconds.total))
    return choices


def cheapest(choices: Sequence[Choice]) -> Choice | None:
    """The fastest that fits, of equals the simplest; None where none does."""
    return min((choice for choice in choices if choice.fits), key=lambda choice: choice.seconds, default=None)
