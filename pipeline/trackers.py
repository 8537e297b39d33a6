"""TensorBoard, wandb and trackio behind one small protocol; each is imported only when a config names it."""

import importlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from data.errors import UserError
from stages.core.config import SharedConfig

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Tracker(Protocol):
    """Somewhere figures are shown beside metrics.jsonl, which stays the record."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records one step's figures."""
        ...

    def rewind(self, step: int) -> None:
        """Forgets what was recorded after `step`, as far as the tracker can."""
        ...

    def close(self) -> None:
        """Flushes and ends the record."""
        ...


def check_trackers(config: SharedConfig) -> None:
    """Raises UserError, one line for each configured tracker that is not installed."""
    missing = [name for name in config.trackers if importlib.util.find_spec(_PACKAGES[name]) is None]
    if missing:
        raise UserError(*(f"trackers={name}: not installed; run `pip install {_PACKAGES[name]}`" for name in missing))


def open_trackers(config: SharedConfig, stage: str, folder: Path, settings: Mapping[str, Any]) -> Sequence[Tracker]:
    """The configured trackers of one stage, their files under `folder/trackers`."""
    trackers: list[Tracker] = []
    for name in dict.fromkeys(config.trackers):
        files = folder / "trackers" / name
        if name == "tensorboard":
            trackers.append(_TensorBoard(files))
        else:
            trackers.append(_Remote(name, run=f"{config.name}-{stage}", files=files, settings=settings))
    return trackers


class _TensorBoard:
    """Writes event files; opened at the first figure, so that importing it costs nothing before."""

    def __init__(self, files: Path) -> None:
        self._files = files
        self._writer: Any = None
        self._purge_step: int | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._files), purge_step=self._purge_step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        self.close()
        self._writer = None
        self._purge_step = step + 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Remote:
    """wandb or trackio: they share `init`, `log` and `finish`. Neither takes a step back: repeated ones show twice."""

    def __init__(self, package: str, *, run: str, files: Path, settings: Mapping[str, Any]) -> None:
        self._module: Any = importlib.import_module(package)
        place: dict[str, str] = {}
        if package == "wandb":  # trackio keeps all runs in one database of the user's
            files.mkdir(parents=True, exist_ok=True)
            place["dir"] = str(files)
        self._run = self._module.init(project="rlhf-pipeline", name=run, config=dict(settings), **place)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._module.log(finite, step=step)

    def rewind(self, step: int) -> None:
        """Nothing to do: metrics.jsonl is the record without repeats."""

    def close(self) -> None:
        self._module.finish()
