"""Resumable state of a stage: written atomically, verified before it is used, pruned after the new one is safe.

Layout: checkpoints/step-00000050/, its manifest (`checkpoint.json`) last. A damaged or unfinished one is passed over
for the one before.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
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

    target = folder / _name(step)
    publish_folder(target, write_and_seal)
    _prune(target, keep=keep)
    return target


def latest_checkpoint(folder: Path, key: str) -> Checkpoint | None:
    """The newest checkpoint whose manifest carries `key` and whose files verify; None where there is none."""
    for path in _newest_first(folder):
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            files = {name: FileEntry(**entry) for name, entry in manifest["files"].items()}
            step, found_key = int(manifest["step"]), manifest["key"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: unfinished or damaged checkpoint passed over (%s)", path, error)
            continue
        if found_key != key:
            log.warning("%s: checkpoint of other settings or inputs passed over", path)
            continue
        if problems := _problems(path, step, files):
            log.warning("%s: damaged checkpoint passed over (%s)", path, problems[0])
            continue
        return Checkpoint(path, step)
    return None


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _problems(path: Path, step: int, files: Mapping[str, FileEntry]) -> list[str]:
    """What the manifest and the folder disagree on, a line each."""
    problems = verify_files(path, files)
    if path.name != _name(step):
        problems.append(f"{path / MANIFEST}: is that of step {step}")
    present = {each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file()} - {MANIFEST}
    return problems + [f"{path / name}: not in {MANIFEST}" for name in sorted(present - files.keys())]


def _prune(newest: Path, *, keep: int) -> None:
    """Removes all but `newest` and the `keep` - 1 sealed ones before it.

    One after it could not be resumed, or `newest` would have been made from it: it must not count as newer.
    """
    steps = _newest_first(newest.parent)
    older = [path for path in steps if path.name < newest.name and (path / MANIFEST).is_file()]
    kept = [newest, *older[: keep - 1]]
    unfinished = list(newest.parent.glob(".step-*.tmp-*"))  # of a process that was killed while saving
    for path in [*steps, *unfinished]:
        if path not in kept:
            shutil.rmtree(path)


def _newest_first(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)), reverse=True)
