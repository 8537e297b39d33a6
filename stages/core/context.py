"""What a stage is given: its config, its inputs, its folder, and where to report. Imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from data.artifacts import MANIFEST
from stages.core.config import SharedConfig

ConfigT = TypeVar("ConfigT")


class Metrics(Protocol):
    """Where a stage reports; `pipeline.metrics.MetricsLog` is the implementation."""

    def start(self, total_steps: int, unit: str) -> None:
        """Announces how many steps the stage will take, for the progress bar."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl; `step` must be above every step logged before."""
        ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends sampled texts to samples.jsonl."""
        ...

    def rewind(self, step: int) -> None:
        """Drops every metric and sample after `step`: a resumed run writes them again."""
        ...

    def say(self, message: str) -> None:
        """Shows one line to the person watching."""
        ...


class Interrupted(Exception):
    """The stage was asked to stop and has written a checkpoint; `launch` exits with 75."""


@dataclass(frozen=True)
class StageContext(Generic[ConfigT]):
    """Everything a stage's `run` reads; its results go to `out`."""

    stage: str
    out: Path  # OUT/<stage>
    run_folder: Path  # OUT; `stage:toy/rows.jsonl` in a path means run_folder/toy/rows.jsonl
    config_folder: Path | None  # where relative paths of the config are looked up first
    shared: SharedConfig
    config: ConfigT
    inputs: Mapping[str, str]  # role (see pipeline/inputs.py) -> folder, hub id or file.py:function
    key: str  # content key; a checkpoint with another key is never resumed
    metrics: Metrics
    should_stop: Callable[[], bool]

    def parents(self) -> list[Path]:
        """Those of the inputs that are artifacts."""
        return [Path(source) for source in self.inputs.values() if (Path(source) / MANIFEST).is_file()]


ArtifactKind = Literal["policy", "reward_model", "preferences", "evaluation", "export"]


@dataclass(frozen=True)
class StageResult:
    """What `run` hands back for the artifact's manifest."""

    kind: ArtifactKind
    metrics: dict[str, float] = field(default_factory=dict)  # last and best figures
    parents: Sequence[Path] = ()  # artifact folders this one was made from
