"""Where a path in a config points: beside the config file first, then the working directory; `stage:` names a stage's
folder in the same run."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

from data.errors import UserError

STAGE_PREFIX = "stage:"


def absolute_path(value: str, folders: Sequence[Path]) -> str:
    """`value` made absolute against the first of `folders` that holds it; unchanged where none does (a hub id).

    Understands globs and `file.py:function`.
    """
    if value.startswith(STAGE_PREFIX) or "://" in value:
        return value
    name, colon, function = value.partition(":") if ".py:" in value else (value, "", "")
    for folder in folders:
        candidate = os.path.normpath(folder / Path(name).expanduser())
        if os.path.exists(candidate) or (glob.has_magic(name) and glob.glob(candidate, recursive=True)):
            return f"{candidate}{colon}{function}"
    return value


def _absolute(value: str, info: ValidationInfo) -> str:
    folders: Sequence[Path] = (info.context or {}).get("folders", ())
    return absolute_path(value, folders)


ConfigPath = Annotated[str, AfterValidator(_absolute)]
"""A path in a config; made absolute while the config is read, with `context={"folders": […]}`."""


def in_run(value: str, run_folder: Path) -> str:
    """`value` with a leading `stage:` replaced by the run folder."""
    if not value.startswith(STAGE_PREFIX):
        return value
    relative = Path(value.removeprefix(STAGE_PREFIX))
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"{value}: leaves the run folder; name a stage and a file in it, as in stage:toy/prompts.jsonl")
    return str(run_folder / relative)
