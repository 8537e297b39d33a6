"""`launch chat` and `launch serve`: a policy answers in the terminal, and real OpenAI clients over HTTP."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from data.errors import UserError
from launch.chat import longest_answer
from launch.policy import find_policy
from launch.serve import ServeOptions, arguments
from stages.core.rollout.server import PYTHON_VARIABLE, Vllm
from tests.tiny import tiny_adapter_folder, tiny_model_folder
from tests.vllm import PYTHON, needs_vllm, tiny_base

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
CLIENT = """
import sys
from openai import AuthenticationError, OpenAI

address, token, prompt = sys.argv[1:]
client = OpenAI(base_url=address, api_key=token)
print(sorted(model.id for model in client.models.list()))
text = client.completions.create(model="policy", prompt=prompt, max_tokens=8, temperature=0, seed=1).choices[0].text
base = client.completions.create(model="base", prompt=prompt, max_tokens=8, temperature=0, seed=1).choices[0].text
print("adapter changes the answer:", text != base)
said = client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "say"}], max_tokens=4)
print("chat:", said.choices[0].finish_reason in ("stop", "length"))
try:
    OpenAI(base_url=address, api_key="wrong").models.list()
except AuthenticationError:
    print("wrong token refused")
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    return tiny_adapter_folder(folder / "adapter", tiny_model_folder(folder / "base"))


def say(policy: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", "chat", str(policy), "--max-tokens", "8", *options]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=120, check=False
    )


def test_a_conversation_is_answered_line_by_line_and_the_same_again(policy: Path) -> None:
    first = say(policy, "the cat\n\nsay yes\n")
    assert first.returncode == 0, first.stderr
    assert first.stdout
    assert say(policy, "the cat\nsay yes\n").stdout == first.stdout
    assert say(policy, "the cat\nsay yes\n", "--seed", "1").stdout != first.stdout
    # Without a template and without a memory the second answer is another one.
    assert say(policy, "the cat\nsay yes\n", "--plain").stdout != first.stdout


def test_what_is_too_long_is_said_and_the_talk_goes_on(policy: Path) -> None:
    talk = say(policy, "x" * 3000 + "\nsay\n")
    assert talk.returncode == 0
    assert talk.stderr.count("error: that is 3") == 1
    assert talk.stdout


def test_a_long_conversation_forgets_its_beginning(policy: Path) -> None:
    talk = say(policy, "the cat sat on the mat\n" * 40)
    assert talk.returncode == 0, talk.stderr
    assert "error" not in talk.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--max-tokens", "600"], "leaves no room for a question"), (["--engine", "vllm"], "vllm: ")],
)
def test_a_conversation_that_cannot_be_held_is_one_line(
    policy: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.setitem(ENVIRONMENT, PYTHON_VARIABLE, sys.executable)  # which has no vLLM
    talk = say(policy, "say\n", *options)
    assert talk.returncode == 2
    assert talk.stderr.count("error: ") == 1
    assert words in talk.stderr


@pytest.mark.parametrize(("asked", "longest"), [(None, 64), (8, 8), (127, 127)])
def test_an_answer_leaves_room_for_the_question(asked: int | None, longest: int) -> None:
    assert longest_answer(asked, 128) == longest
    assert longest_answer(None, 4096) == 256
    with pytest.raises(UserError, match="leaves no room for a question in max_length=128"):
        longest_answer(128, 128)


def test_an_unfinished_stage_is_no_policy(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n", encoding="utf-8")
    with pytest.raises(UserError, match="this stage is not finished"):
        find_policy(str(tmp_path))


def test_the_server_is_told_what_the_policy_was_trained_with(policy: Path) -> None:
    vllm = Vllm("python", "0.32.0", True)
    line = " ".join(arguments(find_policy(str(policy)), ServeOptions(str(policy)), vllm))
    assert "--host 127.0.0.1 --port 8000" in line
    assert f"--model {policy.parent / 'base'} --served-model-name base" in line
    assert f"--enable-lora --max-lora-rank 8 --lora-modules policy={policy}" in line
    assert f"--tokenizer {policy} --chat-template" in line  # the tokenizer has none of its own
    assert "--generation-config vllm --enforce-eager --kv-cache" in line
    base = str(policy.parent / "base")
    line = " ".join(arguments(find_policy(base), ServeOptions(base, port=9), Vllm("python", "0.32.0", False)))
    assert f"--model {base} --served-model-name policy" in line
    assert "lora" not in line
    assert "eager" not in line


def test_a_token_that_is_not_set_is_one_line(policy: Path) -> None:
    command = [sys.executable, "-m", "launch", "serve", str(policy), "--token-env", "NO_SUCH_TOKEN"]
    environment = ENVIRONMENT | {PYTHON_VARIABLE: PYTHON if Path(PYTHON).exists() else sys.executable}
    served = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False
    )
    assert served.returncode == 2
    assert served.stderr.count("error: ") == 1


def test_a_port_that_is_taken_is_one_line(policy: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "launch", "serve", str(policy), "--port", str(port)]
        served = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=120, check=False
        )
    assert served.returncode == 2
    assert served.stderr.startswith(f"error: --host 127.0.0.1 --port {port}: cannot be listened on (Address already")
    assert served.stderr.count("\n") == 1


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def wait_for(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + 240
    while not answers(address):
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.5)


class TestServed:
    pytestmark = needs_vllm

    def test_a_real_client_talks_to_the_policy(self, tmp_path: Path) -> None:
        policy = tiny_adapter_folder(tmp_path / "adapter", tiny_base(tmp_path / "base"))
        port, log = free_port(), tmp_path / "log"
        environment = ENVIRONMENT | {PYTHON_VARIABLE: PYTHON, "SERVE_TOKEN": "a-token"}
        command = [sys.executable, "-m", "launch", "serve", str(policy), "--port", str(port)]
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, "--token-env", "SERVE_TOKEN"], cwd=ROOT, env=environment, stdout=file, stderr=file
            )
        try:
            wait_for(process, f"http://127.0.0.1:{port}", log)
            client = [PYTHON, "-c", CLIENT, f"http://127.0.0.1:{port}/v1", "a-token", "the cat sat"]
            told = subprocess.run(client, capture_output=True, text=True, timeout=120, check=False)
            assert told.stdout.splitlines() == [
                "['base', 'policy']",
                "adapter changes the answer: True",
                "chat: True",
                "wrong token refused",
            ], told.stderr
            assert "a-token" not in log.read_text(errors="replace")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
