"""From sources to train and holdout sets: nothing twice, nothing on both sides, every row accounted for."""

import json
from pathlib import Path

import pytest

from data.chat import TEMPLATES, ChatEncoder
from data.errors import UserError
from data.prepare import Prepared, prepare_demonstrations, prepare_preferences, prepare_prompts
from data.sources import SourceConfig
from tests.tiny import tiny_tokenizer


def encoder(*, max_length: int = 64, overlong: str = "drop", template: str = TEMPLATES["simple"]) -> ChatEncoder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer, max_length=max_length, overlong=overlong)


def source(path: Path, rows: list, **fields: object) -> SourceConfig:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return SourceConfig(path=str(path), **fields)


def demonstrations(num: int, *, prompts: int | None = None) -> list[dict[str, str]]:
    return [{"prompt": f"q{n % (prompts or num)}", "response": f" r{n}"} for n in range(num)]


def prepared(kind: str, sources: list, holdout: object = 0.0, *, seed: int = 0, encode: ChatEncoder | None = None):
    functions = {"demonstrations": prepare_demonstrations, "preferences": prepare_preferences}
    return functions[kind](sources, holdout, encoder=encode or encoder(), run_folder=Path(), seed=seed)


def origins(result: Prepared) -> tuple[list[int], list[int]]:
    train, holdout = ([int(row.origin.rpartition(":")[2]) for row in part] for part in (result.train, result.holdout))
    return train, holdout


def test_a_share_is_held_out_by_whole_prompts(tmp_path: Path) -> None:
    rows = source(tmp_path / "rows.jsonl", demonstrations(100, prompts=20))
    result = prepared("demonstrations", [rows], 0.25)
    train, holdout = origins(result)
    assert sorted(train + holdout) == list(range(1, 101))
    assert len(holdout) == 25  # five prompts of five rows
    assert {line % 20 for line in train}.isdisjoint({line % 20 for line in holdout})
    assert origins(prepared("demonstrations", [rows], 0.25)) == (train, holdout)
    assert origins(prepared("demonstrations", [rows], 0.25, seed=1))[1] != holdout
    assert origins(prepared("demonstrations", [rows], 0.0))[1] == []


def test_a_small_share_still_holds_out_one_prompt(tmp_path: Path) -> None:
    rows = source(tmp_path / "rows.jsonl", demonstrations(6, prompts=3))
    assert len(origins(prepared("demonstrations", [rows], 0.01))[1]) == 2
    alone = source(tmp_path / "alone.jsonl", demonstrations(6, prompts=1))
    assert origins(prepared("demonstrations", [alone], 0.5))[1] == []


def test_exact_duplicates_are_removed_over_all_sources(tmp_path: Path) -> None:
    first = source(tmp_path / "a.jsonl", [*demonstrations(3), *demonstrations(2)])
    second = source(tmp_path / "b.jsonl", demonstrations(4))
    result = prepared("demonstrations", [first, second])
    assert [row.origin.rpartition("/")[2] for row in result.train] == [
        "a.jsonl:1",
        "a.jsonl:2",
        "a.jsonl:3",
        "b.jsonl:4",
    ]
    assert (result.report.read, result.report.duplicates, result.report.train) == (9, 5, 4)


def test_a_weight_repeats_train_rows_and_is_no_duplicate(tmp_path: Path) -> None:
    rows = source(tmp_path / "rows.jsonl", demonstrations(10), weight=2)
    result = prepared("demonstrations", [rows], 0.2)
    train, holdout = origins(result)
    assert (len(train), len(set(train)), len(holdout)) == (16, 8, 2)
    assert (result.report.duplicates, result.report.train, len(result.report.lengths)) == (0, 16, 8)


def test_train_rows_that_the_holdout_holds_are_removed(tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{n}", "chosen": " a", "rejected": " b"} for n in range(5)]
    swapped = {"prompt": "q1", "chosen": " b", "rejected": " a"}
    another = {"prompt": "q2", "chosen": " a", "rejected": " c"}
    train = source(tmp_path / "train.jsonl", pairs)
    result = prepared("preferences", [train], source(tmp_path / "test.jsonl", [pairs[0], swapped, another]))
    assert origins(result) == ([3, 4, 5], [1, 2, 3])
    assert (result.report.overlap, result.report.read) == (2, 8)


def test_prompts_are_prepared_with_their_rows(tmp_path: Path) -> None:
    long = "the cat sat on the mat, and " * 9
    rows = source(tmp_path / "p.jsonl", [{"prompt": "q", "gold": 1}, {"prompt": "q", "gold": 2}, {"prompt": long}])
    encode = encoder()
    result = prepare_prompts([rows], 0, encoder=encode, run_folder=tmp_path, seed=0, max_prompt_tokens=8)
    assert [(row.tokens, row.row.extra) for row in result.train] == [
        (encode.prompt_tokens("q"), {"gold": 1}),
        (encode.prompt_tokens("q"), {"gold": 2}),
    ]
    assert result.report.fit.dropped == 1


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    long = {"prompt": "q", "response": " the cat sat on the mat" * 30}
    refused_by_template = {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}
    rows = [*demonstrations(20), *demonstrations(2), long, "not json", {"prompt": ""}, refused_by_template]
    strict = "{{ raise_exception('no tools') if messages[0]['role'] == 'tool' else '' }}" + TEMPLATES["simple"]
    encode = encoder(template=strict)
    result = prepared("demonstrations", [source(tmp_path / "rows.jsonl", rows)], 0.1, encode=encode)
    report = result.report
    assert report.read == 26
    assert (report.duplicates, report.overlap, report.fit.dropped, len(report.refused)) == (2, 0, 1, 3)
    assert report.read == len(result.train) + len(result.holdout) + 2 + 1 + 3
    assert (report.train, report.holdout) == (len(result.train), len(result.holdout))
    assert sorted(report.lengths) == sorted(row.length for row in result.train)
    assert [refusal.origin.rpartition(":")[2] for refusal in report.refused] == ["24", "25", "26"]
    assert "no tools" in report.refused[2].reason
    for part in ("26 rows read", "3 refused", "2 duplicates", "1 too long", f"{report.train} rows to use"):
        assert part in report.summary()

    report.write_quarantine(tmp_path / "quarantine.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["origin"] for line in lines] == [refusal.origin for refusal in report.refused]
    assert lines[0]["row"] == "not json"
    assert set(lines[0]) == {"origin", "reason", "row"}


def test_too_many_refused_rows_stop_the_run(tmp_path: Path) -> None:
    rows = source(tmp_path / "rows.jsonl", [*demonstrations(96), "{", "[]", "{}", "7"])
    report = prepared("demonstrations", [rows]).report
    report.check_refused(0.04)
    with pytest.raises(UserError) as raised:
        report.check_refused(0.03)
    said = str(raised.value)
    assert "4 of 100 rows (4.0%)" in said
    assert "max_refused=0.03" in said
    for line in (97, 98, 99):
        assert f"{tmp_path}/rows.jsonl:{line}: " in said
    assert "rows.jsonl:100" not in said


def test_no_rows_to_train_on_is_said_with_where_they_went(tmp_path: Path) -> None:
    rows = source(tmp_path / "rows.jsonl", demonstrations(5))
    report = prepared("demonstrations", [rows], encode=encoder(max_length=2)).report
    with pytest.raises(UserError, match=r"no rows left to use from .*5 rows read.*5 too long"):
        report.check_refused(0.01)
    empty = source(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match="0 rows read"):
        prepared("demonstrations", [empty]).report.check_refused(0.01)
