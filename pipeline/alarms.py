"""Alarms in words: pure functions from a run's figures to what is going wrong, or None.

The bounds are heuristics of ours, not literature: wide enough that a healthy run stays silent, narrow enough that a
broken one is named within 20 steps.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

RECENT = 5  # steps averaged before anything is said
BASELINE = 10  # first steps, against which drift is measured
WINDOW = 20  # steps kept of the recent past


class Series:
    """One figure over time: the first `BASELINE` values and the last `WINDOW`."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=WINDOW)

    def add(self, value: float) -> None:
        """Appends one step's value."""
        self.count += 1
        if len(self.first) < BASELINE:
            self.first.append(value)
        self.last.append(value)

    @property
    def recent(self) -> list[float]:
        """The last `RECENT` values."""
        return list(self.last)[-RECENT:]


Figures = Mapping[str, Series]


def loss_not_finite(figures: Figures) -> str | None:
    """Any loss of the last step is NaN or infinite."""
    for name in ("loss", "policy/loss", "value/loss"):
        if name in figures and not math.isfinite(figures[name].last[-1]):
            return f"{name} is not finite; lower the learning rate"
    return None


def kl_negative(figures: Figures) -> str | None:
    """The mean KL estimate is below zero by more than sampling noise, which a KL cannot be."""
    recent = _recent(figures, "kl/ref_mean")
    if recent is None:
        return None
    mean, error = statistics.fmean(recent), statistics.stdev(recent) / math.sqrt(len(recent))
    if mean < -0.1 and mean < -4 * error:
        return f"KL to the reference is negative ({mean:.2f} nats); sampler and trainer disagree"
    return None


def kl_exploding(figures: Figures) -> str | None:
    """KL is beyond 10 nats and grows threefold within ten steps, or exceeds one nat a token."""
    recent = _recent(figures, "kl/ref_mean")
    if recent is None:
        return None
    mean = statistics.fmean(recent)
    before = list(figures["kl/ref_mean"].last)[-(RECENT + 10) : -RECENT]
    length = figures["response/length_mean"].last[-1] if "response/length_mean" in figures else math.inf
    fast = len(before) == 10 and mean > 3 * max(statistics.fmean(before), 0.0)
    if mean > 10 and (fast or mean > length):
        return f"KL to the reference is exploding ({mean:.0f} nats a response); raise ppo.kl.coef"
    return None


def length_drifting(figures: Figures) -> str | None:
    """Responses are twice, or half, as long as in the first steps."""
    if (change := _against_start(figures, "response/length_mean")) is None:
        return None
    start, now = change
    if start > 0 and not 0.5 <= now / start <= 2:
        return f"response length drifts ({start:.0f} -> {now:.0f} tokens); the reward may pay for length"
    return None


def entropy_collapsing(figures: Figures) -> str | None:
    """The policy's entropy is next to nothing, or below a fifth of what it was in the first steps."""
    recent = _recent(figures, "policy/entropy")
    if recent is not None and statistics.fmean(recent) < 0.01:
        return f"entropy is {statistics.fmean(recent):.2g} nats; the policy says one thing only"
    if (change := _against_start(figures, "policy/entropy")) is None:
        return None
    start, now = change
    if now < 0.2 * start:
        return f"entropy collapses ({start:.2f} -> {now:.2f} nats); the policy repeats itself"
    return None


def scores_constant(figures: Figures) -> str | None:
    """The mean score has not moved at all for ten steps: there is nothing to learn from."""
    if "score/mean" not in figures or figures["score/mean"].count < 10:
        return None
    recent = list(figures["score/mean"].last)[-10:]
    if max(recent) - min(recent) <= 1e-6 * (1 + abs(recent[-1])):
        return f"scores are constant ({recent[-1]:.3g}); the reward tells responses no longer apart"
    return None


def scores_saturating(figures: Figures) -> str | None:
    """The spread of scores within a batch is below a twentieth of what it was in the first steps."""
    if (change := _against_start(figures, "score/std")) is None:
        return None
    start, now = change
    if now < 0.05 * start:
        return f"scores saturate (spread {start:.3g} -> {now:.3g}); the reward hardly tells responses apart"
    return None


def gradient_leaping(figures: Figures) -> str | None:
    """PPO's gradient is more than 20 times its median, and no bound shortens it.

    Adam divides by the root of a mean of squares over about 1,000 steps, so that one such gradient makes the next
    hundreds of steps short.
    """
    norms = figures.get("grad_norm")
    if norms is None or "policy/loss" not in figures or "grad_norm/bounded_fraction" in figures:
        return None
    *before, now = norms.last
    if len(before) < BASELINE or not _all_finite([*before, now]):
        return None
    usual = statistics.median(before)
    if now <= 20 * usual:
        return None
    return (
        f"the gradient's norm leaps ({usual:.2g} -> {now:.2g}); if it happens again, set ppo.max_grad_norm to some "
        "times the usual"
    )


def critic_useless(figures: Figures, share_done: float) -> str | None:
    """After a fifth of the run the critic explains less than nothing, by more than twice the standard error."""
    name = "value/explained_variance"
    if share_done < 0.2 or name not in figures or figures[name].count < WINDOW:
        return None
    recent = list(figures[name].last)[-10:]
    if not _all_finite(recent):
        return None
    mean, error = statistics.fmean(recent), statistics.stdev(recent) / math.sqrt(len(recent))
    if mean < -2 * error:
        return f"the critic explains nothing (explained variance {mean:.2f}); raise ppo.value_learning_rate"
    return None


_ALARMS: Sequence[Callable[[Figures], str | None]] = (
    loss_not_finite,
    kl_negative,
    kl_exploding,
    length_drifting,
    entropy_collapsing,
    scores_constant,
    scores_saturating,
    gradient_leaping,
)


def raised_alarms(figures: Figures, share_done: float) -> dict[str, str]:
    """Name -> text of everything wrong at this step."""
    found = {alarm.__name__: alarm(figures) for alarm in _ALARMS}
    found[critic_useless.__name__] = critic_useless(figures, share_done)
    return {name: text for name, text in found.items() if text is not None}


class AlarmWatch:
    """Remembers the figures of a run and which alarms are up, so that each is told once until it clears."""

    def __init__(self) -> None:
        self.total_steps = 0
        self.clear()

    def clear(self) -> None:
        """Forgets everything but the number of steps."""
        self._figures: dict[str, Series] = {}
        self._up: set[str] = set()
        self._steps = 0

    def observe(self, values: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """Name and text of each alarm that this step newly raises."""
        self._steps += 1
        for name, value in values.items():
            self._figures.setdefault(name, Series()).add(value)
        raised = raised_alarms(self._figures, self._steps / max(self.total_steps, self._steps))
        new = [(name, text) for name, text in raised.items() if name not in self._up]
        self._up = set(raised)
        yield from new


def _recent(figures: Figures, name: str) -> list[float] | None:
    """The last `RECENT` values of a figure, where there are so many and all are finite."""
    if name not in figures or figures[name].count < RECENT:
        return None
    recent = figures[name].recent
    return recent if _all_finite(recent) else None


def _against_start(figures: Figures, name: str) -> tuple[float, float] | None:
    """Means of a figure's first and last steps, once these do not overlap."""
    recent = _recent(figures, name)
    if recent is None or figures[name].count < BASELINE + RECENT or not _all_finite(figures[name].first):
        return None
    return statistics.fmean(figures[name].first), statistics.fmean(recent)


def _all_finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))
