"""The metrics log (no step missing, none twice, always valid JSON) and its alarms."""

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from pipeline.alarms import AlarmWatch
from pipeline.console import StageView, duration, figures_text
from pipeline.metrics import MetricsLog, read_metrics
from pipeline.report import print_report
from pipeline.trackers import check_trackers, open_trackers
from stages.core.config import SharedConfig

Curve = Callable[[int, random.Random], dict[str, float]]


class Recorder:
    """A view that remembers what it was shown."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, total_steps: int, unit: str, done: int) -> None:
        self.lines.append(f"{total_steps} {unit} {done}")

    def step(self, step: int, values: Mapping[str, float]) -> None: ...

    def say(self, message: str) -> None:
        self.lines.append(message)


def steps(folder: Path, name: str = "metrics.jsonl") -> list[int]:
    return [json.loads(line)["step"] for line in (folder / name).read_text().splitlines()]


def open_log(folder: Path) -> MetricsLog:
    return MetricsLog(folder, view=Recorder())


def test_writes_one_object_a_step_at_once(tmp_path: Path):
    log = open_log(tmp_path)
    log.log(1, {"loss": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'  # before any close
    log.log(2, {"loss": 1.5})
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("step", [1, 2])
def test_refuses_a_step_twice_or_backwards(tmp_path: Path, step: int):
    log = open_log(tmp_path)
    log.log(2, {})
    with pytest.raises(AssertionError):
        log.log(step, {})
    reopened = open_log(tmp_path)
    with pytest.raises(AssertionError):
        reopened.log(step, {})


def test_what_is_not_finite_becomes_null(tmp_path: Path):
    open_log(tmp_path).log(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 1.0}]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', "\x00\x00\x00", '{"step": 3}\x00'])
def test_a_line_torn_by_a_kill_is_repaired(tmp_path: Path, torn: str):
    log = open_log(tmp_path)
    log.log(1, {"loss": 1.0})
    log.log(2, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    reopened = open_log(tmp_path)
    assert steps(tmp_path) == [1, 2]
    reopened.log(3, {"loss": 1.0})
    assert steps(tmp_path) == [1, 2, 3]


def test_rewind_drops_what_is_written_again(tmp_path: Path):
    log = open_log(tmp_path)
    for step in range(1, 6):
        log.log(step, {"loss": 1.0})
        log.samples(step, [{"prompt": "a", "response": "b"}, {"prompt": "c", "score": math.nan}])
    log.rewind(3)
    assert steps(tmp_path) == [1, 2, 3]
    assert steps(tmp_path, "samples.jsonl") == [1, 1, 2, 2, 3, 3]
    log.log(4, {"loss": 1.0})
    assert steps(tmp_path) == [1, 2, 3, 4]
    log.rewind(0)
    assert steps(tmp_path) == []


def test_samples_are_kept_as_they_are(tmp_path: Path):
    open_log(tmp_path).samples(7, [{"prompt": "故事\n", "score": math.inf}])
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == {"step": 7, "prompt": "故事\n", "score": None}


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = SharedConfig(base_model="x")
    for first, last in [(1, 6), (4, 8)]:
        log = MetricsLog(tmp_path, view=Recorder(), trackers=open_trackers(config, "sft", tmp_path, {}))
        log.rewind(first - 1)
        for step in range(first, last + 1):
            log.log(step, {"loss": float(first * 100 + step)})
        log.close()
    events = EventAccumulator(str(tmp_path / "trackers" / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == list(range(1, 9))
    assert [event.value for event in scalars] == [101, 102, 103, 404, 405, 406, 407, 408]


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(UserError, match="trackers=wandb: not installed; run `pip install wandb`"):
        check_trackers(SharedConfig(base_model="x", trackers=["tensorboard", "wandb"]))


def healthy(step: int, noise: random.Random) -> dict[str, float]:
    """A PPO run as it should be: KL grows to a few nats, scores rise, entropy sinks by a third."""
    done = step / 200
    return {
        "loss": noise.gauss(0.1, 0.05),
        "policy/loss": noise.gauss(-0.01, 0.02),
        "value/loss": 0.2 + noise.gauss(0, 0.02),
        "kl/ref_mean": 6 * math.sqrt(done) + noise.gauss(0, 0.15),
        "response/length_mean": 40 * (1 + 0.4 * done) + noise.gauss(0, 2),
        "policy/entropy": 2.5 * (1 - 0.35 * done) + noise.gauss(0, 0.05),
        "score/mean": 2 * done + noise.gauss(0, 0.15),
        "score/std": 1 - 0.5 * done + noise.gauss(0, 0.05),
        "value/explained_variance": min(0.6, -0.3 + 2 * done) + noise.gauss(0, 0.1),
        "grad_norm": noise.lognormvariate(0.7, 0.5),
    }


def alarms_of(curve: Curve, *, seed: int, num_steps: int = 200) -> list[tuple[int, str]]:
    watch, noise = AlarmWatch(), random.Random(seed)
    watch.total_steps = num_steps
    found: list[tuple[int, str]] = []
    for step in range(1, num_steps + 1):
        found.extend((step, name) for name, _ in watch.observe(curve(step, noise)))
    return found


def test_healthy_runs_stay_silent():
    alarmed = [seed for seed in range(100) if alarms_of(healthy, seed=seed)]
    assert len(alarmed) <= 1, alarmed


def from_step(start: int, name: str, value: Callable[[int, random.Random], float]) -> Curve:
    """A healthy run of which one figure goes wrong at `start`."""

    def curve(step: int, noise: random.Random) -> dict[str, float]:
        values = healthy(step, noise)
        return values | {name: value(step - start, noise)} if step >= start else values

    return curve


BAD: list[tuple[str, str, Callable[[int, random.Random], float]]] = [
    ("loss_not_finite", "loss", lambda since, noise: math.nan),
    ("loss_not_finite", "value/loss", lambda since, noise: math.inf),
    ("kl_negative", "kl/ref_mean", lambda since, noise: -0.5 + noise.gauss(0, 0.15)),
    ("kl_exploding", "kl/ref_mean", lambda since, noise: 5 * 1.4**since),
    ("kl_exploding", "kl/ref_mean", lambda since, noise: 120 + noise.gauss(0, 5)),
    ("length_drifting", "response/length_mean", lambda since, noise: 42 + 6 * since + noise.gauss(0, 2)),
    ("length_drifting", "response/length_mean", lambda since, noise: max(40 - 3 * since, 2) + noise.gauss(0, 0.5)),
    ("entropy_collapsing", "policy/entropy", lambda since, noise: 2.2 * 0.8**since),
    ("scores_constant", "score/mean", lambda since, noise: 1.0),
    ("scores_saturating", "score/std", lambda since, noise: 0.8 * 0.7**since),
    ("gradient_leaping", "grad_norm", lambda since, noise: 100.0 if since == 7 else noise.lognormvariate(0.7, 0.5)),
    ("critic_useless", "value/explained_variance", lambda since, noise: -0.5 + noise.gauss(0, 0.1)),
]


@pytest.mark.parametrize(
    ("alarm", "name", "value"), BAD, ids=[f"{alarm}-{place}" for place, (alarm, *_) in enumerate(BAD)]
)
@pytest.mark.parametrize("seed", range(5))
def test_what_goes_wrong_is_named_within_20_steps(
    alarm: str, name: str, value: Callable[[int, random.Random], float], seed: int
):
    start = 60
    found = alarms_of(from_step(start, name, value), seed=seed)
    raised = [step for step, raised in found if raised == alarm]
    assert raised, found
    assert start <= raised[0] <= start + 20
    assert {raised for _, raised in found} == {alarm}  # and nothing else is blamed


def test_a_policy_that_collapses_at_once_is_named():
    found = alarms_of(from_step(2, "policy/entropy", lambda since, noise: 1e-6), seed=0, num_steps=10)
    assert [name for _, name in found] == ["entropy_collapsing"]


def test_a_leap_that_a_bound_shortens_is_no_alarm():
    def leaping(step: int, noise: random.Random) -> dict[str, float]:
        return healthy(step, noise) | {"grad_norm/bounded_fraction": 0.1} | ({"grad_norm": 500.0} if step == 60 else {})

    assert alarms_of(leaping, seed=0) == []


def test_an_alarm_is_told_once_until_it_clears(tmp_path: Path):
    view = Recorder()
    log = MetricsLog(tmp_path, view=view)
    log.start(10, "update")
    for step, loss in enumerate([1.0, math.nan, math.nan, 1.0, math.nan], start=1):
        log.log(step, {"loss": loss})
    told = [line for line in view.lines if line.startswith("alarm")]
    assert [line.split(":")[0] for line in told] == ["alarm at update 2", "alarm at update 5"]
    recorded = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert [(row["step"], row["alarm"]) for row in recorded] == [(2, "loss_not_finite"), (5, "loss_not_finite")]


def test_a_resumed_run_does_not_repeat_its_alarms(tmp_path: Path):
    log = open_log(tmp_path)
    for step in (1, 2, 3):
        log.log(step, {"loss": math.nan})
    reopened = open_log(tmp_path)
    reopened.rewind(2)
    reopened.log(3, {"loss": math.nan})
    assert steps(tmp_path, "alarms.jsonl") == [1]


def plain_console() -> Any:
    from rich.console import Console

    return Console(width=200, force_terminal=False, record=True, file=open("/dev/null", "w"))


def test_plain_lines_show_first_and_last_only_when_steps_are_fast():
    console = plain_console()
    with StageView("sft", console) as view:
        view.start(50, "step", 0)
        for step in range(1, 51):
            view.step(step, {"loss": 1 / step, "lr": 1e-4, "grad_norm": 3.0})
    lines = console.export_text().splitlines()
    assert lines[0] == "sft: 50 steps"
    assert lines[1].startswith("sft: step 1/50 · loss 1 · lr 0.0001")
    assert lines[-1] == "sft: step 50/50 · loss 0.02 · lr 0.0001"
    assert len(lines) == 3


def test_a_line_without_figures_ends_with_its_step():
    console = plain_console()
    with StageView("eval", console) as view:
        view.start(1, "evaluation", 0)
        view.step(1, {"gold/mean": 0.5})
    assert console.export_text().splitlines()[-1] == "eval: evaluation 1/1"


def test_one_step_is_no_plural_and_a_resumed_stage_says_what_was_done():
    console = plain_console()
    with StageView("eval", console) as view:
        view.start(1, "evaluation", 0)
        view.start(50, "step", 20)
    assert console.export_text().splitlines() == ["eval: 1 evaluation", "eval: 50 steps, 20 done before"]


def test_figures_and_durations_read_well():
    assert figures_text({"loss": 0.123456, "score/mean": 2.0, "unknown": 1.0}) == "score 2 · loss 0.1235"
    assert figures_text({"kl/ref_mean": -6e-7, "lr": 1e-6, "loss": math.nan}) == "KL 0 · loss nan · lr 1e-06"
    assert [duration(seconds) for seconds in (5, 65, 3700)] == ["5s", "1m05s", "1h01m"]


def test_the_closing_table_shows_every_cell():
    console = plain_console()
    report = {
        "title": "Result",
        "columns": ["policy", "gold"],
        "rows": [["sft", 0.51234], ["ppo", None]],
        "notes": ["n = 9"],
    }
    print_report(report, console)
    text = console.export_text()
    assert "Result" in text
    assert "0.512" in text
    assert "n = 9" in text
