"""Reads rows from files and the hub. (interface fixed; body to be written)"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from data.paths import ConfigPath


class SourceConfig(BaseModel):
    """One source of rows in a config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: ConfigPath
    columns: dict[str, str] = {}
    weight: float = 1.0
    split: str = "train"
    subset: str | None = None
    layout: Literal["rows", "ranked_tree", "text"] = "rows"
    prompt_words: int = 8
