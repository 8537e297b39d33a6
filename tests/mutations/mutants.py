"""The list of mutants: small wrong programs, each with the tests that must notice it.

They stand in the TOML files beside this one. An entry's `text` occurs exactly once in its `file`; `mutated` takes its
place; `tests` are pytest node ids.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Mutant:
    """One change of one file, and the tests that must fail under it."""

    name: str
    file: str
    text: str
    mutated: str
    tests: tuple[str, ...]

    def apply(self, source: str) -> str:
        """`source` with the change made; ValueError where the list is stale."""
        count = source.count(self.text)
        if count != 1:
            raise ValueError(f"{self.name}: its text occurs {count} times in {self.file}, not once")
        return source.replace(self.text, self.mutated)


def all_mutants() -> list[Mutant]:
    """Every mutant of the list, in the order of the files' names."""
    entries = [
        entry
        for path in sorted(FOLDER.glob("*.toml"))
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    ]
    return [Mutant(**(entry | {"tests": tuple(entry["tests"])})) for entry in entries]
