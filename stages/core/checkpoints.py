"""Resumable state of a stage: written atomically, verified before it is used, pruned after the new one is safe.

Layout: checkpoints/step-00000050/, its manifest (`checkpoint.json`) last. A damaged or unfinished one is passed over
for the one before.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from data.artifacts import FileEntry, fsync_tree, hash_files, publish_folder, verify_files, write_atomically

MANIFEST = "checkpoint.json"
STEP_FOLDER = re.compile(r"step-(\d{8})")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint after `step` steps."""

    path: Path
    step: int


def seal_checkpoint(folder: Path, *, step: int, key: str) -> None:
    """Flushes `folder` and writes its manifest: from here on it counts."""
    fsync_tree(folder)
    files = {name: asdict(entry) for name, entry in hash_files(folder, skip=(MANIFEST,)).items()}
    write_atomically(folder / MANIFEST, json.dumps({"step": step, "key": key, "files": files}, indent=2))


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None], *, key: str, keep: int) -> Path:
    """The path of the checkpoint that `write` filled; older ones are pruned to `keep` afterwards."""

    def write_and_seal(temporary: Path) -> None:
        write(temporary)
        seal_checkpoint(temporary, step=step, key=key)

    target = folder / f"step-{step:08d}"
    publish_folder(target, write_and_seal)
    prune_checkpoints(folder, keep=keep)
    return target


def prune_checkpoints(folder: Path, *, keep: int) -> None:
    """Removes all but the newest `keep` sealed checkpoints, and unsealed ones older than those."""
    sealed = [path for path in _newest_first(folder) if (path / MANIFEST).is_file()]
    kept = sealed[:keep]
    for path in _newest_first(folder):
        if path not in kept and kept and path.name < kept[0].name:
            shutil.rmtree(path)


def latest_checkpoint(folder: Path, key: str) -> Checkpoint | None:
    """The newest checkpoint whose manifest carries `key` and whose files verify; None where there is none."""
    for path in _newest_first(folder):
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            files = {name: FileEntry(**entry) for name, entry in manifest["files"].items()}
            step, found_key = int(manifest["step"]), manifest["key"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: unfinished or damaged checkpoint passed over (%s)", path, error)
            continue
        if found_key != key:
            continue
        if problems := verify_files(path, files):
            log.warning("%s: damaged checkpoint passed over (%s)", path, problems[0])
            continue
        return Checkpoint(path, step)
    return None


def _newest_first(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)), reverse=True)
