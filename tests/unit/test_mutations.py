"""The list of mutants fits the project: every text is there once, every named test exists."""

from pathlib import Path

import pytest

from tests.mutations.mutants import Mutant, all_mutants
from tests.mutations.run import Verdict, stale_entries, summary

ROOT = Path(__file__).parents[2]
MUTANTS = all_mutants()


def test_there_are_enough_mutants_and_each_has_a_name_of_its_own() -> None:
    assert len(MUTANTS) >= 40
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_and_names_tests_that_exist(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    changed = mutant.apply(source)
    assert changed != source
    compile(changed, mutant.file, "exec")
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        tests = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {name.partition('[')[0]}(" in tests if name else "def test_" in tests, test


def mutant(text: str) -> Mutant:
    return Mutant("m", "code.py", text, "other", ("tests/unit/test_ops.py",))


@pytest.mark.parametrize(("source", "stale"), [("a b", False), ("a a", True), ("b", True)])
def test_a_text_that_is_not_there_once_is_stale(tmp_path: Path, source: str, stale: bool) -> None:
    assert stale_entries([mutant("a")], tmp_path)[0].outcome == "broken"  # no file at all
    (tmp_path / "code.py").write_text(source, encoding="utf-8")
    assert bool(stale_entries([mutant("a")], tmp_path)) == stale


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [(["caught"] * 20, 0), (["caught"] * 19 + ["survived"], 0), (["caught"] * 18 + ["survived"] * 2, 1)],
)
def test_fewer_than_95_percent_fail(outcomes: list[str], status: int) -> None:
    assert summary([Verdict(mutant("a"), outcome, "", 1.0) for outcome in outcomes]) == status


def test_one_that_could_not_be_tried_fails() -> None:
    assert summary([Verdict(mutant("a"), outcome, "", 1.0) for outcome in ["caught"] * 99 + ["broken"]]) == 1
