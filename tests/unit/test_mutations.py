"""The list of mutants fits the project: every text is there once, every named test exists."""

from pathlib import Path

import pytest

from tests.mutations.mutants import Mutant, all_mutants

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
