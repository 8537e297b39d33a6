"""`launch label CONFIG --people`: from pairs to preferences, over a kill and a signal."""

import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Six pairs and two annotators, who both get each pair."""
    tokenizer = tiny_tokenizer()
    tiny_llama(vocabulary=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"prompt {n}", "responses": [f"first {n}", f"second {n}"]} for n in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "config.yaml").write_text(
        "name: people\nbase_model: base\nlabel:\n  pairs: [{path: pairs.jsonl}]\n"
        "  people: {annotators: [ada, bob], overlap: 2, repeat_share: 0}\n",
        encoding="utf-8",
    )
    return tmp_path / "config.yaml"


class Command:
    """The command while it serves the page."""

    def __init__(self, config: Path, *options: str) -> None:
        command = [sys.executable, "-m", "launch", "label", str(config), "--out", str(config.parent / "run"), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.links: dict[str, str] = {}
        for line in iter(self.process.stderr.readline, ""):
            if "http://" in line:
                name, link = line.removeprefix("label: ").split(": ", 1)
                self.links[name] = link.strip()
            if "Ctrl-C" in line:
                return
        raise AssertionError(f"the command ended with {self.process.wait()}")

    def ask(self, name: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        address, _, token = self.links[name].removeprefix("http://").partition("/#")
        connection = http.client.HTTPConnection(address, timeout=30)
        content = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, content, {"authorization": f"Bearer {token}"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return answer

    def label(self, name: str, count: int, *, wins: str) -> None:
        """Answers `count` pairs for the answer that begins with `wins`."""
        view = self.ask(name, "/api/task")
        for _ in range(count):
            choice = "A" if wins in view["task"]["left"][0]["html"] else "B"
            view = self.ask(name, "/api/answer", {"key": view["task"]["key"], "choice": choice})


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    started: list[Command] = []
    yield started
    for command in started:
        command.process.kill()
        command.process.wait()


def test_from_pairs_to_preferences_over_a_kill_and_a_signal(config, commands):
    commands.append(Command(config, "--people", "--port", "0"))
    commands[-1].label("ada", 4, wins="first")
    links = dict(commands[-1].links)
    commands[-1].process.send_signal(signal.SIGKILL)
    commands[-1].process.wait()

    commands.append(Command(config, "--people", "--port", "0"))
    tokens = {name: link.partition("#")[2] for name, link in commands[-1].links.items()}
    assert tokens == {name: link.partition("#")[2] for name, link in links.items()}
    assert commands[-1].ask("ada", "/api/task")["progress"]["answered"] == 4
    commands[-1].label("ada", 2, wins="first")
    commands[-1].label("bob", 3, wins="first")
    commands[-1].process.terminate()
    assert commands[-1].process.wait(60) == 75
    assert not (config.parent / "run" / "label" / "artifact.json").exists()

    commands.append(Command(config, "--people", "--port", "0"))
    commands[-1].label("bob", 2, wins="second")
    commands[-1].ask("bob", "/api/undo", {"key": commands[-1].ask("bob", "/api/task")["task"]["key"]})
    assert commands[-1].ask("ada", "/api/end", {}) == {}
    started = time.monotonic()
    assert commands[-1].process.wait(60) == 0
    assert time.monotonic() - started < 30

    folder = config.parent / "run" / "label"
    assert json.loads((folder / "artifact.json").read_text())["kind"] == "preferences"
    rows = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"prompt {n}" for n in range(6)]
    # ada preferred the first answer of all six; bob of three, and the second of one: that one is a tie.
    assert sorted(row["p_chosen"] for row in rows) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert all(row["chosen"].startswith("first") for row in rows)
    assert sorted(row["source"] for row in rows) == ["annotator:ada"] * 2 + ["annotator:ada+annotator:bob"] * 4
    assert sorted(len(row["ledger_ids"]) for row in rows) == [1, 1, 2, 2, 2, 2]
    report = json.loads((folder / "report.json").read_text())
    assert "ada: 6 answers, 0 skipped." in report["notes"]
    assert "ada and bob: 75% of 4 pairs alike, kappa 0.00 (0.00 to 0.00)." in report["notes"]
    assert "links.json" not in json.loads((folder / "artifact.json").read_text())["files"]
