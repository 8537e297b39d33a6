"""What stands in a stage's folder, and hence what a launch does about it. Reads only; `chain` acts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.artifacts import LEDGER_FILES, MANIFEST, read_artifact, read_manifest
from data.errors import UserError
from pipeline.inputs import changed_facts, stage_key

Resume = Literal["auto", "never", "must"]
FACTS_FILE = "inputs.json"


@dataclass(frozen=True)
class Decision:
    """What a launch would do about a stage, and why."""

    action: Literal["skip", "resume", "build"]
    why: str
    displace: bool = False  # what stands there is moved to <stage>.old first


def decide(folder: Path, facts: Mapping[str, Any], *, resume: Resume) -> Decision:
    """Whether the stage is skipped, resumed or built. Raises UserError where `resume` is must and nothing can be."""
    decision = _finished(folder, facts) if (folder / MANIFEST).is_file() else _partial(folder, facts, resume=resume)
    if resume == "must" and decision.action == "build":
        raise UserError(f"--resume must: {folder} cannot be resumed ({decision.why}); use --resume auto to build it")
    return decision


def _finished(folder: Path, facts: Mapping[str, Any]) -> Decision:
    try:
        same = read_manifest(folder).key == stage_key(facts)
        if same:
            read_artifact(folder)
            return Decision("skip", "already built")
    except UserError as error:
        return Decision("build", f"damaged: {error.problems[0]}", displace=True)
    return Decision("build", _what_changed(folder, facts), displace=True)


def _partial(folder: Path, facts: Mapping[str, Any], *, resume: Resume) -> Decision:
    if not folder.is_dir():
        return Decision("build", "not built yet")
    if not has_checkpoints(folder):
        return Decision("build", "begun, but without a checkpoint")
    if _recorded(folder) != facts:
        return Decision("build", _what_changed(folder, facts), displace=True)
    if resume == "never":
        return Decision("build", "--resume never", displace=True)
    return Decision("resume", "unfinished, has checkpoints")


def has_checkpoints(folder: Path) -> bool:
    """Whether a stage has saved anything to resume from; labelling saves every verdict."""
    if folder.name == "label" and (folder / LEDGER_FILES[0]).is_file():
        return True
    return (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir())


def _what_changed(folder: Path, facts: Mapping[str, Any]) -> str:
    recorded = _recorded(folder)
    if recorded is None:
        return f"changed: no readable {FACTS_FILE} says from what it was built"
    return f"changed: {'; '.join(changed_facts(recorded, facts)) or 'its manifest names another key'}"


def _recorded(folder: Path) -> dict[str, Any] | None:
    """The facts that the folder's content was built from; None where they cannot be read."""
    try:
        return json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
