"""The ledger of a labelling run: every question asked, and every verdict that a judge or a person gave, in SQLite.

A verdict counts once `record` has returned: it is committed and flushed by then (WAL, synchronous=FULL), so a killed
run loses none and asks nothing again that was answered. Nothing is ever changed or deleted: an undo is a row of its own
that withdraws a verdict. Several processes of one machine may write one ledger; a network file system is no place for
it.

Questions are keyed by their content: whatever changes the answer is hashed into the key (see `content_key`).
"""

import contextlib
import json
import math
import sqlite3
import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from data.artifacts import sha256_json
from data.errors import UserError

LEDGER = "ledger.sqlite"  # in the folder of the stage that asks
_FORMAT = 1
_BUSY_SECONDS = 30.0  # how long a write waits for another process's

_TABLES = """
CREATE TABLE questions (key TEXT PRIMARY KEY, content TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE verdicts (
  id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL REFERENCES questions (key), source TEXT NOT NULL,
  attempt INTEGER NOT NULL, verdict TEXT NOT NULL, raw TEXT NOT NULL, usage TEXT NOT NULL, created TEXT NOT NULL,
  UNIQUE (key, source, attempt)
);
CREATE TABLE withdrawals (verdict INTEGER PRIMARY KEY REFERENCES verdicts (id), created TEXT NOT NULL);
CREATE TABLE quarantine (
  id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL REFERENCES questions (key), source TEXT NOT NULL,
  cause TEXT NOT NULL, raw TEXT NOT NULL, created TEXT NOT NULL
);
CREATE TABLE charges (
  id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL REFERENCES questions (key), source TEXT NOT NULL,
  usage TEXT NOT NULL, created TEXT NOT NULL
);
CREATE TABLE claims (
  item TEXT NOT NULL, source TEXT NOT NULL, created TEXT NOT NULL, PRIMARY KEY (item, source)
) WITHOUT ROWID;
"""
_STANDING = "SELECT v.* FROM verdicts v WHERE v.id NOT IN (SELECT verdict FROM withdrawals)"


@dataclass(frozen=True)
class Verdict:
    """One verdict as it stands in the ledger; `value` is JSON: "A", "B", "tie", "skip", or a number of points."""

    id: int
    key: str
    source: str  # judge:<model> | annotator:<name>
    value: Any
    raw: str  # the answer as it came
    created: str  # UTC, ISO 8601
    usage: dict[str, float] = field(default_factory=dict[str, float])  # tokens and cost, as far as they were told


@dataclass(frozen=True)
class Quarantined:
    """A question that got no usable answer, and why."""

    key: str
    source: str
    cause: str
    raw: str
    created: str


def content_key(content: Mapping[str, Any]) -> str:
    """Hex sha256 of a question's content, independent of the order of its fields."""
    return sha256_json(content)


