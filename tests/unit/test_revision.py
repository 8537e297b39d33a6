"""Critique and revision: the words, the answer's form, and the label stage that writes demonstrations."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from data.rows import Demonstration
from data.sources import SourceConfig, read_source
from stages.core.judge.question import Request
from stages.core.judge.revision import Revise
from stages.core.judge.verdict import Unusable
from tests.chat_server import ChatServer, Reply
from tests.labelling import figures_of, label_here, rows_of, write_rows
from tests.vllm import tiny_base

PRINCIPLES = ["Be kind.", "Be brief.", "Be true."]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def config_file(folder: Path, base: Path, server: ChatServer, *, label: Any = None, **revise: Any) -> Path:
    prompts = [{"prompt": f"Say {word}."} for word in ("one", "two", "three", "four")]
    settings = {"base_url": server.base_url, "model": "m", "constitution": PRINCIPLES, "attempts": 2, "backoff_s": 0.01}
    config = {
        "base_model": str(base),
        "max_length": 64,
        "trackers": [],
        "label": {
            "prompts": [{"path": str(write_rows(folder / "prompts.jsonl", prompts))}],
            "candidates": {"per_prompt": 1, "response_length": 6},
            "revise": settings | revise,
            **(label or {}),
        },
    }
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    return folder / "config.yaml"


def reviser(body: dict[str, Any]) -> Reply:
    """Criticises by the principle's name, and rewrites to the number of turns that it was shown."""
    turns = body["messages"]
    principle = next(each for each in PRINCIPLES if each in turns[-1]["content"])
    if turns[-1]["content"].startswith("Name every way"):
        return Reply(f"It could be more so: {principle}")
    return Reply(json.dumps({"revision": f"Rewritten. {principle} {len(turns)}"}))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"revision": "Better."}', "Better."),
        ('Here it is:\n```json\n{"revision": " With {braces}. "}\n```', "With {braces}."),
    ],
)
def test_a_revision_is_read(text, found):
    assert Revise(Request("m", (), 0.0, 10)).read(text) == found


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("Better.", "no revision in the answer"),
        ('{"revision": "cut o', "truncated answer"),
        ('{"revision": 3}', "no revision in the answer"),
        ('{"revision": "  "}', "empty revision"),
        ('{"answer": "Better."}', "no revision in the answer"),
        ('["revision"]', "no revision in the answer"),
        ("", "no revision in the answer"),
    ],
)
def test_what_is_no_revision_is_none(text, cause):
    with pytest.raises(Unusable, match=cause):
        Revise(Request("m", (), 0.0, 10)).read(text)


def test_answers_are_criticised_and_rewritten_twice(tmp_path, base):
    """Each round starts from what the last one made: prompt, answer, ask, critique, ask make 5 turns."""
    with ChatServer(reviser) as server:
        label_here(config_file(tmp_path, base, server, rounds=2), tmp_path / "out")
        bodies = server.requests
    rows = rows_of(tmp_path / "out" / "label" / "demonstrations.jsonl")
    assert [row["prompt"] for row in rows] == ["Say one.", "Say two.", "Say three.", "Say four."]
    assert len(bodies) == 16
    for row in rows:
        first, second = row["principles"]
        assert first != second
        assert row["response"] == f"Rewritten. {second} 5"
        assert len(row["ledger_ids"]) == 4
        own = [body["messages"] for body in bodies if body["messages"][0]["content"] == row["prompt"]]
        assert sorted(len(turns) for turns in own) == [3, 3, 5, 5]
        assert sorted({turns[1]["content"] for turns in own}) == sorted([row["initial"], f"Rewritten. {first} 5"])
        critique = next(turns for turns in own if len(turns) == 5 and turns[1]["content"] == row["initial"])
        assert critique[3] == {"role": "assistant", "content": f"It could be more so: {first}"}
    assert {tuple(sorted(row["principles"])) for row in rows} != {tuple(sorted(rows[0]["principles"]))}
    read = read_source(
        Demonstration, SourceConfig(path=str(tmp_path / "out/label/demonstrations.jsonl")), run_folder=tmp_path
    )
    assert [row.response for row in read.rows] == [row["response"] for row in rows]
    assert read.refused == []
    figures = figures_of(tmp_path / "out")["revision"]
    assert (figures["answers"], figures["rewritten"], figures["changed"]) == (4, 4, 1)


