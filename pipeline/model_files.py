"""A model's config.json, found without the network and without its weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from pipeline.inputs import is_path
from stages.core.known_models import known_config


def cached_file(hub_id: str, name: str) -> Path | None:
    """A hub file that an earlier download left on this disk."""
    if is_path(hub_id):
        return None
    found = try_to_load_from_cache(hub_id, name)
    return Path(found) if isinstance(found, str) else None


def model_config(source: str) -> Mapping[str, Any] | None:
    """The config of a model folder, stage folder, adapter or hub id; None where it is not on this disk."""
    folder = Path(source)
    for place in (folder / "weights", folder):
        if (place / "config.json").is_file():
            return _read(place / "config.json")
        if (place / "adapter_config.json").is_file():
            return model_config(_read(place / "adapter_config.json")["base_model_name_or_path"])
    cached = None if folder.is_dir() else cached_file(source, "config.json")
    return _read(cached) if cached is not None else known_config(source)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
