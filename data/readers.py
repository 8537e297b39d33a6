"""Files and hub datasets -> records, one value a row, each with its origin; what cannot be read is refused, not lost.

Origins are `file:n`. n is the line in JSONL and in a JSON array (`n#k` for the k-th item, where a line holds
several); the row, counted from 1 without the header, in CSV, Parquet, hub datasets and a JSON object's `data`.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.hub import require_on_hub
from data.rows import RowError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Record:
    """One row as it stands in its source: any JSON value, or the error that kept it from being one."""

    origin: str
    value: Any
    raw: str = ""  # the row's text where `value` is an error


def has_known_suffix(path: str) -> bool:
    """Whether the name ends like a file that can be read here."""
    return path.lower().endswith(SUFFIXES)


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file, in order.

    Raises UserError where the file cannot be read at all: missing, of an unknown kind, or broken so that its rows
    cannot be told apart.
    """
    name = path.name.lower()
    try:
        if name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_json_lines(path)
        elif name.endswith(".json"):
            yield from _read_json(path)
        elif name.endswith(".csv"):
            yield from _read_csv(path)
        elif name.endswith(".parquet"):
            yield from _read_parquet(path)
        else:
            raise UserError(f"{path}: unknown kind of file; use one of {', '.join(SUFFIXES)}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); mend or replace the file") from error


def _read_json_lines(path: Path) -> Iterator[Record]:
    if path.name.lower().endswith(".gz"):
        with gzip.open(path, "rb") as file:
            yield from _json_lines(path, _until_damage(file))
    else:
        with path.open("rb") as file:
            yield from _json_lines(path, file)


def _until_damage(file: gzip.GzipFile) -> Iterator[bytes | RowError]:
    """The lines of a compressed file up to where it is cut off or damaged, then one error for the rest."""
    read_any = False
    while True:
        try:
            line = file.readline()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            if not read_any:
                raise OSError(f"not a whole gzip file: {error}") from error
            yield RowError(f"the compressed file is damaged from here on ({error}); the rows after it are lost")
            return
        if not line:
            return
        read_any = True
        yield line


def _json_lines(path: Path, lines: Iterable[bytes | RowError]) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        origin = f"{path}:{number}"
        if isinstance(line, RowError):
            yield Record(origin, line)
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            yield Record(origin, json.loads(line.decode("utf-8")))
        except UnicodeDecodeError as error:
            reason = RowError(f"not UTF-8 (byte {error.start + 1} of the line)")
            yield Record(origin, reason, line.decode("utf-8", "replace"))
        except (ValueError, RecursionError) as error:
            yield Record(origin, RowError(f"not JSON ({error})"), line.decode("utf-8", "replace"))


def _read_json(path: Path) -> Iterator[Record]:
    """The items of a JSON array, of an object's `data`, or of JSON lines in a file that is only called .json."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start + 1}); save it as UTF-8") from error
    if text.lstrip(_SPACE).startswith("["):
        yield from _json_array(path, text)
        return
    try:
        whole = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply to be rows") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip(_SPACE).startswith("{"):
            yield from _json_lines(path, text.encode().splitlines(keepends=True))
            return
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); mend the file") from error
    items: object = whole.get("data") if isinstance(whole, dict) else None
    if not isinstance(items, list):
        raise UserError(f'{path}: a JSON file of rows is a list, or an object with the rows under "data"')
    for number, item in enumerate(items, start=1):
        yield Record(f"{path}:{number}", item)


def _json_array(path: Path, text: str) -> Iterator[Record]:
    """The items of a top-level array, each with the line that it begins on."""
    decoder = json.JSONDecoder()
    position = _skip_space(text, text.index("[") + 1)
    line, counted, number, last_line = 1, 0, 0, 0
    closed = text.startswith("]", position)
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{line}: not JSON ({error}); mend the file") from error
        number += 1
        yield Record(f"{path}:{line}#{number}" if line == last_line else f"{path}:{line}", value)
        last_line = line
        position = _skip_space(text, position)
        closed = text.startswith("]", position)
        if not closed and not text.startswith(",", position):
            raise UserError(f"{path}:{line}: not JSON (no comma or ] after the item that begins here); mend the file")
        position = _skip_space(text, position + 1)
    if position != len(text):
        raise UserError(f"{path}: not JSON (text after the closing ]); mend the file")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


def _read_csv(path: Path) -> Iterator[Record]:
    # The default limit of 128 KiB a field would refuse long transcripts.
    csv.field_size_limit(2**31 - 1)
    # surrogateescape marks bytes that are not UTF-8, so that only their own row is refused.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}:1: the header is not CSV ({error}); mend the file") from error
        if not header:
            raise UserError(f"{path}: no header; the first line of a CSV file names the columns")
        yield from _csv_rows(path, reader, header)


def _csv_rows(path: Path, reader: Any, header: list[str]) -> Iterator[Record]:
    number = 0
    while True:
        number, first_line = number + 1, reader.line_num + 1
        origin = f"{path}:{number}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if reader.line_num > first_line:
                raise UserError(
                    f"{path}: the quotes do not match between line {first_line} and line {reader.line_num} ({error}); "
                    "mend the file"
                ) from error
            yield Record(origin, RowError(f"not CSV ({error})"))
            continue
        if cells is None:
            return
        if not cells:  # a blank line is no row
            number -= 1
        elif len(cells) != len(header):
            reason = RowError(f"{len(cells)} cells, the header has {len(header)}")
            yield Record(origin, reason, ",".join(cells))
        else:
            yield Record(origin, dict(zip(header, cells, strict=True)))


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}:{number}", value)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a whole Parquet file ({error}); replace it") from error


def read_hub(path: str, subset: str | None, split: str) -> Iterator[Record]:
    """The records of one split of a hub dataset, or of a folder that `save_to_disk` wrote.

    Raises UserError naming the id where it cannot be had.
    """
    import datasets

    try:
        if Path(path).is_dir():
            loaded: Any = datasets.load_from_disk(path)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            require_on_hub(path, "dataset")
            rows = datasets.load_dataset(path, subset, split=split)
    except KeyError as error:
        raise UserError(f"{path}: no split {split!r}; set split to one it has") from error
    except (OSError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: neither a file here nor a dataset that can be loaded from the hub ({first_line}); "
            "check the path, subset and split, and the network"
        ) from error
    for number, value in enumerate(rows, start=1):
        yield Record(f"{path}/{split}:{number}", value)
