"""The ledger: what was answered is never lost, never doubled, never altered."""

import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data.errors import UserError
from stages.core.judge.ledger import Ledger, content_key


def ledger_with(path: Path, *keys: str) -> Ledger:
    ledger = Ledger(path / "ledger.sqlite")
    for key in keys:
        ledger.ask(key, {"prompt": key})
    return ledger


def test_the_key_is_the_content_whatever_the_order_of_its_fields():
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    assert content_key({"responses": ["x", "y"]}) != content_key({"responses": ["y", "x"]})


def test_a_verdict_comes_back_as_it_was_recorded_also_after_reopening(tmp_path):
    with ledger_with(tmp_path, "k") as ledger:
        ledger.record("k", "judge:m", "A", raw='{"verdict":"A"}', usage={"prompt_tokens": 7, "cost": 0.25})
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        found = ledger.standing("k", "judge:m")
        assert found is not None
        assert (found.value, found.raw, found.usage) == ("A", '{"verdict":"A"}', {"prompt_tokens": 7, "cost": 0.25})
        assert ledger.question("k") == {"prompt": "k"}
        assert ledger.question("other") is None
        assert ledger.standing("k", "judge:other") is None


def test_the_first_verdict_stands_until_it_is_withdrawn(tmp_path):
    ledger = ledger_with(tmp_path, "k")
    first = ledger.record("k", "annotator:ada", "A")
    assert ledger.record("k", "annotator:ada", "B") == first
    ledger.withdraw(first.id)
    ledger.withdraw(first.id)
    assert ledger.standing("k", "annotator:ada") is None
    second = ledger.record("k", "annotator:ada", "B")
    assert [verdict.value for verdict in ledger.verdicts()] == ["B"]
    assert second.id != first.id
    rows = sqlite3.connect(ledger.path).execute("SELECT verdict FROM verdicts ORDER BY id").fetchall()
    assert rows == [('"A"',), ('"B"',)]


def test_verdicts_are_listed_by_source_oldest_first(tmp_path):
    ledger = ledger_with(tmp_path, "a", "b")
    for key, source in (("b", "judge:m"), ("a", "annotator:ada"), ("a", "judge:m"), ("b", "annotator:%")):
        ledger.record(key, source, "tie")
    assert [verdict.key for verdict in ledger.verdicts("judge:")] == ["b", "a"]
    assert [verdict.source for verdict in ledger.verdicts("annotator:")] == ["annotator:ada", "annotator:%"]
    assert len(ledger.verdicts()) == 4


def test_what_is_no_verdict_or_answers_no_question_is_refused(tmp_path):
    ledger = ledger_with(tmp_path, "k")
    with pytest.raises(ValueError, match="JSON compliant"):
        ledger.record("k", "judge:m", float("nan"))
    with pytest.raises(sqlite3.IntegrityError):
        ledger.record("never asked", "judge:m", "A")
    assert ledger.verdicts() == []
    ledger.record("k", "judge:m", 7.5, raw="lone \ud800 surrogate")
    assert ledger.verdicts()[0].raw == "lone \\ud800 surrogate"


def test_quarantine_ends_with_a_verdict(tmp_path):
    ledger = ledger_with(tmp_path, "a", "b")
    ledger.quarantine("a", "judge:m", "HTTP 500")
    ledger.quarantine("a", "judge:m", "refused", raw="I cannot")
    ledger.quarantine("b", "judge:m", "empty")
    ledger.record("b", "judge:m", "A")
    assert [(row.key, row.cause, row.raw) for row in ledger.quarantined()] == [("a", "refused", "I cannot")]


def test_the_total_counts_every_answer_that_was_paid_for(tmp_path):
    ledger = ledger_with(tmp_path, "a", "b")
    verdict = ledger.record("a", "judge:m", "A", usage={"cost": 0.5, "prompt_tokens": 10})
    ledger.withdraw(verdict.id)
    ledger.record("a", "judge:m", "B", usage={"cost": 0.25})
    ledger.charge("b", "judge:m", {"cost": 0.125})
    assert ledger.total("cost") == 0.875
    assert ledger.total("prompt_tokens") == 10
    assert ledger.total("unknown") == 0


