"""Reads rows from files and the hub: what a config calls a source becomes rows, and every row refused is kept."""

import glob
import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data.artifacts import sha256_file
from data.errors import UserError
from data.layouts import Spoil, parse_text, parse_tree
from data.parse import parse_row
from data.paths import STAGE_PREFIX, ConfigPath, in_run
from data.readers import SUFFIXES, Record, has_known_suffix, read_hub, read_records
from data.rows import Demonstration, Preference, Prompt, Refusal, RowError

RowT = TypeVar("RowT", Demonstration, Preference, Prompt)
ItemT = TypeVar("ItemT")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LONGEST_QUARANTINED = 500  # characters of a refused row that are kept


class SourceConfig(BaseModel):
    """One source of rows in a config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: ConfigPath = Field(
        description=f"file ({', '.join(SUFFIXES)}), glob, folder, hub id, or stage:<stage>/<file> of the same run"
    )
    columns: dict[str, str] = Field(
        {}, description='our column -> theirs, or a format of theirs such as "{instruction}\\n{input}"'
    )
    weight: Annotated[float, Field(gt=0)] = Field(
        1.0, description="how often each row counts: 2 = twice, 0.5 = a seeded half of the rows"
    )
    split: str = Field("train", description="split of a hub dataset, or of a folder saved by datasets")
    subset: str | None = Field(None, description="configuration of a hub dataset")
    layout: Literal["rows", "ranked_tree", "text"] = Field(
        "rows",
        description="rows: one object a row; ranked_tree: OpenAssistant message trees; "
        "text: strings, or a `text` column, split into an opening and the rest",
    )
    prompt_words: Annotated[int, Field(ge=1)] = Field(8, description="words of a text that make its prompt")
    spoil: Spoil | None = Field(
        None,
        description="layout text as preference pairs: chosen is the text's rest, rejected the same rest with its "
        "sentences shuffled (shuffle) or broken off (cut)",
    )

    @model_validator(mode="after")
    def _spoil_needs_text(self) -> Self:
        if self.spoil is not None and self.layout != "text":
            raise ValueError(f"spoil={self.spoil} makes pairs of plain text only; set layout: text or leave it out")
        return self


@dataclass(frozen=True)
class SourceRows(Generic[RowT]):
    """What one source holds, before its weight is applied."""

    source: SourceConfig
    rows: list[RowT]
    refused: list[Refusal]

    @property
    def read(self) -> int:
        """Rows accepted and refused."""
        return len(self.rows) + len(self.refused)


@dataclass(frozen=True)
class SourceCount:
    """How many rows of a source were read and refused, and how many its weight made of the accepted ones."""

    path: str
    read: int
    refused: int
    used: int


@dataclass(frozen=True)
class Loaded(Generic[RowT]):
    """The rows of several sources, in the order of the config and the files."""

    rows: list[RowT]
    refused: list[Refusal]
    counts: list[SourceCount] = field(default_factory=list[SourceCount])


def load_rows(kind: type[RowT], sources: Sequence[SourceConfig], *, run_folder: Path, seed: int) -> Loaded[RowT]:
    """The weighted rows of all sources; accepted and refused rows together are exactly those read."""
    loaded: Loaded[RowT] = Loaded([], [])
    for place, source in enumerate(sources):
        read = read_source(kind, source, run_folder=run_folder)
        used = weighted(read.rows, source.weight, seed=f"{seed}:{place}")
        loaded.rows.extend(used)
        loaded.refused.extend(read.refused)
        loaded.counts.append(SourceCount(source.path, read.read, len(read.refused), len(used)))
    return loaded


def read_source(kind: type[RowT], source: SourceConfig, *, run_folder: Path) -> SourceRows[RowT]:
    """The rows of one source, each once, and the refusals.

    Raises UserError where nothing can be read: no such file, unknown kind, hub out of reach.
    """
    if source.layout == "text" and kind is Preference and source.spoil is None:
        raise UserError(
            f"{source.path}: layout text holds no preference pairs; set spoil: shuffle or cut to make them, "
            "or use layout rows or ranked_tree"
        )
    result: SourceRows[RowT] = SourceRows(source, [], [])
    for record in _records(source, run_folder):
        for row in _rows_of(kind, source, record):
            if isinstance(row, RowError):
                result.refused.append(Refusal(record.origin, str(row), shortened(record.raw or record.value)))
            else:
                result.rows.append(row)
    return result


def weighted(rows: Sequence[ItemT], weight: float, *, seed: str) -> list[ItemT]:
    """Each row floor(weight) times, and a seeded choice of the rows once more for the fraction; order is kept."""
    times, fraction = divmod(weight, 1.0)
    once_more = set(random.Random(seed).sample(range(len(rows)), round(fraction * len(rows))))
    return [row for place, row in enumerate(rows) for _ in range(int(times) + (place in once_more))]


def shortened(row: object) -> str:
    """The text of a row, cut to what a person needs to find it."""
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
    text = text.strip().encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= _LONGEST_QUARANTINED else text[:_LONGEST_QUARANTINED] + " …"


def content_digest(source: SourceConfig, run_folder: Path) -> str:
    """Hex sha256 of the bytes behind a source, or of id, subset and split where it lies on the hub."""
    files = source_files(source, run_folder)
    if files is None:
        identity = json.dumps([source.path, source.subset, source.split])
        return hashlib.sha256(identity.encode()).hexdigest()
    return hashlib.sha256("\n".join(sha256_file(path) for path in files).encode()).hexdigest()


def source_files(source: SourceConfig, run_folder: Path) -> list[Path] | None:
    """The files behind a source in a fixed order; None for a hub id. Raises UserError where there are none."""
    path = in_run(source.path, run_folder)
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        saved = _saved_by_datasets(Path(path))
        found = [file for file in sorted(Path(path).rglob("*")) if file.is_file()]
        found = found if saved else [file for file in found if has_known_suffix(file.name)]
    elif glob.has_magic(path):
        found = [Path(name) for name in sorted(glob.glob(path, recursive=True)) if Path(name).is_file()]
    elif source.path.startswith(STAGE_PREFIX):
        raise UserError(f"{source.path}: no such file in {run_folder}; run the stage that writes it first")
    elif _HUB_ID.fullmatch(path) and not has_known_suffix(path):
        return None
    else:
        raise UserError(
            f"{source.path}: no such file; paths are looked up beside the config, then in the working folder"
        )
    if not found:
        raise UserError(f"{source.path}: matches no file that can be read; known are {', '.join(SUFFIXES)}")
    return found


def _saved_by_datasets(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _records(source: SourceConfig, run_folder: Path) -> Iterator[Record]:
    files = source_files(source, run_folder)
    path = in_run(source.path, run_folder)
    if files is None or (Path(path).is_dir() and _saved_by_datasets(Path(path))):
        yield from read_hub(path, source.subset, source.split)
        return
    for file in files:
        yield from read_records(file)


def _rows_of(kind: type[RowT], source: SourceConfig, record: Record) -> Iterator[RowT | RowError]:
    if isinstance(record.value, RowError):
        yield record.value
        return
    try:
        if source.layout == "ranked_tree":
            yield from parse_tree(kind, record.value, record.origin)
        elif source.layout == "text":
            yield parse_text(
                kind,
                record.value,
                columns=source.columns,
                prompt_words=source.prompt_words,
                spoil=source.spoil,
                origin=record.origin,
            )
        else:
            yield parse_row(kind, record.value, columns=source.columns, origin=record.origin)
    except RowError as error:
        yield error
