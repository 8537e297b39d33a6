"""What annotators said becomes labels: votes, repeats, skips, rules; and people beside a judge."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.core.judge.ledger import Ledger
from stages.label.judging import Outcome
from stages.label.pairs import Pair
from stages.label.people import labelling
from stages.label.people.config import PeopleConfig
from stages.label.people.desk import Desk, ShownPair
from stages.label.people.labelling import outcomes_of
from tests.judge_server import JudgeServer
from tests.labelling import figures_of, label_here, labels_of, pair_rows, rows_of, write_config


def said(folder: Path, pairs: list[Pair], words: dict[str, list[str]], **fields: object) -> Desk:
    """A desk at which each annotator has said in turn what stands for them: the better answer's first word, or skip."""
    config = PeopleConfig.model_validate({"annotators": list(words), "repeat_share": 0, **fields})
    shown = [ShownPair(pair.id, pair.prompt, (pair.first, pair.second)) for pair in pairs]
    desk = Desk(shown, Ledger(folder / "ledger.sqlite"), config, seed=0)
    for name, wanted in words.items():
        for word in wanted:
            task = desk.next_task(name)
            assert task is not None
            left = str(task.shown[0])
            choice = word if word in ("tie", "skip") else "A" if left == word else "B"
            desk.answer(name, task.key, choice)  # type: ignore[arg-type]
    return desk


PAIR = Pair("prompt", "good", "bad", "rows.jsonl:1")


@pytest.mark.parametrize(
    ("words", "on_disagreement", "label"),
    [
        ({"ada": ["good"]}, "tie", 1.0),
        ({"ada": ["bad"]}, "tie", 0.0),
        ({"ada": ["tie"]}, "tie", 0.5),
        ({"ada": ["good"], "bob": ["good"], "cyd": ["bad"]}, "tie", 1.0),
        ({"ada": ["good"], "bob": ["bad"]}, "tie", 0.5),
        ({"ada": ["good"], "bob": ["bad"]}, "drop", None),
        ({"ada": ["good"], "bob": ["good"], "cyd": ["bad"]}, "soft", 2 / 3),
        ({"ada": ["good"], "bob": ["skip"]}, "drop", 1.0),
    ],
)
def test_what_annotators_come_to(tmp_path, words, on_disagreement, label):
    desk = said(tmp_path, [PAIR], words, overlap=len(words))
    (outcome,) = outcomes_of([PAIR], {}, desk.answers(), on_disagreement)
    assert outcome.label == pytest.approx(label)
    assert outcome.source == "+".join(f"annotator:{name}" for name, each in words.items() if each != ["skip"])
    assert len(outcome.ledger) == sum(each != ["skip"] for each in words.values())
    assert bool(outcome.cause) == (label is None)


def test_both_showings_of_a_pair_are_one_voice(tmp_path):
    """ada turns around on the repeat: a tie, or 0.5 by mean; with bob for the first answer, (0.5 + 1) / 2."""
    desk = said(tmp_path, [PAIR], {"ada": ["good", "bad"], "bob": ["good", "good"]}, overlap=2, repeat_share=1)
    (soft,) = outcomes_of([PAIR], {}, desk.answers(), "soft")
    assert soft.label == 0.75
    assert len(soft.ledger) == 4


def test_pairs_that_nobody_answered_or_a_rule_settles(tmp_path):
    empty = Pair("prompt", "good", "...", "rows.jsonl:2")
    desk = said(tmp_path, [PAIR], {"ada": ["skip"]})
    rule = Outcome(empty, 1.0, "rule:no words")
    unseen, settled = outcomes_of([PAIR, empty], {empty.id: rule}, desk.answers(), "tie")
    assert (unseen.label, unseen.cause) == (None, "nobody answered it")
    assert settled is rule


def test_people_first_and_the_judge_for_what_they_left(tmp_path, monkeypatch):
    """Two annotators answer four of ten pairs, one of them against the judge; the report says how far it agrees."""
    shown: list[int] = []

    def serve(desk: Desk, config: PeopleConfig, **rest: Any) -> bool:
        """In the page's place: its own tests drive the real one."""
        shown.append(desk.num_pairs)
        for count in range(4):
            task = desk.next_task("ada")
            assert task is not None
            better_left = "quality 9" in str(task.shown[0])
            desk.answer("ada", task.key, "A" if better_left == (count > 0) else "B")
        return True

    monkeypatch.setattr(labelling, "serve_people", serve)
    with JudgeServer() as server:
        people = {"annotators": ["ada"], "repeat_share": 0, "port": 0}
        label_here(write_config(tmp_path, server, pair_rows(10), people=people), tmp_path / "out")
        assert len(server.calls) == 20
    assert shown == [10]
    rows = rows_of(tmp_path / "out" / "label" / "preferences.jsonl")
    by_people = [row for row in rows if row["source"] == "annotator:ada"]
    assert len(rows) == 10
    assert len(by_people) == 4
    assert sum("quality 9" in row["chosen"] for row in by_people) == 3
    assert all("quality 9" in row["chosen"] for row in rows if row not in by_people)
    figures = figures_of(tmp_path / "out")
    assert (figures["labels"]["human_pairs"], figures["labels"]["human_agreement"]) == (4, 0.75)
    assert figures["people"]["annotators"][0]["answered"] == 4
    report = json.loads((tmp_path / "out" / "label" / "report.json").read_text())
    assert "4 of 10 pairs labelled by as many people as asked for." in report["notes"]


def test_a_new_annotator_finds_everything_that_was_said(tmp_path, monkeypatch):
    """Another config builds the stage anew; the ledger and the links stay."""
    counts: list[int] = []

    def serve(desk: Desk, config: PeopleConfig, **rest: Any) -> bool:
        rest["links_file"].write_text(json.dumps({"ada": "token"})) if not counts else None
        counts.append(desk.finished_pairs())
        name = config.annotators[-1]
        for _ in range(3):
            task = desk.next_task(name)
            assert task is not None
            desk.answer(name, task.key, "A")
        return True

    monkeypatch.setattr(labelling, "serve_people", serve)
    for annotators in (["ada"], ["ada", "bob"]):
        people = {"annotators": annotators, "repeat_share": 0}
        config = write_config(tmp_path, None, pair_rows(6), people=people)
        raw = json.loads(config.read_text())
        del raw["label"]["judge"]
        config.write_text(json.dumps(raw))
        label_here(config, tmp_path / "out")
    assert counts == [0, 3]
    assert len(labels_of(tmp_path / "out")) == 6
    assert json.loads((tmp_path / "out" / "label" / "links.json").read_text()) == {"ada": "token"}
