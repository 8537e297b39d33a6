"""The real `launch` command as a subprocess: exit statuses, error lines, --json, planning, and foreign folders."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import tiny_model_folder

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
LAUNCH = Path(sys.executable).with_name("launch")
COMMANDS = ("sft", "rm", "dpo", "ppo", "run", "plan", "eval", "doctor", "init")
HEAVY = ("torch", "transformers", "trl", "datasets", "peft", "pipeline.config")


def launch(*arguments: str | Path, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [str(LAUNCH), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )


def errors(result: subprocess.CompletedProcess[str]) -> list[str]:
    """The error lines of a command that the user can mend: all that stderr may hold."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines), result.stderr
    return [line.removeprefix("error: ") for line in lines]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows for every stage, and a config of the whole chain."""
    folder = tmp_path_factory.mktemp("project")
    tiny_model_folder(folder / "model")
    words = ["cat", "dog", "house", "mat", "yes", "no", "hello", "day"]
    prompts = [{"prompt": f"the {word} sat {number} times"} for number, word in enumerate(words * 2)]
    write_rows(folder / "rows.jsonl", [{**row, "response": "on the red mat"} for row in prompts])
    write_rows(folder / "pairs.jsonl", [{**row, "chosen": "yes " * 3, "rejected": "no"} for row in prompts])
    write_rows(folder / "prompts.jsonl", prompts)
    config = {
        "base_model": "model",
        "max_length": 64,
        "threads": 1,
        "tuning": {"method": "lora", "rank": 2, "alpha": 4},
        "sft": {"data": [{"path": "rows.jsonl"}], "max_steps": 2, "batch_size": 4, "microbatch_size": 4},
        "rm": {"data": [{"path": "pairs.jsonl"}], "max_steps": 2, "batch_size": 4, "microbatch_size": 4},
        "ppo": {
            "prompts": [{"path": "prompts.jsonl"}],
            "updates": 1,
            "rollout_batch_size": 4,
            "minibatch_size": 4,
            "response_length": 8,
            "epochs": 1,
        },
        "eval": {"prompts": [{"path": "prompts.jsonl"}], "response_length": 8, "max_prompts": 4},
    }
    (folder / "chain.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda command: " ".join(command))
def test_help_is_instant_and_imports_nothing_heavy(command: tuple[str, ...], tmp_path: Path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = launch(*command, "--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0
    assert "Usage: launch" in result.stdout
    # CPU time: the wall's share of a busy machine is not ours.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    code = f"import sys; sys.argv = ['launch', *{[*command, '--help']!r}]\nfrom launch.cli import main\ntry: main()\n"
    code += f"except SystemExit: print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    checked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert checked.stdout.endswith("HEAVY []\n")


def test_every_config_mistake_is_told_at_once(project: Path):
    result = launch("sft", "chain.yaml", "sft.lr=3", "seed=x", "ppo.kl_coef=1", "nonsense", cwd=project)
    assert errors(result) == [
        "nonsense: is no override; write key=value, as in ppo.kl.coef=0.02",
        "seed=x: is not a whole number; write a whole number",
        "sft.lr=3: unknown key; did you mean sft.learning_rate?",
        "ppo.kl_coef=1: unknown key; did you mean ppo.kl.coef?",
    ]
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("sft", "absent.yaml"), "CONFIG=absent.yaml: no such file"),
        (("sft", "chain.yaml", "--gpus", "-1"), "--gpus -1: is negative"),
        (("run", "chain.yaml", "--hostfile", "hosts"), "--hostfile hosts: cannot be read (No such file or directory)"),
        (("plan", "chain.yaml", "--device", "abacus"), "--device abacus: is not known; use one of a100-40gb"),
        (("plan", "chain.yaml", "--show", "deepspeed"), "distributed.strategy=none: is not DeepSpeed's; choose zero1"),
        (("rm", "chain.yaml"), "policy="),
        (("run", "chain.yaml", "--resume", "must"), "--resume must: "),
        (("sft", "chain.yaml", "base_model=./absent"), "base=./absent: no such file or folder"),
        (("sft", "chain.yaml", "sft.data.0.path=absent.jsonl"), "absent.jsonl"),
        (("init", "chain.yaml"), "chain.yaml: exists already"),
    ],
)
def test_what_the_user_can_mend_is_one_line(project: Path, tmp_path: Path, arguments: tuple[str, ...], line: str):
    out = () if arguments[0] == "init" else ("--out", tmp_path / "out")
    (problem,) = errors(launch(*arguments, *out, cwd=project))
    assert line in problem


@pytest.mark.parametrize("arguments", [("sft",), ("sft", "a", "--resume", "perhaps"), ("nonsense",), ("sft", "--odd")])
def test_a_wrong_command_line_is_status_2(tmp_path: Path, arguments: tuple[str, ...]):
    result = launch(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_errors_as_json(project: Path):
    result = launch("sft", "chain.yaml", "seed=x", "--json", cwd=project)
    assert result.returncode == 2
    assert json.loads(result.stdout) == {
        "status": "error",
        "problems": ["seed=x: is not a whole number; write a whole number"],
    }


def test_init_writes_a_config_that_validates(tmp_path: Path):
    assert launch("init", "my.yaml", cwd=tmp_path).returncode == 0
    from pipeline.config import load_config

    config = load_config(str(tmp_path / "my.yaml")).config
    assert config.sft is not None
    assert config.sft.learning_rate == 2e-4
    schema = json.loads(launch("init", "--schema", cwd=tmp_path).stdout)
    assert set(schema["properties"]) >= {"name", "base_model", "sft", "rm", "ppo", "eval"}


def test_doctor_finds_this_machine_well(tmp_path: Path):
    result = launch("doctor", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = {check["what"]: check["found"] for check in json.loads(result.stdout)["checks"]}
    assert found["torch"].startswith("2.13")
    assert {"python", "trl", "memory", "disk", "accelerators", "would run here"} <= set(found)


def poison(folder: Path) -> None:
    """Packages of the user's own with our names; importing one is an error."""
    for name in ("data", "configs", "stages", "pipeline", "launch"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise RuntimeError('the working directory hides our {name}')")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_command_works_beside_folders_of_our_names(project: Path, tmp_path: Path):
    poison(tmp_path)
    config, out = project / "chain.yaml", tmp_path / "out"
    run = launch("run", config, "--out", out, "--json", cwd=tmp_path, timeout=240)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert [stage["action"] for stage in answer["stages"]] == ["built"] * 4
    assert answer["report"]["rows"]
    for stage in ("sft", "rm", "ppo", "eval"):
        result = launch(stage, config, "--out", out, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert f"{stage}: skipped, already built" in result.stderr
    plan = launch("plan", config, "--out", out, "--json", cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    assert [stage["action"] for stage in json.loads(plan.stdout)["stages"]] == ["skip"] * 4
    assert launch("doctor", cwd=tmp_path).returncode == 0
    assert launch("init", "new.yaml", cwd=tmp_path).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_sigterm_leaves_a_checkpoint_and_status_75(project: Path, tmp_path: Path):
    arguments = ["sft", str(project / "chain.yaml"), "--out", str(tmp_path / "out"), "sft.max_steps=2000"]
    process = subprocess.Popen([str(LAUNCH), *arguments], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out" / "sft" / "metrics.jsonl"
    until = time.monotonic() + 90
    while time.monotonic() < until and not (metrics.is_file() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr
    assert any((tmp_path / "out" / "sft" / "checkpoints").iterdir())
    assert not (tmp_path / "out" / "sft" / "artifact.json").exists()
    plan = launch(*arguments, "--dry-run", "--json", cwd=tmp_path)
    assert json.loads(plan.stdout)["stages"][0]["action"] == "resume"


@pytest.mark.real_data
def test_plan_shows_rows_masks_and_memory_and_writes_nothing(tmp_path: Path):
    model = SHARED / "models" / "stories260K-llama"
    if not model.is_dir():
        pytest.skip("../shared is missing")
    rows: list[dict[str, Any]] = [{"prompt": f"Once upon {n}", "response": "a cat sat."} for n in range(9)]
    write_rows(tmp_path / "rows.jsonl", [*rows, {"prompt": "no response"}, rows[0]])
    config = {"base_model": str(model), "sft": {"data": [{"path": "rows.jsonl"}], "batch_size": 4, "holdout": 0.0}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(config))
    before = sorted(tmp_path.rglob("*"))
    text = launch("plan", "plan.yaml", "max_refused=0.1", cwd=tmp_path)
    assert text.returncode == 0, text.stderr
    assert "⟦a cat sat.</s>⟧" in text.stdout
    assert "<s> Once upon 0⟦" in text.stdout
    assert "rows.jsonl:10: " in text.stdout
    assert "batch 4 = 4 rows per device x 1 accumulation x 1 rank" in text.stdout
    assert "9 rows / 4 = 2.2 steps per epoch; x 1 epoch = 3 optimizer steps" in text.stdout
    strict = launch("plan", "plan.yaml", "--json", cwd=tmp_path)
    assert strict.returncode == 2
    (stage,) = json.loads(strict.stdout)["stages"]
    counted = {name: stage["data"]["rows"][name] for name in ("read", "refused", "duplicates", "train")}
    assert counted == {"read": 11, "refused": 1, "duplicates": 1, "train": 9}
    # 0.26M parameters in float32, as the model's own README counts them
    assert stage["memory"]["policy: weights"] == pytest.approx(0.26e6 * 4, rel=0.02)
    assert sorted(tmp_path.rglob("*")) == before
