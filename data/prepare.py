"""Sources -> encoded train and holdout rows: read, deduplicated, split, encoded, fitted, and all of it counted."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

from data.chat import ChatEncoder
from data.encoded import EncodedDemonstration, EncodedPreference, EncodedPrompt, FitCounts
from data.report import DataReport
from data.rows import Demonstration, Preference, Prompt, Refusal, Row, RowError
from data.sources import SourceConfig, SourceCount, SourceRows, read_source, shortened, weighted

RowT = TypeVar("RowT", Demonstration, Preference, Prompt)
EncodedT = TypeVar("EncodedT", EncodedDemonstration, EncodedPreference, EncodedPrompt)


@dataclass(frozen=True)
class Prepared(Generic[EncodedT]):
    """What a stage trains on, what it holds out, and the account of every row."""

    train: list[EncodedT]
    holdout: list[EncodedT]
    report: DataReport


def prepare_demonstrations(
    sources: Sequence[SourceConfig],
    holdout: float | SourceConfig,
    *,
    encoder: ChatEncoder,
    run_folder: Path,
    seed: int,
) -> Prepared[EncodedDemonstration]:
    """Train and holdout demonstrations; `holdout` is a share of the rows or a source of its own."""
    split = _read_and_split(Demonstration, sources, holdout, run_folder=run_folder, seed=seed)
    return _encode_split(split, encoder, lambda row: encoder.fit(encoder.demonstration(row)))


def prepare_preferences(
    sources: Sequence[SourceConfig],
    holdout: float | SourceConfig,
    *,
    encoder: ChatEncoder,
    run_folder: Path,
    seed: int,
) -> Prepared[EncodedPreference]:
    """Train and holdout preference pairs; `holdout` is a share of the rows or a source of its own."""
    split = _read_and_split(Preference, sources, holdout, run_folder=run_folder, seed=seed)
    return _encode_split(split, encoder, lambda row: encoder.fit(encoder.preference(row)))


def prepare_prompts(
    sources: Sequence[SourceConfig],
    holdout: float | SourceConfig,
    *,
    encoder: ChatEncoder,
    run_folder: Path,
    seed: int,
    max_prompt_tokens: int,
) -> Prepared[EncodedPrompt]:
    """Train and holdout prompts of at most `max_prompt_tokens`; longer ones go by the encoder's overlong policy."""
    split = _read_and_split(Prompt, sources, holdout, run_folder=run_folder, seed=seed)
    return _encode_split(split, encoder, lambda row: encoder.prompt(row, max_prompt_tokens))


@dataclass(frozen=True)
class _Split(Generic[RowT]):
    """Rows before encoding; train rows by source, because each source has its weight."""

    train: list[SourceRows[RowT]]
    holdout: list[RowT]
    report: DataReport
    seed: int


def _read_and_split(
    kind: type[RowT],
    sources: Sequence[SourceConfig],
    holdout: float | SourceConfig,
    *,
    run_folder: Path,
    seed: int,
) -> _Split[RowT]:
    report = DataReport()
    read = [read_source(kind, source, run_folder=run_folder) for source in sources]
    train = _without_duplicates(read, report)
    held_out: list[RowT] = []
    if isinstance(holdout, SourceConfig):
        own = read_source(kind, holdout, run_folder=run_folder)
        read.append(own)
        held_out = weighted(_without_duplicates([own], report)[0].rows, holdout.weight, seed=f"{seed}:holdout")
        contents = {_content_key(row) for row in own.rows}
        kept = [_with_rows(part, [row for row in part.rows if _content_key(row) not in contents]) for part in train]
        report.overlap = sum(len(part.rows) for part in train) - sum(len(part.rows) for part in kept)
        train = kept
    elif holdout > 0:
        prompts = _held_out_prompts([row for part in train for row in part.rows], share=holdout, seed=seed)
        held_out = [row for part in train for row in part.rows if _prompt_key(row) in prompts]
        train = [_with_rows(part, [row for row in part.rows if _prompt_key(row) not in prompts]) for part in train]
    report.refused = [refusal for part in read for refusal in part.refused]
    report.sources = [SourceCount(part.source.path, part.read, len(part.refused), 0) for part in read]
    return _Split(train, held_out, report, seed)


def _with_rows(part: SourceRows[RowT], rows: list[RowT]) -> SourceRows[RowT]:
    return SourceRows(part.source, rows, part.refused)


def _without_duplicates(parts: Sequence[SourceRows[RowT]], report: DataReport) -> list[SourceRows[RowT]]:
    """The parts with only the first of rows that are the same in everything but their origin."""
    seen: set[str] = set()
    result: list[SourceRows[RowT]] = []
    for part in parts:
        first: list[RowT] = []
        for row in part.rows:
            key = _digest({**asdict(row), "origin": ""})
            report.duplicates += key in seen
            if key not in seen:
                seen.add(key)
                first.append(row)
        result.append(_with_rows(part, first))
    return result


def _digest(value: object) -> str:
    # Parquet and hub rows may carry dates in their extra columns; their text stands for them.
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _content_key(row: Row) -> str:
    """Equal for rows that would leak into each other: a pair with its sides swapped counts as the same."""
    if isinstance(row, Demonstration):
        return _digest([row.prompt, row.response])
    if isinstance(row, Preference):
        return _digest([row.prompt, *sorted([_digest(row.chosen), _digest(row.rejected)])])
    return _prompt_key(row)


def _prompt_key(row: Row) -> str:
    return _digest(row.prompt)


def _held_out_prompts(rows: Sequence[Row], *, share: float, seed: int) -> set[str]:
    """The prompts of a seeded `share` of the rows: whole prompts, so that none stands on both sides.

    Prompts are taken in the order of a seeded hash while they fit; at least one is, where there are two.
    """
    num_rows: dict[str, int] = {}
    for row in rows:
        key = _prompt_key(row)
        num_rows[key] = num_rows.get(key, 0) + 1
    if len(num_rows) < 2:
        return set()
    order = sorted(num_rows, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    room = max(1, round(share * len(rows)))
    taken: set[str] = set()
    for key in order:
        if num_rows[key] <= room:
            taken.add(key)
            room -= num_rows[key]
    return taken or {min(order, key=lambda key: num_rows[key])}


def _encode_split(
    split: _Split[RowT], encoder: ChatEncoder, encode: Callable[[RowT], EncodedT | None]
) -> Prepared[EncodedT]:
    report = split.report
    encoder.counts = report.fit = FitCounts()
    holdout = _encode_rows(split.holdout, encode, report)
    train: list[EncodedT] = []
    for place, part in enumerate(split.train):
        encoded = _encode_rows(part.rows, encode, report)
        report.lengths.extend(row.length for row in encoded)
        used = weighted(encoded, part.source.weight, seed=f"{split.seed}:{place}")
        train.extend(used)
        report.sources[place] = SourceCount(
            part.source.path, report.sources[place].read, report.sources[place].refused, len(used)
        )
    report.train, report.holdout = len(train), len(holdout)
    return Prepared(train, holdout, report)


def _encode_rows(rows: Sequence[RowT], encode: Callable[[RowT], EncodedT | None], report: DataReport) -> list[EncodedT]:
    """The rows that fit; one that the chat template refuses joins the refused ones."""
    kept: list[EncodedT] = []
    for row in rows:
        try:
            encoded = encode(row)
        except RowError as error:
            report.refused.append(Refusal(row.origin, str(error), shortened({**asdict(row), "origin": row.origin})))
            continue
        if encoded is not None:
            kept.append(encoded)
    return kept
