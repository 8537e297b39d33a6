"""Where a stage reports: metrics.jsonl without gaps or repeats, samples.jsonl, trackers, and the person watching."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from data.artifacts import write_atomically
from pipeline.alarms import AlarmWatch
from pipeline.trackers import Tracker


class View(Protocol):
    """What shows a stage's progress; `pipeline.console` has one for terminals and one for logs."""

    def start(self, total_steps: int, unit: str, done: int) -> None:
        """Announces the number of steps, `done` of which an earlier launch has taken."""
        ...

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Shows one step's figures."""
        ...

    def say(self, message: str) -> None:
        """Shows one line."""
        ...


class MetricsLog:
    """Appends to `metrics.jsonl` and `samples.jsonl` in a stage's folder; opening repairs a line torn by a kill.

    Every line is flushed, so a killed process loses nothing that it logged. What is not finite is written as null.
    """

    def __init__(self, folder: Path, *, view: View, trackers: Sequence[Tracker] = ()) -> None:
        self._folder = folder
        self._view = view
        self._trackers = trackers
        self._watch = AlarmWatch()
        self._unit = "step"
        self._last_step = -1
        self._rewrite(keep=None)

    def start(self, total_steps: int, unit: str) -> None:
        """Announces how many steps the stage will take."""
        self._watch.total_steps = total_steps
        self._unit = unit
        self._view.start(total_steps, unit, max(self._last_step, 0))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one step's figures; `step` must be above every step logged before."""
        assert step > self._last_step, f"step {step} logged after step {self._last_step}"
        self._last_step = step
        numbers = {name: float(value) for name, value in values.items() if name != "step"}
        self._append("metrics.jsonl", {"step": step, **{name: _finite(value) for name, value in numbers.items()}})
        for tracker in self._trackers:
            tracker.log(step, numbers)
        self._view.step(step, numbers)
        for name, text in self._watch.observe(numbers):
            self._append("alarms.jsonl", {"step": step, "alarm": name, "text": text})
            self._view.say(f"alarm at {self._unit} {step}: {text}")

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends sampled texts."""
        for row in rows:
            self._append("samples.jsonl", {"step": step, **{name: _finite(value) for name, value in row.items()}})

    def rewind(self, step: int) -> None:
        """Drops every metric, sample and alarm after `step`."""
        self._rewrite(keep=step)
        for tracker in self._trackers:
            tracker.rewind(step)

    def say(self, message: str) -> None:
        """Shows one line to the person watching."""
        self._view.say(message)

    def close(self) -> None:
        """Flushes the trackers."""
        for tracker in self._trackers:
            tracker.close()

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with (self._folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n")

    def _rewrite(self, *, keep: int | None) -> None:
        """Keeps the whole lines up to step `keep` (None: all of them), and takes the history up from there."""
        for name in ("metrics.jsonl", "samples.jsonl", "alarms.jsonl"):
            path = self._folder / name
            if not path.is_file():
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            kept = "".join(line for step, line in _whole_lines(text) if keep is None or step <= keep)
            if kept != text:
                write_atomically(path, kept)
        self._watch.clear()
        self._last_step = -1
        for row in read_metrics(self._folder):
            self._last_step = row.pop("step")
            for _ in self._watch.observe({name: math.nan if value is None else value for name, value in row.items()}):
                pass  # shown when it was new


class Silence:
    """Where a rank reports that is not rank 0: nowhere."""

    def start(self, total_steps: int, unit: str) -> None:
        """Nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Nothing."""

    def say(self, message: str) -> None:
        """Nothing."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a stage's metrics.jsonl, in order; none where it has not begun."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for _, line in _whole_lines(path.read_text(encoding="utf-8", errors="replace"))]


def _whole_lines(text: str) -> Iterator[tuple[int, str]]:
    """Step and text of the leading lines that were written in full."""
    for line in text.splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            return
        if not line.endswith("\n"):
            return
        yield step, line


def _finite(value: Any) -> Any:
    """`value`, or None for a number that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
