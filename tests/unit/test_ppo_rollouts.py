"""Who samples which update's responses: versions, staleness, and prompts that are consumed once."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.metrics import MetricsLog, read_metrics
from stages.core.bank import PolicyBank
from stages.core.checkpoints import latest_checkpoint
from stages.core.context import Interrupted, StageContext
from stages.core.responses import check_versions
from stages.core.rollout.protocol import Completion, EngineError
from stages.ppo import stage
from stages.ppo.config import PpoConfig
from stages.ppo.rollouts import staleness_of
from tests.copy_engine import CopyEngine
from tests.ppo_runs import Quiet, ppo_context
from tests.tiny import tiny_model_folder

UPDATES, BATCH = 6, 4
REWARD = """
from pathlib import Path

def score(prompts, responses, rows):
    if len(prompts) > 1:  # an evaluation has one prompt
        with Path(__file__).with_name("trained.txt").open("a") as file:
            file.write("|".join(prompts) + "\\n")
    return [len(set(each)) - 0.3 * len(each) for each in responses]
"""
# What a clock or the machine decides.
MEASURED = ("time/", "throughput/", "memory/", "seconds")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"))


def completion(version: int) -> Completion:
    return Completion((5, 1), (-1.0, -2.0), True, version=version)


def context_of(folder: Path, base: Path, **rollout: object) -> StageContext[PpoConfig]:
    rows = [{"prompt": f"say {number}"} for number in range(7)]
    settings: dict[str, Any] = {
        "updates": UPDATES,
        "rollout_batch_size": BATCH,
        "minibatch_size": BATCH,
        "epochs": 1,
        "response_length": 8,
        "learning_rate": 3e-3,
        "score": {"normalize": True},
        "eval_every": 2,
    }
    context = ppo_context(folder, base, rows, REWARD, **settings, rollout={"engine": "vllm", **rollout})
    return replace(context, shared=context.shared.model_copy(update={"checkpoint_every": 100}))


def again(context: StageContext[PpoConfig]) -> StageContext[PpoConfig]:
    """A new launch in the same folder."""
    context.metrics.close()
    return replace(context, metrics=MetricsLog(context.out, view=Quiet()), should_stop=lambda: False)


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., CopyEngine]:
    """Runs the stage on a CopyEngine; the engine, and the error where there was one as its `error`."""

    def run(context: StageContext[PpoConfig], **options: Any) -> CopyEngine:
        engines: list[CopyEngine] = []

        def start(_: StageContext[PpoConfig], bank: PolicyBank) -> CopyEngine:
            engines.append(CopyEngine(bank, **options))
            return engines[-1]

        monkeypatch.setattr(stage, "_start_engine", start)
        try:
            stage.run(context)
        except (EngineError, Interrupted) as error:
            engines[0].error = error
        assert engines[0].closed
        return engines[0]

    return run


def trained_prompts(context: StageContext[PpoConfig]) -> list[str]:
    """The prompts of each update, in the order in which they were scored."""
    return (context.run_folder / "trained.txt").read_text().splitlines()


def figures(context: StageContext[PpoConfig]) -> list[dict[str, Any]]:
    """The log without what a clock decides."""
    return [
        {name: value for name, value in row.items() if not name.startswith(MEASURED)}
        for row in read_metrics(context.out)
    ]


def column(context: StageContext[PpoConfig], name: str) -> list[float]:
    return [row[name] for row in read_metrics(context.out) if name in row]


@pytest.mark.parametrize("versions", [[3, 2], [2, 2], [4, 4], [3, 4, 3], []])
def test_only_the_version_asked_for_is_an_answer(versions: Sequence[int]) -> None:
    with pytest.raises(EngineError, match="asked for policy version 3"):
        check_versions([completion(version) for version in versions], 3)
    check_versions([completion(3), completion(3)], 3)


def test_staleness_is_counted_and_bounded() -> None:
    assert staleness_of([completion(7)], 7, allowed=0) == 0
    assert staleness_of([completion(5)], 7, allowed=2) == 2
    for versions, allowed in [([6], 0), ([4], 2), ([7, 4], 2), ([8], 2), ([8, 7], 0)]:
        with pytest.raises(EngineError, match=f"staleness={allowed} allows"):
            staleness_of([completion(version) for version in versions], 7, allowed=allowed)


def test_an_engine_of_its_own_learns_what_the_policy_itself_learns(
    tmp_path: Path, base: Path, launch: Callable[..., CopyEngine]
) -> None:
    """Its samples are the policy's, and so are the figures but for rounding; it has the policy before each rollout."""
    own, policys = context_of(tmp_path / "own", base), context_of(tmp_path / "native", base)
    native = PpoConfig.model_validate(policys.config.model_dump() | {"rollout": {"engine": "native"}})
    stage.run(replace(policys, config=native))
    engine = launch(own)
    assert engine.synced == list(range(UPDATES + 1))
    assert trained_prompts(own) == trained_prompts(policys)
    for ours, theirs in zip(figures(own), figures(policys), strict=True):
        assert ours.pop("kl/sampler_trainer") == pytest.approx(0, abs=1e-9)
        assert ours.pop("importance/mean") == pytest.approx(1, abs=1e-5)
        assert ours.pop("importance/max") == pytest.approx(1, abs=1e-4)
        assert ours.pop("importance/truncated") == 0
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
        assert ours["rollout/staleness"] == 0


