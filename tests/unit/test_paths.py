"""Where the paths of a config point."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from data.errors import UserError
from data.paths import ConfigPath, absolute_path, in_run


def test_the_first_folder_that_holds_a_path_wins(tmp_path: Path) -> None:
    beside, working = tmp_path / "configs", tmp_path / "work"
    for folder in (beside, working):
        folder.mkdir()
        (folder / "both.jsonl").touch()
    (working / "one.jsonl").touch()
    folders = [beside, working]
    assert absolute_path("both.jsonl", folders) == str(beside / "both.jsonl")
    assert absolute_path("one.jsonl", folders) == str(working / "one.jsonl")
    assert absolute_path("../work/one.jsonl", folders) == str(working / "one.jsonl")
    assert absolute_path("*.jsonl", folders) == str(beside / "*.jsonl")
    assert absolute_path(str(working / "one.jsonl"), folders) == str(working / "one.jsonl")


def test_what_is_no_file_stays_as_it_is(tmp_path: Path) -> None:
    for value in ("org/model", "stage:sft", "http://127.0.0.1:8000/v1", "none/*.jsonl"):
        assert absolute_path(value, [tmp_path]) == value


def test_a_function_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "reward.py").touch()
    assert absolute_path("reward.py:score", [tmp_path]) == f"{tmp_path}/reward.py:score"
    assert absolute_path("package.module:score", [tmp_path]) == "package.module:score"


def test_a_model_field_is_resolved_against_the_folders_of_the_context(tmp_path: Path) -> None:
    class Section(BaseModel):
        path: ConfigPath

    (tmp_path / "rows.jsonl").touch()
    read = Section.model_validate({"path": "rows.jsonl"}, context={"folders": [tmp_path]})
    assert read.path == str(tmp_path / "rows.jsonl")
    assert Section(path="rows.jsonl").path == "rows.jsonl"


def test_stage_paths_stay_in_the_run_folder(tmp_path: Path) -> None:
    assert in_run("stage:toy/rows.jsonl", tmp_path) == f"{tmp_path}/toy/rows.jsonl"
    assert in_run("rows.jsonl", tmp_path) == "rows.jsonl"
    for value in ("stage:../secret", "stage:/etc/passwd", "stage:toy/../../x"):
        with pytest.raises(UserError, match="leaves the run folder"):
            in_run(value, tmp_path)
