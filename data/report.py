"""What became of the rows that a stage read: counted, said in words, and the refused ones kept in quarantine.jsonl."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.artifacts import write_atomically
from data.encoded import FitCounts
from data.errors import UserError
from data.rows import Refusal
from data.sources import SourceCount

_SHOWN = 3


@dataclass
class DataReport:
    """Counts of one stage's rows, train and holdout together.

    read = refused + duplicates + overlap + the rows that were encoded, before weights repeat or thin them.
    """

    refused: list[Refusal] = field(default_factory=list[Refusal])
    sources: list[SourceCount] = field(default_factory=list[SourceCount])
    duplicates: int = 0
    overlap: int = 0  # train rows removed because the holdout holds them
    fit: FitCounts = field(default_factory=FitCounts)
    lengths: list[int] = field(default_factory=list[int])  # tokens of the kept train rows
    train: int = 0
    holdout: int = 0

    @property
    def read(self) -> int:
        """Rows read, refused ones included."""
        return sum(source.read for source in self.sources)

    def summary(self) -> str:
        """One line for logs."""
        refused = f"{len(self.refused)} refused"
        if self.refused:
            reason, times = Counter(refusal.reason for refusal in self.refused).most_common(1)[0]
            refused += f" (most often: {reason}, {times}x)"
        return (
            f"{self.read} rows read, {refused}, {self.duplicates} duplicates, {self.overlap} also in the holdout, "
            f"{self.fit.dropped} too long, {self.fit.prompt_truncated} prompts and {self.fit.response_truncated} "
            f"responses cut; {self.train} rows to use, {self.holdout} held out"
        )

    def write_quarantine(self, path: Path) -> None:
        """Writes one JSON object a refused row: origin, reason, row."""
        lines = (json.dumps(asdict(refusal), ensure_ascii=False) for refusal in self.refused)
        write_atomically(path, "".join(f"{line}\n" for line in lines))

    def check_refused(self, max_refused: float) -> None:
        """Raises UserError where more than `max_refused` of the rows read were refused, or none is left."""
        if len(self.refused) <= max_refused * self.read:
            self._check_train()
            return
        share = len(self.refused) / self.read
        shown = "; ".join(f"{refusal.origin}: {refusal.reason}" for refusal in self.refused[:_SHOWN])
        raise UserError(
            f"{len(self.refused)} of {self.read} rows ({share:.1%}) were refused, more than max_refused={max_refused}; "
            f"mend the rows or the columns, or raise max_refused. First: {shown}"
        )

    def _check_train(self) -> None:
        if not self.train:
            paths = ", ".join(source.path for source in self.sources)
            raise UserError(f"no rows left to use from {paths}: {self.summary()}")
