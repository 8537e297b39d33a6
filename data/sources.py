"""Reads rows from files and the hub. (interface fixed; body to be written)"""

from pydantic import BaseModel, ConfigDict


class SourceConfig(BaseModel):
    """One source of rows in a config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    columns: dict[str, str] = {}
    weight: float = 1.0