def test_the_rewritten_answers_are_preferred_where_nobody_else_labels(tmp_path, base):
    with ChatServer(reviser) as server:
        label_here(config_file(tmp_path, base, server, critique=False), tmp_path / "out")
        assert len(server.requests) == 4
        assert all(len(body["messages"]) == 3 for body in server.requests)
        assert all(body["response_format"]["type"] == "json_schema" for body in server.requests)
    demonstrations = rows_of(tmp_path / "out" / "label" / "demonstrations.jsonl")
    preferences = rows_of(tmp_path / "out" / "label" / "preferences.jsonl")
    assert [row["chosen"] for row in preferences] == [row["response"] for row in demonstrations]
    assert [row["rejected"] for row in preferences] == [row["initial"] for row in demonstrations]
    assert {(row["p_chosen"], row["source"]) for row in preferences} == {(1.0, "revision:m")}


def test_what_cannot_be_rewritten_is_quarantined_with_its_cause(tmp_path, base):
    def failing(body: dict[str, Any]) -> Reply:
        asked = body["messages"][0]["content"]
        if asked == "Say two." and len(body["messages"]) == 5:
            return Reply('{"revision": "cut o')
        return Reply("", status=500) if asked == "Say four." else reviser(body)

    with ChatServer(failing) as server:
        label_here(config_file(tmp_path, base, server), tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "label" / "demonstrations.jsonl")
    assert [row["prompt"] for row in rows] == ["Say one.", "Say three."]
    quarantine = rows_of(tmp_path / "out" / "label" / "quarantine.jsonl")
    assert quarantine[0]["reason"] == "no usable revision: truncated answer"
    assert quarantine[1]["reason"].startswith("no usable critique: status 500")


def test_a_second_run_asks_only_for_what_is_missing(tmp_path, base):
    """The server breaks after five answers; the next launch goes on from the ledger, and comes out as a whole one."""
    count = 0

    def breaking(body: dict[str, Any]) -> Reply:
        nonlocal count
        count += 1
        return reviser(body) if count <= 5 else Reply("no such model", status=404)

    (tmp_path / "whole").mkdir()
    with ChatServer(breaking) as server:
        config = config_file(tmp_path, base, server, max_concurrency=1)
        with pytest.raises(UserError, match="status 404, no such model"):
            label_here(config, tmp_path / "out")
        assert not (tmp_path / "out" / "label" / "demonstrations.jsonl").exists()
        server.answer = reviser
        asked = len(server.requests)
        label_here(config, tmp_path / "out")
        assert len(server.requests) - asked == 8 - 5
        label_here(config_file(tmp_path / "whole", base, server), tmp_path / "whole" / "out")
    again, whole = (rows_of(folder / "out/label/demonstrations.jsonl") for folder in (tmp_path, tmp_path / "whole"))
    assert [row["response"] for row in again] == [row["response"] for row in whole]


@pytest.mark.parametrize(
    ("revise", "told"),
    [
        ({"rounds": 4}, "rounds=4 with 3 in constitution"),
        ({"constitution": []}, "rounds=1 with 0 in constitution"),
        ({"model": None}, "needs base_url and model"),
    ],
)
def test_a_config_that_cannot_work_is_refused(tmp_path, base, revise, told):
    with ChatServer(reviser) as server, pytest.raises(UserError, match=told):
        label_here(config_file(tmp_path, base, server, **revise), tmp_path / "out")


def test_revision_needs_prompts(tmp_path, base):
    label = {"prompts": [], "pairs": [{"path": "pairs.jsonl"}]}
    with ChatServer(reviser) as server, pytest.raises(UserError, match="name prompts, not pairs"):
        label_here(config_file(tmp_path, base, server, label=label), tmp_path / "out")
