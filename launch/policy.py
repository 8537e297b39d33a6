"""A finished policy as `launch chat` and `launch serve` find it: a stage's folder, a model folder or a hub id."""

from dataclasses import dataclass
from pathlib import Path

from data.artifacts import MANIFEST, read_artifact
from data.errors import UserError
from pipeline.config import load_config
from stages.core.config import SharedConfig


@dataclass(frozen=True)
class FoundPolicy:
    """Where a policy is, and the facts that it was trained with."""

    source: str
    shared: SharedConfig


def find_policy(place: str) -> FoundPolicy:
    """The policy in a folder. Raises UserError for a folder without one, and for a damaged stage."""
    folder = Path(place).expanduser().absolute()
    if not folder.is_dir():
        return FoundPolicy(place, SharedConfig(base_model=place))
    if (folder / MANIFEST).is_file():
        read_artifact(folder, kind="policy")
        return FoundPolicy(str(folder), load_config(str(folder / "config.yaml")).config)
    if (folder / "config.yaml").is_file():
        raise UserError(f"STAGE_DIR={place}: this stage is not finished; launch it again, or name another")
    return FoundPolicy(str(folder), SharedConfig(base_model=str(folder)))
