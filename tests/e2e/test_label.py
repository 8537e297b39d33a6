"""The label stage against a scripted endpoint, by its real command where processes matter: faults, kills, signals."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from stages.core.judge.ledger import Ledger
from stages.core.judge.question import Question
from tests.judge_server import JudgeServer, by_quality, question_id
from tests.labelling import figures_of, labels_of, pair_rows, rows_of, write_config

KEY = "sk-canary-4711"


def command(config: Path, out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "launch", "label", str(config), "--out", str(out), "--json", *arguments]


def launch(config: Path, out: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(config, out, *arguments),
        capture_output=True,
        text=True,
        check=False,
        cwd=config.parent,
        env={**os.environ, **env},
    )


def test_labels_follow_the_verdicts_and_rest_on_their_ledger_rows(tmp_path: Path) -> None:
    rows, out = pair_rows(30, ties=4), tmp_path / "out"
    with JudgeServer() as server:
        config = write_config(tmp_path, server, rows, judge={"api_key_env": "JUDGE_KEY", "max_concurrency": 4})
        result = launch(config, out, JUDGE_KEY=KEY)
        assert result.returncode == 0, result.stderr
        assert len(server.calls) == 60  # two orders of each pair, none more
        assert {call.authorization for call in server.calls} == {f"Bearer {KEY}"}
        assert server.most_open <= 4
        formats = {json.dumps(body["response_format"]["json_schema"]["schema"]["properties"]) for body in server.bodies}
        assert formats == {json.dumps({"verdict": {"type": "string", "enum": ["A", "B", "tie"]}})}
    written = rows_of(out / "label" / "preferences.jsonl")
    assert [row["prompt"] for row in written] == [row["prompt"] for row in rows]
    assert [row["p_chosen"] for row in written] == [0.5] * 4 + [1.0] * 26
    assert all("quality 9" in row["chosen"] for row in written[4:])
    with Ledger(out / "label" / "ledger.sqlite") as ledger:
        by_id = {verdict.id: verdict for verdict in ledger.verdicts()}
        for row in written:
            assert row["source"] == "judge:scripted"
            first, second = (ledger.question(by_id[number].key) for number in row["ledger_ids"])
            assert first is not None
            assert second is not None
            assert first["prompt"] == second["prompt"] == row["prompt"]
            assert first["responses"] == second["responses"][::-1]
    for path in out.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in result.stdout + result.stderr
    artifact = json.loads((out / "label" / "artifact.json").read_text(encoding="utf-8"))
    assert artifact["kind"] == "preferences"
    assert "preferences.jsonl" in artifact["files"]
    assert "ledger.sqlite" not in artifact["files"]  # it outlives the stage


@pytest.mark.parametrize(
    ("pairs", "concurrency"),
    [
        pytest.param(1000, 32, marks=pytest.mark.slow),
        pytest.param(10_000, 64, marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
def test_faults_in_a_third_of_the_calls_change_no_label(tmp_path: Path, pairs: int, concurrency: int) -> None:
    """Faults in 30 % of the calls change no label that is delivered; almost all are, and the rest have a cause."""
    rows, out = pair_rows(pairs, ties=pairs // 10), tmp_path / "out"
    judge = {"timeout_s": 4.0, "max_concurrency": concurrency, "price": {"input": 1.0, "output": 2.0}, "max_cost": 100}
    with JudgeServer(fault_rate=0.3, seed=3, hang_seconds=12) as server:
        result = launch(write_config(tmp_path, server, rows, judge=judge), out)
        assert result.returncode == 0, result.stderr
        faults = Counter(call.fault for call in server.calls)
        assert len(faults) == 13  # every kind, and none
        assert sum(faults.values()) - faults[None] == pytest.approx(0.3 * len(server.calls), rel=0.2)
        assert server.most_open <= concurrency + faults["hang"] + faults["drip"]  # which the client has left
        answered = Counter(call.question for call in server.calls if call.fault is None)
        assert max(answered.values()) == 1  # nothing that was answered was asked again
    expected: dict[str, tuple[str, float]] = {}
    for row in rows:
        first, second = row["responses"]
        verdict = by_quality({"response_A": first, "response_B": second})
        expected[row["prompt"]] = (second if verdict == "B" else first, 0.5 if verdict == "tie" else 1.0)
    delivered = labels_of(out)
    assert all(expected[prompt] == label for prompt, label in delivered.items())
    missing = set(expected) - set(delivered)
    assert len(missing) <= math.ceil(0.001 * pairs)
    quarantined = rows_of(out / "label" / "quarantine.jsonl")
    assert {json.loads(row["row"])["prompt"] for row in quarantined} == missing
    assert all(row["reason"].startswith("no usable verdict: ") for row in quarantined)
    with Ledger(out / "label" / "ledger.sqlite") as ledger:
        assert len(ledger.verdicts()) == len(answered)
        assert ledger.total("cost") <= 100


@pytest.mark.parametrize(
    ("pairs", "kills", "seed"),
    [
        pytest.param(60, 2, 1, marks=pytest.mark.slow),
        pytest.param(400, 20, 2, marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
def test_a_killed_run_asks_nothing_again_that_was_answered(tmp_path: Path, pairs: int, kills: int, seed: int) -> None:
    """Killed at random points: what the ledger held is never asked again, and the labels are those of a clean run."""
    rows = pair_rows(pairs)
    rng = random.Random(seed)
    held: list[tuple[int, set[str]]] = []  # how many calls there were at each kill, and the questions answered by then
    with JudgeServer(delay_seconds=0.02) as server:
        config, out = write_config(tmp_path, server, rows, judge={"max_concurrency": 4}), tmp_path / "out"
        for _ in range(kills):
            last = len(server.calls) + rng.randint(1, 2 * pairs // (kills + 1))
            process = subprocess.Popen(command(config, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 120
            while len(server.calls) < last and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(rng.random() * 0.03)
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(0.1)  # what was on its way has arrived
            with Ledger(out / "label" / "ledger.sqlite") as ledger:
                questions = [question_of(ledger, verdict.key) for verdict in ledger.verdicts()]
            held.append((len(server.calls), {question_id(question.messages()) for question in questions}))
        result = launch(config, out)
        assert result.returncode == 0, result.stderr
        for calls, answered in held:
            assert not answered & {call.question for call in server.calls[calls:]}
        assert len({call.question for call in server.calls}) == 2 * pairs
        assert len(server.calls) <= 2 * pairs + 4 * kills  # at most what was open at a kill is asked twice
    assert max(len(answered) for _, answered in held) > 0
    delivered = labels_of(out)
    assert len(delivered) == pairs
    assert all("quality 9" in chosen and p_chosen == 1.0 for chosen, p_chosen in delivered.values())


def question_of(ledger: Ledger, key: str) -> Question:
    content = ledger.question(key)
    assert content is not None
    return Question(**{**content, "responses": tuple(content["responses"]), "principles": ()})


@pytest.mark.slow
def test_a_term_signal_stops_it_and_the_next_launch_goes_on(tmp_path: Path) -> None:
    with JudgeServer(delay_seconds=0.05) as server:
        config, out = write_config(tmp_path, server, pair_rows(100), judge={"max_concurrency": 2}), tmp_path / "out"
        process = subprocess.Popen(command(config, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(server.calls) < 20 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75
        assert len(server.calls) < 100
        answer = json.loads(launch(config, out, "--resume", "must").stdout)
        assert [stage["action"] for stage in answer["stages"]] == ["resumed"]
        assert len(server.calls) == 200  # open calls were waited for, so none was asked twice
    assert len(labels_of(out)) == 100
    assert figures_of(out)["labels"]["labelled"] == 100