class Ledger:
    """The questions, verdicts, withdrawals and quarantine of one run; safe to use from several threads.

    Raises UserError where the file is damaged or is no ledger.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = threading.RLock()
        try:
            # Autocommit: every transaction below is begun and ended in plain sight.
            self._db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._open()
        except sqlite3.OperationalError as error:
            raise UserError(f"{path}: the ledger cannot be written here ({error})") from error
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise UserError(f"{path}: not a ledger of this version, or damaged ({error}); move it away") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; what was recorded is on the disk already."""
        self._db.close()

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Commits what is entered inside all at once, at the end: one flush of the disk for many verdicts."""
        return self._transaction()

    def ask(self, key: str, content: Mapping[str, Any]) -> None:
        """Enters a question; one that is known already is left as it is."""
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO questions VALUES (?, ?)", (key, _json(content)))

    def record(
        self, key: str, source: str, value: Any, *, raw: str = "", usage: Mapping[str, float] | None = None
    ) -> Verdict:
        """The standing verdict of `source` on a question: this one, or the one that stood there already.

        On return it is on the disk. The question must have been asked.
        """
        with self._transaction():
            standing = self.standing(key, source)
            if standing is not None:
                return standing
            attempts = self._one("SELECT count(*) FROM verdicts WHERE key = ? AND source = ?", (key, source))
            row = (key, source, attempts, _json(value), _storable(raw), _json(usage or {}), _now())
            columns = "(key, source, attempt, verdict, raw, usage, created)"
            self._db.execute(f"INSERT INTO verdicts {columns} VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            recorded = self.standing(key, source)
            assert recorded is not None
        return recorded

    def standing(self, key: str, source: str) -> Verdict | None:
        """The verdict of `source` on a question that is not withdrawn, if there is one."""
        found = self._rows(f"{_STANDING} AND v.key = ? AND v.source = ?", (key, source))
        return _verdict(found[0]) if found else None

    def verdicts(self, prefix: str = "") -> list[Verdict]:
        """Every verdict that is not withdrawn, of the sources whose name begins with `prefix`, oldest first."""
        rows = self._rows(f"{_STANDING} AND substr(v.source, 1, ?) = ? ORDER BY v.id", (len(prefix), prefix))
        return [_verdict(row) for row in rows]

    def withdraw(self, verdict: int) -> None:
        """Withdraws a verdict, which stays readable in its table; withdrawing it twice changes nothing."""
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO withdrawals VALUES (?, ?)", (verdict, _now()))

    def withdrawn(self, source: str) -> list[str]:
        """The keys whose verdict `source` withdrew and has not given again, the last withdrawn last."""
        rows = self._rows(
            "SELECT o.key FROM verdicts o JOIN withdrawals w ON w.verdict = o.id WHERE o.source = ? "
            f"AND NOT EXISTS ({_STANDING} AND v.key = o.key AND v.source = o.source) "
            "GROUP BY o.key ORDER BY max(w.created), max(o.id)",
            (source,),
        )
        return [row["key"] for row in rows]

    def question(self, key: str) -> dict[str, Any] | None:
        """The content of a question, if it was asked."""
        found = self._rows("SELECT content FROM questions WHERE key = ?", (key,))
        return json.loads(found[0]["content"]) if found else None

    def quarantine(self, key: str, source: str, cause: str, *, raw: str = "") -> None:
        """Notes that a question got no usable answer from `source`, and why."""
        with self._transaction():
            row = (key, source, cause, _storable(raw), _now())
            columns = "(key, source, cause, raw, created)"
            self._db.execute(f"INSERT INTO quarantine {columns} VALUES (?, ?, ?, ?, ?)", row)

    def quarantined(self) -> list[Quarantined]:
        """The newest note on each question and source that still has no standing verdict, oldest first."""
        rows = self._rows(
            "SELECT q.* FROM quarantine q JOIN (SELECT max(id) AS id FROM quarantine GROUP BY key, source) newest "
            f"ON newest.id = q.id WHERE NOT EXISTS ({_STANDING} AND v.key = q.key AND v.source = q.source) "
            "ORDER BY q.id"
        )
        return [Quarantined(row["key"], row["source"], row["cause"], row["raw"], row["created"]) for row in rows]

    def charge(self, key: str, source: str, usage: Mapping[str, float]) -> None:
        """Notes what an answer cost that gave no verdict; a verdict's own usage stands beside it."""
        with self._transaction():
            columns = "(key, source, usage, created)"
            self._db.execute(f"INSERT INTO charges {columns} VALUES (?, ?, ?, ?)", (key, source, _json(usage), _now()))

    def total(self, name: str, source: str | None = None) -> float:
        """The sum of one figure of `usage` over all answers of a source, or of all; usable or not, withdrawn or not."""
        values = (f'$."{name}"', source, source)
        of_verdicts, of_charges = (
            self._one(f"SELECT total(json_extract(usage, ?)) FROM {table} WHERE ? IS NULL OR source = ?", values)
            for table in ("verdicts", "charges")
        )
        return float(of_verdicts) + float(of_charges)

    def seconds_since_answer(self, source: str) -> float:
        """How long ago the newest answer of a source came, usable or not; infinite where there is none."""
        newest = self._one(
            "SELECT max(created) FROM (SELECT created, source FROM verdicts UNION ALL "
            "SELECT created, source FROM charges) WHERE source = ?",
            (source,),
        )
        if newest is None:
            return math.inf
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(newest)).total_seconds())  # a clock may be set back

    def claim(self, item: str, source: str) -> None:
        """Notes that `item` was handed to `source` to answer; once is enough."""
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO claims VALUES (?, ?, ?)", (item, source, _now()))

    def claims(self) -> list[tuple[str, str]]:
        """Every item with a source that claimed it, in the order of the claims."""
        rows = self._rows("SELECT item, source FROM claims ORDER BY created, item")
        return [(row["item"], row["source"]) for row in rows]

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        with self._transaction():
            version = self._one("PRAGMA user_version")
            if version == 0 and not self._rows("SELECT name FROM sqlite_master"):
                for statement in filter(str.strip, _TABLES.split(";")):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {_FORMAT}")
            elif version != _FORMAT:
                raise sqlite3.DatabaseError(f"format {version}, {_FORMAT} expected")
        found = self._one("PRAGMA quick_check")
        if found != "ok":
            raise sqlite3.DatabaseError(found)

    @contextlib.contextmanager
    def _transaction(self) -> Generator[None]:
        """Holds the one right to write, of all threads and processes; commits at the end, or undoes everything."""
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _rows(self, statement: str, values: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(statement, values).fetchall()

    def _one(self, statement: str, values: tuple[Any, ...] = ()) -> Any:
        return self._rows(statement, values)[0][0]


def _verdict(row: sqlite3.Row) -> Verdict:
    return Verdict(
        id=row["id"],
        key=row["key"],
        source=row["source"],
        value=json.loads(row["verdict"]),
        raw=row["raw"],
        created=row["created"],
        usage=json.loads(row["usage"]),
    )


def _json(value: object) -> str:
    """Raises ValueError on NaN and infinity: neither is a verdict, and no other reader would take them."""
    return json.dumps(value, allow_nan=False)


def _storable(text: str) -> str:
    """The text with lone surrogates spelled out: they have no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
