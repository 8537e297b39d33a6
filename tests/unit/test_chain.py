"""The chain: what is built is skipped, what changed is rebuilt by name, what is broken stops. Stages here are stubs:
functions that write a file; the real ones run in tests/e2e."""

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from data.artifacts import read_artifact, sha256_file
from data.errors import UserError
from pipeline import chain
from pipeline.chain import Launch, Outcome, lock, run_stages
from pipeline.config import validate
from pipeline.inputs import Run
from pipeline.state import Resume
from stages.core.context import Interrupted, StageContext, StageResult

KINDS = {"sft": "policy", "rm": "reward_model", "ppo": "policy", "eval": "evaluation"}


class QuietView:
    """A view nobody looks at."""

    def start(self, total_steps: int, unit: str, done: int) -> None: ...

    def step(self, step: int, values: Mapping[str, float]) -> None: ...

    def say(self, message: str) -> None: ...


class World:
    """A run folder, its data, and stub stages that count how often they ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.said: list[str] = []
        self.ran: list[str] = []
        self.stop_in: str | None = None
        self.begin: Callable[[StageContext[Any]], None] = lambda context: None
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text("{}")
        for name in ("rows", "pairs", "prompts"):
            (folder / f"{name}.jsonl").write_text(f'{{"prompt": "{name}"}}\n')
        self.tree: dict[str, Any] = {
            "base_model": str(folder / "base"),
            "trackers": [],
            "sft": {"data": [{"path": str(folder / "rows.jsonl")}]},
            "rm": {"data": [{"path": str(folder / "pairs.jsonl")}]},
            "ppo": {"prompts": [{"path": str(folder / "prompts.jsonl")}]},
        }

    def stage(self, context: StageContext[Any]) -> StageResult:
        self.begin(context)
        self.ran.append(context.stage)
        context.metrics.log(1, {"loss": 0.5})
        if self.stop_in == context.stage:
            (context.out / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
            raise Interrupted
        (context.out / "weights").mkdir()
        (context.out / "weights" / "model").write_text(f"{context.stage} {context.key}")
        return StageResult(KINDS[context.stage], {"loss": 0.5, "odd": float("nan")})  # pyright: ignore

    def launch(self, *names: str, resume: Resume = "auto") -> list[Outcome]:
        run = Run(validate(self.tree, []), self.folder, self.out)
        launch = Launch(
            run=run,
            resume=resume,
            viewer=lambda stage: contextlib.nullcontext(QuietView()),
            say=self.said.append,
            should_stop=lambda: False,
            before_stage=lambda: None,
        )
        self.ran.clear()
        self.said.clear()
        return run_stages(launch, names or run.stages)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)
    monkeypatch.setattr(chain, "load_stage", lambda stage: world.stage)
    return world


def test_builds_once_and_skips_after(world: World):
    assert [outcome.action for outcome in world.launch()] == ["built", "built", "built"]
    assert world.ran == ["sft", "rm", "ppo"]
    assert [outcome.action for outcome in world.launch()] == ["skipped", "skipped", "skipped"]
    assert world.ran == []
    assert all("already built" in line for line in world.said)


def test_the_manifest_says_what_was_made_from_what(world: World):
    world.launch()
    ppo = read_artifact(world.out / "ppo", kind="policy")
    parents = {Path(parent.path).name: parent.sha256 for parent in ppo.parents}
    assert parents == {name: sha256_file(world.out / name / "artifact.json") for name in ("sft", "rm")}
    assert ppo.metrics == {"loss": 0.5}  # what is not finite has no place in a manifest
    assert ppo.versions["torch"].startswith("2.13")
    assert set(ppo.files) == {"config.yaml", "inputs.json", "metrics.jsonl", "weights/model"}


def test_a_changed_setting_rebuilds_its_stage_and_what_follows(world: World):
    world.launch()
    world.tree["rm"]["learning_rate"] = 0.5
    world.launch()
    assert world.ran == ["rm", "ppo"]
    assert "rm.learning_rate 0.0001 -> 0.5" in world.said[1]
    assert "input reward.0" in " ".join(world.said)
    assert (world.out / "rm.old" / "artifact.json").is_file()


def test_changed_rows_rebuild_and_moved_rows_do_not(world: World):
    world.launch()
    moved = world.folder / "moved.jsonl"
    shutil.copy(world.folder / "rows.jsonl", moved)
    world.tree["sft"]["data"][0]["path"] = str(moved)
    world.launch()
    assert world.ran == []
    moved.write_text('{"prompt": "other"}\n')
    world.launch()
    assert world.ran == ["sft", "rm", "ppo"]
    assert "changed: sft.data.0.rows" in world.said[0]


def test_changed_base_weights_rebuild(world: World):
    world.launch("sft")
    (world.folder / "base" / "config.json").write_text('{"a": 1}')
    chain_cache_clear()
    world.launch("sft")
    assert world.ran == ["sft"]
    assert "input base" in world.said[0]


def chain_cache_clear() -> None:
    """What a new process does: digests of base models are kept within one."""
    from pipeline import inputs

    inputs._file_digest.cache_clear()  # pyright: ignore


@pytest.mark.parametrize(("key", "value"), [("name", "b"), ("threads", 1), ("keep_checkpoints", 5), ("max_refused", 1)])
def test_what_changes_no_result_rebuilds_nothing(world: World, key: str, value: object):
    world.launch()
    world.tree[key] = value
    world.launch()
    assert world.ran == []


@pytest.mark.parametrize(("key", "value"), [("seed", 1), ("dtype", "bfloat16"), ("tuning", {"rank": 8})])
def test_what_changes_results_rebuilds(world: World, key: str, value: object):
    world.launch("sft")
    world.tree[key] = value
    world.launch("sft")
    assert world.ran == ["sft"]


def test_a_stage_with_its_own_tuning_does_not_mind_the_runs(world: World):
    world.tree["sft"]["tuning"] = {"rank": 4}
    world.launch("sft")
    world.tree["tuning"] = {"rank": 8}
    world.launch("sft")
    assert world.ran == []


def test_a_damaged_stage_is_rebuilt(world: World):
    world.launch("sft")
    (world.out / "sft" / "weights" / "model").write_text("damaged")
    world.launch("sft")
    assert world.ran == ["sft"]
    assert "damaged" in world.said[0]


def stop_halfway(world: World) -> None:
    world.stop_in = "sft"
    with pytest.raises(Interrupted):
        world.launch()
    world.stop_in = None


def test_an_unfinished_stage_resumes_in_its_folder(world: World):
    stop_halfway(world)
    assert not (world.out / "sft" / "artifact.json").exists()
    found: list[bool] = []
    world.begin = lambda context: found.append((context.out / "checkpoints" / "1").is_dir())
    actions = rewinding(world)
    assert actions == ["resumed", "built", "built"]
    assert found == [True, False, False]


def rewinding(world: World, resume: Resume = "auto") -> list[str]:
    """Launches with stages that, like the real ones, take their metrics back to their checkpoint first."""
    begin = world.begin

    def rewind_too(context: StageContext[Any]) -> None:
        begin(context)
        context.metrics.rewind(0)

    world.begin = rewind_too
    return [outcome.action for outcome in world.launch(resume=resume)]


def test_never_starts_anew_and_keeps_the_old_folder(world: World):
    stop_halfway(world)
    assert rewinding(world, "never") == ["built", "built", "built"]
    assert (world.out / "sft.old" / "checkpoints" / "1").is_dir()
    assert "--resume never" in world.said[0]


def test_must_resumes_what_is_there(world: World):
    stop_halfway(world)
    assert rewinding(world, "must") == ["resumed", "built", "built"]


def test_must_refuses_where_nothing_is_there(world: World):
    with pytest.raises(UserError, match=r"--resume must: .* cannot be resumed"):
        world.launch(resume="must")
    assert not (world.out / "sft").exists()


def test_a_changed_setting_never_resumes(world: World):
    stop_halfway(world)
    world.tree["sft"]["epochs"] = 7
    assert [outcome.action for outcome in world.launch()] == ["built", "built", "built"]
    assert "sft.epochs 1.0 -> 7.0" in world.said[0]


def test_a_stage_alone_needs_its_input_finished(world: World):
    with pytest.raises(UserError, match=r"policy=.*/sft: this stage is not finished; run `launch sft CONFIG` first"):
        world.launch("rm")
    assert not (world.out / "rm").exists()


def test_a_stage_that_nobody_builds_is_missed_before_the_first_begins(world: World):
    world.tree["rm"] = None
    with pytest.raises(UserError, match=r"reward.0=.*/rm: the config has no section rm") as caught:
        world.launch()
    assert len(caught.value.problems) == 1  # not sft, which this launch would have built
    assert not (world.out / "sft").exists()


def test_rows_that_nobody_writes_are_missed_before_the_first_stage_begins(world: World):
    world.tree["ppo"]["prompts"] = [{"path": "stage:toy/prompts.jsonl"}]
    with pytest.raises(UserError, match=r"^ppo: rows of stage:toy: the config has no section toy"):
        world.launch()
    assert not (world.out / "sft").exists()


def test_a_stage_that_is_built_only_later_is_missed_too(world: World):
    world.tree["rm"]["policy"] = "stage:ppo"
    with pytest.raises(UserError, match=r"policy=.*/ppo: this stage is not finished"):
        world.launch()
    assert not (world.out / "sft").exists()


def test_a_stage_that_an_earlier_launch_built_needs_no_section(world: World):
    world.launch("sft", "rm")
    world.tree["rm"] = None
    assert [outcome.action for outcome in world.launch("ppo")] == ["built"]


def test_a_wrong_kind_of_artifact_is_refused(world: World):
    world.launch("sft")
    world.tree["ppo"]["reward"] = {"model": str(world.out / "sft")}
    with pytest.raises(UserError, match=r"a policy .* where a reward_model is needed"):
        world.launch("ppo")


def test_an_earlier_sft_is_used_without_a_section_for_it(world: World):
    world.launch("sft")
    del world.tree["sft"]
    world.launch("rm")
    assert [Path(parent.path).name for parent in read_artifact(world.out / "rm").parents] == ["sft"]


def test_two_launches_cannot_write_one_run(world: World):
    with lock(world.out), pytest.raises(UserError, match="another launch is writing this run"):
        world.launch()
    assert world.launch("sft")[0].action == "built"  # the lock file stays, the lock does not


def test_the_resolved_config_stands_beside_the_result(world: World):
    from pipeline.yaml_text import parse_yaml

    world.launch("sft")
    text = (world.out / "sft" / "config.yaml").read_text()
    assert validate(parse_yaml(text), []) == validate(world.tree, [])
    assert json.loads((world.out / "sft" / "inputs.json").read_text())["seed"] == 0
