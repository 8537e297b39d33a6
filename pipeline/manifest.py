"""What the chain records of a finished stage: its manifest, from the stage's result and the files it left."""

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path

from data.artifacts import MANIFEST, Artifact, Parent, hash_files, sha256_file
from pipeline.inputs import package_version
from stages.core.context import StageResult

_VERSIONED = ("rlhf-pipeline", "torch", "transformers", "trl", "peft")


def describe(folder: Path, *, stage: str, key: str, result: StageResult, parents: Sequence[Path]) -> Artifact:
    """The manifest of a stage whose files stand in `folder`; metrics that are not finite are left out."""
    sources = dict.fromkeys([*parents, *result.parents])
    return Artifact(
        kind=result.kind,
        stage=stage,
        key=key,
        parents=[Parent(str(source), sha256_file(source / MANIFEST)) for source in sources],
        files=hash_files(folder),
        tokenizer_sha256=_tokenizer_sha256(folder / "weights"),
        chat_template_sha256=_chat_template_sha256(folder / "weights"),
        metrics={name: float(value) for name, value in result.metrics.items() if math.isfinite(value)},
        versions={"python": platform.python_version(), **{name: package_version(name) for name in _VERSIONED}},
    )


def _tokenizer_sha256(weights: Path) -> str | None:
    path = weights / "tokenizer.json"
    return sha256_file(path) if path.is_file() else None


def _chat_template_sha256(weights: Path) -> str | None:
    """The digest of the template's text, which tokenizers save beside their config or in it."""
    path = weights / "chat_template.jinja"
    if path.is_file():
        return sha256_file(path)
    config = weights / "tokenizer_config.json"
    template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None
