"""A judge served by a real `vllm serve`: whatever a small model says goes through the whole path once."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import httpx2
import pytest

from stages.core.judge.ledger import Ledger
from stages.core.rollout.server import PYTHON_VARIABLE
from tests.labelling import figures_of, label_here, rows_of, write_config
from tests.vllm import PYTHON, ROOT, needs_vllm

MODEL = ROOT.parent / "shared" / "models" / "stories3M-llama"
TOKEN = "a-token-for-this-test"

pytestmark = [
    *needs_vllm,
    pytest.mark.real_data,
    pytest.mark.skipif(not MODEL.is_dir(), reason="../shared is missing"),
]


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """The address of the model, served by `launch serve`; it ends with the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "launch", "serve", str(MODEL), "--port", str(port), "--token-env", "SERVED"]
    log = tmp_path_factory.mktemp("serve") / "log"
    environment = {**os.environ, "SERVED": TOKEN, PYTHON_VARIABLE: PYTHON}
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if httpx2.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(1)
        yield f"{url}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def test_a_small_model_judges_stories(tmp_path: Path, base_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVED_KEY", TOKEN)
    rows = [
        {
            "prompt": f"Once upon a time there was a {animal}.",
            "responses": [f"The {animal} was happy.", "It ran away and did not come back."],
        }
        for animal in ("cat", "dog", "bird", "frog")
    ]
    judge = {
        "base_url": base_url,
        "model": "policy",
        "api_key_env": "SERVED_KEY",
        "rubric": "Prefer the better story.",
        "max_tokens": 24,
        "attempts": 2,
    }
    config = write_config(tmp_path, None, rows, judge=judge)
    label_here(config, tmp_path / "out")
    preferences = rows_of(tmp_path / "out" / "label" / "preferences.jsonl")
    assert {row["prompt"] for row in preferences} == {row["prompt"] for row in rows}  # its answers were constrained
    assert all(row["p_chosen"] in (0.5, 1.0) for row in preferences)
    figures = figures_of(tmp_path / "out")["judges"]["policy"]
    assert 0 <= figures["inconsistent"] <= 1
    assert 100 < figures["prompt_tokens"] / 8 < 512
    with Ledger(tmp_path / "out" / "label" / "ledger.sqlite") as ledger:
        assert len(ledger.verdicts("judge:policy")) == 8
        assert {verdict.value for verdict in ledger.verdicts()} <= {"A", "B", "tie"}
