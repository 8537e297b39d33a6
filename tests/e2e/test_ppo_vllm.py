"""PPO on a real vLLM server: it learns as with the policy itself, and what goes wrong there leaves the state kept."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from stages.core.rollout.server import PYTHON_VARIABLE
from tests.faults.test_resume_ppo import MEASURED, finish, rows, start, stop_after
from tests.ppo_runs import character_tokenizer, save_model, small_llama
from tests.vllm import PYTHON, living, needs_vllm

pytestmark = needs_vllm

UPDATES, TIMEOUT = 8, 20.0
REWARD = "def score(prompts, responses, rows):\n    return [float(each.count('a')) for each in responses]\n"


def write_run(folder: Path) -> Path:
    """A config whose policy learns to say one letter; the same for every engine."""
    tokenizer = character_tokenizer("abcde ")
    base = save_model(small_llama(len(tokenizer), hidden=128), tokenizer, folder / "base")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    prompts = [{"prompt": f"{one}{other} "} for one in "abcde" for other in "abcd"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    config = {
        "name": "vllm",
        "base_model": str(base),
        "max_length": 48,
        "threads": 1,
        "checkpoint_every": 100,  # what stands after a failure was saved because of it
        "tuning": {"rank": 4, "alpha": 8},
        "ppo": {
            "prompts": [{"path": "prompts.jsonl"}],
            "reward": {"function": "reward.py:score"},
            "updates": UPDATES,
            "rollout_batch_size": 32,
            "samples_per_prompt": 2,
            "minibatch_size": 16,
            "epochs": 2,
            "response_length": 12,
            "learning_rate": 5e-3,
            "kl": {"coef": 0.01},
            "eval_every": 4,
            "eval_prompts": 2,
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> None:
    os.environ[PYTHON_VARIABLE] = PYTHON


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def vllm(staleness: int = 0) -> list[str]:
    return [f"ppo.rollout={{engine: vllm, timeout_s: {TIMEOUT:g}, staleness: {staleness}}}"]


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of each engine that nobody disturbed."""
    outs: dict[str, Path] = {}
    for name, keys in (("native", ["ppo.rollout.engine=native"]), ("vllm", vllm()), ("ahead", vllm(1))):
        outs[name] = tmp_path_factory.mktemp(name)
        code, output = finish(start(config, outs[name], *keys))
        assert code == 0, output
    return outs


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def column(out: Path, name: str) -> list[float]:
    return [row[name] for row in metrics(out) if name in row]


def servers_of(pid: int) -> list[psutil.Process]:
    """Every process that the launch started, the server's keeper first."""
    return psutil.Process(pid).children(recursive=True)


def test_it_learns_what_the_policy_itself_learns(undisturbed: dict[str, Path]) -> None:
    """Other random numbers, the same distribution: scores rise alike, and sampler and trainer agree."""
    for name, out in undisturbed.items():
        scores = column(out, "score/mean")
        assert len(scores) == UPDATES
        assert sum(scores[-2:]) > sum(scores[:2]) + 4, (name, scores)
    first = {name: column(out, "score/mean")[0] for name, out in undisturbed.items()}
    spread = column(undisturbed["native"], "score/std")[0] / 32**0.5
    assert abs(first["vllm"] - first["native"]) < 5 * spread
    out = undisturbed["vllm"]
    assert max(column(out, "kl/sampler_trainer")) < 1e-6
    assert len(column(out, "kl/sampler_trainer")) == UPDATES
    assert column(out, "policy/first_ratio_mean") == pytest.approx([1] * UPDATES, abs=1e-4)
    assert column(out, "importance/mean") == pytest.approx([1] * UPDATES, abs=1e-3)
    assert column(out, "rollout/staleness") == [0] * UPDATES
    assert not list((out / "ppo" / "engine").glob("v[0-9]*"))  # weights handed over are gone, the log is kept
    assert not [name for name in json.loads((out / "ppo" / "artifact.json").read_text())["files"] if "engine" in name]


def test_ahead_of_time_the_samples_are_one_update_old(undisturbed: dict[str, Path]) -> None:
    out = undisturbed["ahead"]
    assert column(out, "rollout/staleness") == [0] + [1] * (UPDATES - 1)
    assert max(column(out, "kl/sampler_trainer")) < 1e-6
    assert min(abs(each - 1) for each in column(out, "importance/max")[1:]) > 1e-3


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.soak)])
def test_a_lost_server_leaves_the_state_kept(
    config: Path, undisturbed: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    """Killed or hung: one line within the time-out plus 10 s, no orphan; the next launch goes on to the same end."""
    process = start(config, tmp_path, *vllm())
    assert stop_after(process, tmp_path, 3, 0, signal.SIGCONT)  # nothing: only waits for the third update
    processes = servers_of(process.pid)
    server = next(each for each in processes if "vllm" in " ".join(each.cmdline()) and each != processes[0])
    server.send_signal(number)
    began = time.monotonic()
    code, output = finish(process)
    assert code == 1, output
    training = max(column(tmp_path, "seconds"))  # the update under way is not the engine's time
    assert time.monotonic() - began < TIMEOUT + 10 + training
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    done = len(metrics(tmp_path))
    assert "vllm-0" in errors[0]
    assert f"saved after update {done}" in errors[0]
    assert "Traceback" not in output
    assert living(processes) == []
    assert 3 <= done < UPDATES
    code, output = finish(start(config, tmp_path, *vllm(), "--resume", "must"))
    assert code == 0, output
    ours, theirs = (
        [{key: value for key, value in row.items() if not key.startswith(MEASURED)} for row in rows(path)]
        for path in (tmp_path / "ppo" / "metrics.jsonl", undisturbed["vllm"] / "ppo" / "metrics.jsonl")
    )
    assert [row["step"] for row in ours] == list(range(1, UPDATES + 1))
    # The same seeds were asked again; who shares a batch with whom moves a server's rounding, not more.
    assert ours[done]["score/mean"] == pytest.approx(theirs[done]["score/mean"], abs=0.5)


def test_a_stop_takes_the_server_along(config: Path, tmp_path: Path) -> None:
    process = start(config, tmp_path, *vllm(1))
    assert stop_after(process, tmp_path, 2, 0, signal.SIGCONT)
    processes = servers_of(process.pid)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    assert living(processes) == []
    done = len(metrics(tmp_path))
    code, output = finish(start(config, tmp_path, *vllm(1), "--resume", "must"))
    assert code == 0, output
    assert column(tmp_path, "step") == list(range(1, UPDATES + 1))
    assert column(tmp_path, "rollout/staleness")[done] == 0  # what was under way is sampled again
