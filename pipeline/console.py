"""What a person sees on stderr while a stage runs: a live bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

# The few figures that matter, in the order shown; a stage shows those that it logs.
_SHOWN = {
    "score/mean": "score",
    "kl/ref_mean": "KL",
    "response/length_mean": "length",
    "policy/entropy": "entropy",
    "value/explained_variance": "EV",
    "loss": "loss",
    "eval/loss": "eval loss",
    "eval/accuracy": "eval accuracy",
    "lr": "lr",
}
_PLAIN_SECONDS = 5.0


def figures_text(values: Mapping[str, float]) -> str:
    """The figures worth watching, as `loss 1.234 · lr 0.0002`; rounding noise, as a KL of -6e-07, reads 0."""
    told = {name: values[name] for name in _SHOWN if name in values}
    rounded = {name: value if name == "lr" else round(value, 4) + 0.0 for name, value in told.items()}
    return " · ".join(f"{_SHOWN[name]} {value:.4g}" for name, value in rounded.items())


def duration(seconds: float) -> str:
    """`42s`, `3m10s` or `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole // 60 % 60:02d}m"


class StageView:
    """Shows one stage's progress; use it as a context manager, so that the bar is taken down when the stage fails."""

    def __init__(self, stage: str, console: Console) -> None:
        self._stage = stage
        self._console = console
        self._progress: Progress | None = None
        self._kept: dict[str, float] = {}
        self._total = 0
        self._unit = "step"
        self._begun = self._shown = 0.0
        self._first: int | None = None  # last step of an earlier launch

    def __enter__(self) -> "StageView":
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def start(self, total_steps: int, unit: str, done: int) -> None:
        """Shows the bar, or the first line, of a stage of which `done` steps were taken before."""
        self._total, self._unit, self._first = total_steps, unit, None
        self._begun = time.monotonic()
        self._shown = self._begun
        if not self._console.is_terminal:
            units, before = unit if total_steps == 1 else f"{unit}s", f", {done} done before" if done else ""
            self._console.print(f"{self._stage}: {total_steps} {units}{before}")
            return
        progress = self._progress = self._progress or self._new_bar(unit)
        progress.update(progress.task_ids[0], completed=done, total=total_steps)

    def _new_bar(self, unit: str) -> Progress:
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            _Left(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            refresh_per_second=4,
        )
        progress.start()
        progress.add_task(self._stage, total=None, unit=f"{unit}s", figures="", left="")
        return progress

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Moves the bar, or prints a line: the first step, the last, and one every few seconds."""
        if self._first is None:
            self._first = step - 1
        self._kept.update({name: value for name, value in values.items() if name in _SHOWN})
        left = self._seconds_left(step)
        if self._progress is not None:
            text = figures_text(self._kept)
            self._progress.update(self._progress.task_ids[0], completed=step, figures=text, left=left)
            return
        now = time.monotonic()
        if step <= self._first + 1 or step == self._total or now - self._shown >= _PLAIN_SECONDS:
            self._shown = now
            place = f"{step}/{self._total}" if self._total else str(step)
            ending = f"{left} left" if left and step < self._total else ""
            told = filter(None, (f"{self._unit} {place}", figures_text(self._kept), ending))
            self._console.print(f"{self._stage}: {' · '.join(told)}")

    def say(self, message: str) -> None:
        """One line above the bar."""
        style = "bold red" if message.startswith("alarm") else ""
        self._console.print(Text(f"{self._stage}: {message}", style=style))

    def _seconds_left(self, step: int) -> str:
        """Time left at the mean pace of this launch, or nothing before the first step."""
        taken = step - (self._first or 0)
        if taken <= 0 or not self._total:
            return ""
        return duration((time.monotonic() - self._begun) / taken * max(self._total - step, 0))


class _Left(ProgressColumn):
    """The time left, as the view computes it: rich's own forgets a resumed run's earlier steps."""

    def render(self, task: Task) -> Text:
        """`3m10s left`, or nothing before the first step."""
        left = task.fields["left"]
        return Text(f"{left} left" if left else "", style="cyan")


def stderr_console() -> Console:
    """The console for progress and messages: plain, unwrapped lines when stderr is not a terminal."""
    return _console(stderr=True)


def stdout_console() -> Console:
    """The console for a command's answer."""
    return _console(stderr=False)


def _console(*, stderr: bool) -> Console:
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if terminal else 200  # a log has no edge to wrap at
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=not terminal, width=width)