def test_the_newest_answer_of_a_source_is_known_by_its_age(tmp_path):
    ledger = ledger_with(tmp_path, "a", "b")
    assert ledger.seconds_since_answer("judge:m") == math.inf
    ledger.record("a", "judge:other", "A")
    assert ledger.seconds_since_answer("judge:m") == math.inf
    ledger.charge("b", "judge:m", {})
    sqlite3.connect(ledger.path).execute("UPDATE charges SET created = '2020-01-01T00:00:00+00:00'").connection.commit()
    assert ledger.seconds_since_answer("judge:m") > 1e8
    ledger.record("a", "judge:m", "A")
    assert 0 <= ledger.seconds_since_answer("judge:m") < 60
    sqlite3.connect(ledger.path).execute(
        "UPDATE verdicts SET created = '2999-01-01T00:00:00+00:00'"
    ).connection.commit()
    assert ledger.seconds_since_answer("judge:m") == 0


def test_claims_are_kept_once_in_their_order(tmp_path):
    ledger = ledger_with(tmp_path)
    for item, name in (("z", "ada"), ("a", "bob"), ("z", "ada"), ("z", "bob")):
        ledger.claim(item, f"annotator:{name}")
    assert ledger.claims() == [("z", "annotator:ada"), ("a", "annotator:bob"), ("z", "annotator:bob")]


def test_withdrawn_keys_come_back_until_they_are_answered_again(tmp_path):
    ledger = ledger_with(tmp_path, "a", "b", "c")
    ids = {key: ledger.record(key, "annotator:ada", "A").id for key in "abc"}
    ledger.record("a", "annotator:bob", "A")
    for key in "cb":
        ledger.withdraw(ids[key])
    assert ledger.withdrawn("annotator:ada") == ["c", "b"]
    ledger.withdraw(ledger.record("c", "annotator:ada", "B").id)
    assert ledger.withdrawn("annotator:ada") == ["b", "c"]
    ledger.record("b", "annotator:ada", "B")
    assert ledger.withdrawn("annotator:ada") == ["c"]
    assert ledger.withdrawn("annotator:bob") == []


def test_threads_and_processes_share_a_ledger(tmp_path):
    path = tmp_path / "ledger.sqlite"
    script = (
        "import sys; from pathlib import Path; from stages.core.judge.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "for i in range(50):\n"
        "    ledger.ask(str(i), {}); ledger.record(str(i), 'judge:m', sys.argv[2])\n"
        "    ledger.claim(str(i), sys.argv[2])\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(path), name]) for name in "AB"]

    def write() -> None:
        with Ledger(path) as ledger:
            for item in range(50):
                ledger.ask(str(item), {})
                ledger.claim(str(item), "C")

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait(60) for process in processes] == [0, 0]
    with Ledger(path) as ledger:
        assert sorted(int(verdict.key) for verdict in ledger.verdicts()) == list(range(50))
        assert sorted(ledger.claims()) == sorted((str(item), name) for item in range(50) for name in "ABC")


def test_what_was_acknowledged_survives_kill_9(tmp_path):
    """Five kills at moments of their own; every verdict that `record` returned for is there, in order."""
    path = tmp_path / "ledger.sqlite"
    script = (
        "import sys; from pathlib import Path; from stages.core.judge.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1])); begin = len(ledger.verdicts())\n"
        "for i in range(begin, 100000):\n"
        "    ledger.ask(str(i), {}); ledger.record(str(i), 'judge:m', i); print(i, flush=True)\n"
    )
    acknowledged = -1
    for lines in (3, 40, 7, 90, 21):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(lines):
            acknowledged = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        rest = process.communicate()[0].split()
        acknowledged = max([acknowledged, *map(int, rest[:-1])])
        with Ledger(path) as ledger:
            kept = [verdict.value for verdict in ledger.verdicts()]
        assert kept == list(range(len(kept)))
        assert len(kept) > acknowledged


def test_a_file_that_is_no_ledger_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "text.sqlite").write_text("this is no database, whatever its name says " * 50)
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE theirs (a)")
    other.commit()
    other.close()
    for name in ("text.sqlite", "other.sqlite"):
        with pytest.raises(UserError, match=rf"{name}: not a ledger of this version, or damaged .*; move it away"):
            Ledger(tmp_path / name)
    assert sqlite3.connect(tmp_path / "other.sqlite").execute("SELECT name FROM sqlite_master").fetchall() == [
        ("theirs",)
    ]
    with pytest.raises(UserError, match="cannot be written here"):
        Ledger(tmp_path)
