"""The weights with the lowest holdout loss so far, kept through crashes.

They stand once on the disk: each checkpoint links to the files, so that resuming from an older checkpoint finds the
best of its own time.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.artifacts import publish_folder

RECORD = "best.json"
IN_CHECKPOINT = "best"


@dataclass(frozen=True)
class BestRecord:
    """When the best weights were measured, and all that was measured."""

    step: int
    figures: dict[str, float]


class BestWeights:
    """The best weights in `folder`: `weights/` and the record beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def weights(self) -> Path:
        """The folder with the weights."""
        return self.folder / "weights"

    @property
    def record(self) -> BestRecord | None:
        """What is known of the best weights; None before the first evaluation."""
        path = self.folder / RECORD
        return BestRecord(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def offer(self, step: int, figures: dict[str, float], save: Callable[[Path], None]) -> None:
        """Keeps the weights that `save` writes where `eval/loss` is the lowest so far."""
        best = self.record
        if best is not None and not figures["eval/loss"] < best.figures["eval/loss"]:
            return

        def write(temporary: Path) -> None:
            save(temporary / "weights")
            (temporary / RECORD).write_text(json.dumps({"step": step, "figures": figures}), encoding="utf-8")

        publish_folder(self.folder, write)

    def store(self, checkpoint: Path) -> None:
        """Puts the best weights into a checkpoint."""
        if self.folder.is_dir():
            _link_tree(self.folder, checkpoint / IN_CHECKPOINT)

    def restore(self, checkpoint: Path | None) -> None:
        """Takes the best weights from a checkpoint; forgets them where it has none or there is no checkpoint."""
        stored = None if checkpoint is None else checkpoint / IN_CHECKPOINT
        if stored is not None and stored.is_dir():
            publish_folder(self.folder, lambda temporary: _link_tree(stored, temporary))
        elif self.folder.is_dir():
            shutil.rmtree(self.folder)


def _link_tree(source: Path, target: Path) -> None:
    """Hard links where the file system has them (the files are never written again, only replaced), else copies."""

    def link(name: str, new_name: str) -> None:
        try:
            os.link(name, new_name)
        except OSError:
            shutil.copy2(name, new_name)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)