@pytest.mark.parametrize(
    ("staleness", "ages", "synced"),
    [
        # update u learns from version u - 2; evaluations follow updates 2, 4 and 6
        (1, [0, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 6]),
        # versions 0, 0 | 0, 0 (updates 2, 3) | 2, 2 (4, 5) | 4 (6)
        (2, [0, 1, 2, 1, 2, 1], [0, 2, 4, 6]),
        (9, [0, 1, 2, 3, 4, 5], [0, 2, 4, 6]),
    ],
)
def test_ahead_of_time_each_update_has_its_prompts_from_an_older_version(
    tmp_path: Path, base: Path, launch: Callable[..., CopyEngine], staleness: int, ages: list[int], synced: list[int]
) -> None:
    punctual, context = context_of(tmp_path / "now", base), context_of(tmp_path / "ahead", base, staleness=staleness)
    launch(punctual)
    engine = launch(context)
    assert column(context, "rollout/staleness") == ages
    assert engine.synced == synced
    assert trained_prompts(context) == trained_prompts(punctual)
    batches = [(version, seeds) for version, prompts, seeds in engine.diary if len(prompts) == BATCH]
    probes = len(column(context, "kl/sampler_trainer"))
    assert len(batches) == UPDATES + probes
    assert max(column(context, "kl/sampler_trainer")) < 1e-9
    # Staleness is what the weights correct: tokens of an older policy have others than 1.
    off = [abs(row["importance/max"] - 1) for row in read_metrics(context.out)]
    assert all((each > 1e-3) == (age > 0) for each, age in zip(off, ages, strict=True))
    for row in read_metrics(context.out):
        assert row["policy/first_ratio_mean"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("stopped", [1, 3, 4])
def test_a_resume_loses_no_prompt_and_trains_none_twice(
    tmp_path: Path, base: Path, launch: Callable[..., CopyEngine], staleness: int, stopped: int
) -> None:
    alone, context = (context_of(tmp_path / name, base, staleness=staleness) for name in ("alone", "stopped"))
    launch(alone)
    interrupted = replace(context, should_stop=lambda: len(read_metrics(context.out)) == stopped)
    assert isinstance(launch(interrupted).error, Interrupted)
    resumed = again(context)
    launch(resumed)
    assert trained_prompts(resumed) == trained_prompts(alone)
    assert [row["step"] for row in read_metrics(resumed.out)] == list(range(1, UPDATES + 1))
    assert column(resumed, "rollout/staleness")[stopped] == 0  # nothing was under way
    if staleness == 0:
        assert figures(resumed) == figures(alone)


def failing(place: int) -> Callable[[int, list[list[Completion]]], list[list[Completion]]]:
    def tamper(answer: int, groups: list[list[Completion]]) -> list[list[Completion]]:
        if answer == place:
            raise EngineError("copy engine: died")
        return groups

    return tamper


# Staleness 0 asks for: the evaluation at the start, rollouts 1 and 2, evaluation, rollouts 3 and 4, evaluation, …
@pytest.mark.parametrize(("place", "saved"), [(2, 1), (3, 2), (4, 2), (5, 3), (9, 6)])
def test_after_an_engines_failure_the_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, base: Path, launch: Callable[..., CopyEngine], place: int, saved: int
) -> None:
    alone, context = context_of(tmp_path / "alone", base), context_of(tmp_path / "failed", base)
    launch(alone)
    error = launch(context, tamper=failing(place)).error
    assert str(error) == f"copy engine: died; saved after update {saved}, the same command resumes"
    checkpoint = latest_checkpoint(context.out / "checkpoints", context.key)
    assert checkpoint is not None
    assert checkpoint.step == saved
    resumed = again(context)
    launch(resumed)
    assert figures(resumed) == figures(alone)
    assert trained_prompts(resumed) == trained_prompts(alone)
    weights = [(each.out / "weights" / "adapter_model.safetensors").read_bytes() for each in (resumed, alone)]
    assert weights[0] == weights[1]
    samples = [(each.out / "samples.jsonl").read_text().splitlines() for each in (resumed, alone)]
    assert [json.loads(line) for line in samples[0]] == [json.loads(line) for line in samples[1]]


