"""`ppo.rollout:` which engine runs, which keys it reads, and what is refused before anything trains."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from launch.answer import Answer, answering
from launch.doctor import examine
from pipeline.chain import Launch, run_stages
from pipeline.config import dump_config, validate
from pipeline.engines import stage_engine
from pipeline.inputs import Run, stage_facts
from pipeline.plan import make_plan
from pipeline.yaml_text import parse_yaml
from stages.core.rollout import choice
from stages.core.rollout.choice import Choice, choose_engine
from stages.core.rollout.config import EngineConfig
from stages.core.rollout.protocol import EngineError
from stages.core.rollout.server import PYTHON_VARIABLE, Vllm
from stages.core.rollout.start import vllm_options
from stages.ppo.rollout_config import RolloutConfig
from tests.tiny import tiny_model_folder

INSTALLED = Vllm("/opt/vllm/bin/python", "0.32.0", False)


def problem(**rollout: object) -> str:
    with pytest.raises(UserError) as caught:
        validate({"base_model": "m", "ppo": {"prompts": [{"path": "p.jsonl"}], "rollout": rollout}}, [])
    (line,) = caught.value.problems
    return line


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the machine has: vLLM or none, a GPU or none."""

    def has(*, vllm: Vllm | None, gpu: bool) -> None:
        monkeypatch.setattr(choice, "find_vllm", lambda _=None: vllm)
        monkeypatch.setattr(choice, "has_gpu", lambda: gpu)

    return has


IDLE: list[tuple[str, dict[str, object]]] = [
    ("native", {"servers": ["http://a:1"]}),
    ("native", {"server_count": 2}),
    ("native", {"token_env": "T"}),
    ("native", {"timeout_s": 5.0}),
    ("native", {"vllm_python": "p"}),
    ("native", {"gpu_memory_share": 0.3}),
    ("native", {"devices": ["1"]}),
    ("native", {"sleep": True}),
    ("native", {"staleness": 1}),
    ("native", {"max_sampler_kl": 0.1}),
    ("native", {"importance_cap": None}),
    *((engine, {"servers": ["http://a:1"]}) for engine in ("auto", "vllm")),
    *((engine, {"server_count": 2}) for engine in ("auto", "vllm")),
    *((engine, {"token_env": "T"}) for engine in ("auto", "vllm")),
    ("vllm-server", {"token_env": "T"}),
]


@pytest.mark.parametrize(("engine", "given"), IDLE)
def test_a_key_that_the_engine_does_not_read_is_refused(engine: str, given: dict[str, object]) -> None:
    ((name, value),) = given.items()
    line = problem(engine=engine, **given)
    shown = value if isinstance(value, str) else json.dumps(value)
    assert line.startswith(f"ppo.rollout.{name}={shown}: no effect with ")
    assert "; take out" in line


@pytest.mark.parametrize(
    "given", [{"server_count": 2}, {"vllm_python": "p"}, {"gpu_memory_share": 0.3}, {"sleep": True}]
)
def test_servers_started_elsewhere_take_no_key_of_ours(given: dict[str, object]) -> None:
    assert "no effect with servers, which are started elsewhere" in problem(
        engine="vllm-server", servers=["http://a:1"], **given
    )


def test_every_key_has_an_engine_that_reads_it() -> None:
    ours = {"timeout_s": 5, "vllm_python": "p", "gpu_memory_share": 0.3, "staleness": 1, "importance_cap": None}
    for engine in ("auto", "vllm", "vllm-server"):
        assert RolloutConfig(engine=engine, max_sampler_kl=0.1, devices=["0"], **ours)
    assert RolloutConfig(engine="vllm", sleep=True)
    assert RolloutConfig(engine="vllm-server", server_count=2, devices=["0", "1"])
    assert RolloutConfig(
        engine="vllm-server", servers=["http://a:1", "https://b"], token_env="T", timeout_s=5, staleness=2
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"servers": ["a:1"]}, "an address is http://host:port"),
        ({"servers": ["http://u:p@a:1"]}, "an address is http://host:port"),
        ({"servers": ["http://a:1/v1"]}, "an address is http://host:port"),
        ({"servers": ["http://a:1", "http://a:1"]}, "names a server twice"),
        ({"server_count": 0}, "at least 1"),
        ({"server_count": 2, "devices": ["0"]}, "one entry a server"),
        ({"staleness": -1}, "at least 0"),
        ({"staleness": 1, "sleep": True}, "no effect with staleness=1"),
        ({"importance_cap": 0.5}, "at least 1"),
        ({"timeout_s": 0}, "above 0"),
        ({"max_sampler_kl": 0}, "above 0"),
    ],
)
def test_what_makes_no_sense_is_one_line(given: dict[str, object], words: str) -> None:
    assert words in problem(engine="vllm-server", **given)


