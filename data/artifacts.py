"""Artifacts: what a stage leaves behind, published atomically and verified when read.

A folder is finished when it holds `artifact.json`, which is written last and names the sha256 of every file it covers.
Readers trust the manifest, never a folder's name. Durability: each file and folder is fsynced before the rename that
makes it visible (see "Files are hard", Pillai et al., OSDI 2014).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.errors import UserError

MANIFEST = "artifact.json"
# What was paid for or clicked, in a stage's folder: it outlives every rebuild of the stage.
LEDGER_FILES = ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", "links.json")
# Not part of a stage's result: resumable state, tracker logs, what a rollout server was handed and says, the ledger.
UNCOVERED = ("checkpoints", "trackers", "engine", *LEDGER_FILES)


@dataclass(frozen=True)
class FileEntry:
    """Size and digest of one covered file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Parent:
    """An artifact that this one was made from; `sha256` is that of its manifest."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """The content of `artifact.json`."""

    kind: str
    stage: str
    key: str
    parents: list[Parent] = field(default_factory=list[Parent])
    files: dict[str, FileEntry] = field(default_factory=dict[str, FileEntry])
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    versions: dict[str, str] = field(default_factory=dict[str, str])


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """Hex sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fsync_path(path: Path) -> None:
    """Flushes one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flushes every file and folder below `folder`, and `folder` itself."""
    for root, _, names in os.walk(folder):
        for name in names:
            fsync_path(Path(root, name))
        fsync_path(Path(root))


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_path(path.parent)


def publish_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a temporary folder beside `target`, flushes it, and renames it into place.

    An existing `target` is replaced; a crash leaves it, or the new one, or neither plus a temporary folder that the
    next call removes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left_over in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(left_over)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        write(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_tree(temporary)
    displaced = target.with_name(f".{target.name}.tmp-old")
    if target.exists():
        target.rename(displaced)
    try:
        temporary.rename(target)
    except OSError:
        if displaced.exists():
            displaced.rename(target)
        raise
    fsync_path(target.parent)
    if displaced.exists():
        shutil.rmtree(displaced)


def hash_files(folder: Path, skip: Iterable[str] = (MANIFEST, *UNCOVERED)) -> dict[str, FileEntry]:
    """Size and sha256 of every file below `folder`, but for the top-level names in `skip`, by relative POSIX path."""
    skipped = set(skip)
    entries: dict[str, FileEntry] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and relative.parts[0] not in skipped:
            entries[relative.as_posix()] = FileEntry(path.stat().st_size, sha256_file(path))
    return entries


def write_manifest(folder: Path, artifact: Artifact) -> None:
    """Flushes `folder` and writes `artifact.json` last: from here on the stage counts as finished."""
    fsync_tree(folder)
    write_atomically(folder / MANIFEST, json.dumps(asdict(artifact), indent=2, sort_keys=True) + "\n")


def read_manifest(folder: Path) -> Artifact:
    """The manifest of a finished artifact, its files not yet checked.

    Raises UserError where the folder is not a finished artifact or the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: no {MANIFEST}, so this is not a finished stage; run the stage that makes it first")
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fields["files"] = {name: FileEntry(**entry) for name, entry in fields["files"].items()}
        fields["parents"] = [Parent(**parent) for parent in fields["parents"]]
        return Artifact(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged manifest ({error}); remove the folder and run the stage again") from error


def verify_files(folder: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """One line for each covered file that is missing, of another size, or of another content."""
    problems: list[str] = []
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing; run the stage again")
        elif path.stat().st_size != entry.bytes:
            problems.append(f"{path}: {path.stat().st_size} bytes, {entry.bytes} expected; run the stage again")
        elif sha256_file(path) != entry.sha256:
            problems.append(f"{path}: its sha256 is not the manifest's; run the stage again")
    return problems


def read_artifact(folder: Path, *, kind: str | None = None) -> Artifact:
    """The verified manifest of a finished artifact.

    Raises UserError where it is unfinished, damaged, or not of `kind`.
    """
    artifact = read_manifest(folder)
    if kind is not None and artifact.kind != kind:
        raise UserError(f"{folder}: a {artifact.kind} (from stage {artifact.stage}), where a {kind} is needed")
    if problems := verify_files(folder, artifact.files):
        raise UserError(*problems)
    return artifact