@pytest.mark.parametrize("staleness", [1, 2])
@pytest.mark.parametrize("place", [3, 5, 7])
def test_a_failure_beside_the_training_ends_it_with_its_state(
    tmp_path: Path, base: Path, launch: Callable[..., CopyEngine], staleness: int, place: int
) -> None:
    context = context_of(tmp_path / "failed", base, staleness=staleness)
    error = launch(context, tamper=failing(place)).error
    assert "copy engine: died; saved after update" in str(error)
    resumed = again(context)
    launch(resumed)
    assert [row["step"] for row in read_metrics(resumed.out)] == list(range(1, UPDATES + 1))
    alone = context_of(tmp_path / "alone", base, staleness=staleness)
    launch(alone)
    assert trained_prompts(resumed) == trained_prompts(alone)


def test_a_failure_before_the_first_update_has_nothing_to_save(
    tmp_path: Path, base: Path, launch: Callable[..., CopyEngine]
) -> None:
    context = context_of(tmp_path, base)
    assert str(launch(context, tamper=failing(1)).error) == "copy engine: died"
    assert not (context.out / "checkpoints").exists()


def stale(answer: int, groups: list[list[Completion]]) -> list[list[Completion]]:
    """From the third answer on, one completion comes from the version before."""
    if answer < 2:
        return groups
    (first, *rest), *others = groups
    return [[replace(first, version=first.version - 1), *rest], *others]


def short(answer: int, groups: list[list[Completion]]) -> list[list[Completion]]:
    return groups if answer < 2 else groups[:-1]


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize(("tamper", "words"), [(stale, "asked for policy version"), (short, "answered 3 of 4")])
def test_a_mixed_or_short_answer_never_trains(
    tmp_path: Path, base: Path, launch: Callable[..., CopyEngine], staleness: int, tamper: Any, words: str
) -> None:
    context = context_of(tmp_path, base, staleness=staleness)
    error = launch(context, tamper=tamper).error
    assert words in str(error)
    assert len(read_metrics(context.out)) < UPDATES


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_sampler_that_is_not_the_trainer_stops_the_run(
    tmp_path: Path, base: Path, launch: Callable[..., CopyEngine], staleness: int
) -> None:
    context = context_of(tmp_path / "near", base, staleness=staleness, max_sampler_kl=1e-9)
    engine = launch(context, drift=0.1)
    assert "max_sampler_kl=1e-09" in str(engine.error)
    assert not read_metrics(context.out)
    far = context_of(tmp_path / "far", base, staleness=staleness, max_sampler_kl=10)
    launch(far, drift=0.1)
    assert min(column(far, "kl/sampler_trainer")) > 1e-4