def test_auto_is_vllm_where_it_is_installed_and_a_gpu_is_there(machine: Any) -> None:
    found = {}
    for vllm in (None, INSTALLED):
        for gpu in (False, True):
            machine(vllm=vllm, gpu=gpu)
            found[bool(vllm), gpu] = choose_engine(EngineConfig(), "s")
    assert {place: each.engine for place, each in found.items()} == {
        (False, False): "native",
        (False, True): "native",
        (True, False): "native",
        (True, True): "vllm",
    }
    assert found[False, False].text == "native: in this process, no vLLM and no GPU here"
    assert found[True, True].text == "vllm: a server of vllm 0.32.0 (/opt/vllm/bin/python)"
    assert not any(each.problems for each in found.values())


def test_what_a_machine_lacks_is_one_line(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(vllm=None, gpu=False)
    (line,) = choose_engine(EngineConfig(engine="vllm"), "ppo.rollout").problems
    assert line.startswith("ppo.rollout.engine=vllm: vLLM is not installed; run `make vllm`")
    (line,) = choose_engine(RolloutConfig(staleness=1), "ppo.rollout", staleness=1).problems
    assert line.startswith("ppo.rollout.staleness=1: engine=auto is native here (in this process, no vLLM and no GPU")
    machine(vllm=INSTALLED, gpu=False)
    (line,) = choose_engine(EngineConfig(engine="vllm", gpu_memory_share=0.3), "ppo.rollout").problems
    assert line == "ppo.rollout.gpu_memory_share=0.3: no effect, there is no GPU here; take it out"
    machine(vllm=INSTALLED, gpu=True)
    assert not choose_engine(EngineConfig(engine="vllm", gpu_memory_share=0.3), "ppo.rollout").problems
    elsewhere = EngineConfig(engine="vllm-server", servers=["http://a:1"], token_env="NO_SUCH_TOKEN")
    (line,) = choose_engine(elsewhere, "ppo.rollout").problems
    assert line.startswith("ppo.rollout.token_env=NO_SUCH_TOKEN: this environment variable is not set")
    monkeypatch.setenv("NO_SUCH_TOKEN", "secret")
    assert choose_engine(elsewhere, "ppo.rollout") == Choice("vllm-server", "at http://a:1")


def test_an_interpreter_without_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    (line,) = choose_engine(EngineConfig(engine="vllm", vllm_python=os.devnull), "ppo.rollout").problems
    assert line.startswith("ppo.rollout: vllm: ")
    assert os.devnull in line


def test_the_keys_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    ours = EngineConfig(
        engine="vllm-server",
        server_count=2,
        timeout_s=5,
        vllm_python="p",
        gpu_memory_share=0.3,
        devices=["0", "1"],
        sleep=True,
    )
    options = vllm_options(ours, max_length=64, responses=1000)
    assert (options.server_count, options.timeout_s, options.python, options.memory_share) == (2, 5, "p", 0.3)
    assert (options.devices, options.sleep, options.urls, options.token) == (("0", "1"), True, (), None)
    assert (options.max_length, options.batch_size) == (64, 256)
    theirs = EngineConfig(engine="vllm-server", servers=["http://a:1"], token_env="SOME_TOKEN")
    options = vllm_options(theirs, max_length=64, responses=8)
    assert (options.urls, options.token, options.batch_size) == (("http://a:1",), "secret", 8)


def run_of(folder: Path, **rollout: object) -> Run:
    base = folder / "base"
    if not base.exists():
        tiny_model_folder(base)
        (folder / "prompts.jsonl").write_text('{"prompt": "say"}\n{"prompt": "the cat"}\n', encoding="utf-8")
        (folder / "rewards.py").write_text("def score(prompts, responses, rows):\n    return [0.0 for _ in prompts]\n")
    ppo = {"prompts": [{"path": "prompts.jsonl"}], "reward": {"function": "rewards.py:score"}, "rollout": rollout}
    raw = {"base_model": "base", "max_length": 96, "ppo": ppo}
    return Run(validate(raw, [folder]), folder, folder / "out")


def test_how_a_server_is_reached_changes_no_result_and_who_samples_how_does(tmp_path: Path) -> None:
    """A run that was stopped for a dead server, or for its bound, goes on with another."""
    facts = stage_facts(run_of(tmp_path, engine="vllm-server"), "ppo")
    for same in (
        {"servers": ["http://a:1"], "token_env": "T"},
        {"server_count": 2},
        {"timeout_s": 5},
        {"max_sampler_kl": 1},
    ):
        assert stage_facts(run_of(tmp_path, engine="vllm-server", **same), "ppo") == facts
    for other in ({"staleness": 1}, {"importance_cap": 3.0}, {"temperature": 0.7}):
        assert stage_facts(run_of(tmp_path, engine="vllm-server", **other), "ppo") != facts
    assert stage_facts(run_of(tmp_path, engine="vllm"), "ppo") != facts


def test_the_config_survives_its_dump(tmp_path: Path) -> None:
    config = run_of(tmp_path, engine="vllm", staleness=1, importance_cap=None).config
    assert validate(parse_yaml(dump_config(config)), []) == config


def test_the_plan_names_the_engine_and_what_it_lacks(tmp_path: Path, machine: Any) -> None:
    machine(vllm=None, gpu=False)
    (plan,) = make_plan(run_of(tmp_path), ["ppo"], resume="auto")
    assert plan.engine == "native: in this process, no vLLM and no GPU here"
    assert not plan.problems
    assert isinstance(plan.memory, dict)
    assert any(name.startswith("rollout") for name in plan.memory)
    (plan,) = make_plan(run_of(tmp_path, engine="vllm"), ["ppo"], resume="auto")
    assert [line for line in plan.problems if "vLLM is not installed" in line]
    machine(vllm=INSTALLED, gpu=False)
    (plan,) = make_plan(run_of(tmp_path, engine="vllm"), ["ppo"], resume="auto")
    assert plan.engine == "vllm: a server of vllm 0.32.0 (/opt/vllm/bin/python)"
    assert isinstance(plan.memory, dict)
    assert not any(name.startswith("rollout") for name in plan.memory)  # a process of its own
    assert stage_engine(run_of(tmp_path), "sft") is None


def test_nothing_begins_without_the_engine(tmp_path: Path, machine: Any) -> None:
    machine(vllm=None, gpu=False)
    run = run_of(tmp_path, engine="vllm")
    launch = Launch(run, "auto", None, print, lambda: False, lambda: None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="vLLM is not installed"):
        run_stages(launch, ["ppo"])
    assert not run.folder.exists()


def test_the_doctor_says_which_engine_would_run(machine: Any) -> None:
    def rollouts() -> str:
        return next(check["found"] for check in examine().data["checks"] if check["what"] == "rollouts")

    machine(vllm=None, gpu=False)
    assert rollouts() == "auto is native: in this process, no vLLM and no GPU here"
    machine(vllm=INSTALLED, gpu=False)
    assert rollouts().endswith("; engine=vllm would be a server of vllm 0.32.0 (/opt/vllm/bin/python)")
    machine(vllm=INSTALLED, gpu=True)
    assert rollouts() == "auto is vllm: a server of vllm 0.32.0 (/opt/vllm/bin/python)"


def test_an_engines_failure_is_one_line_and_no_mistake_of_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> Answer:
        raise EngineError("rollout engine vllm: no server is left")

    assert answering(fail, as_json=False) == 1
    assert capsys.readouterr().err == "error: rollout engine vllm: no server is left\n"
