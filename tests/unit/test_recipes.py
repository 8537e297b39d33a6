"""Every bundled recipe is valid, says truly what to type, and names only keys and files that are there."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from data.sources import SourceConfig
from pipeline.config import RunConfig, load_config, recipes_folder
from pipeline.inputs import STAGES, Run
from pipeline.plan_memory import memory_estimate
from stages.core.known_models import known_config

RECIPES = sorted(recipes_folder().glob("*.yaml"))
NAMES = [recipe.stem for recipe in RECIPES]
ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"


def sources(value: object) -> list[SourceConfig]:
    """All data sources in a config."""
    if isinstance(value, SourceConfig):
        return [value]
    if isinstance(value, BaseModel):
        value = [getattr(value, name) for name in type(value).model_fields]
    if isinstance(value, dict):
        value = list(value.values())
    return [source for inner in value for source in sources(inner)] if isinstance(value, list) else []


def is_key(config: BaseModel, dotted: str) -> bool:
    value: object = config
    for part in dotted.split("."):
        if not isinstance(value, BaseModel) or part not in type(value).model_fields:
            return False
        value = getattr(value, part)
    return True


def test_the_recipes_that_the_readme_promises_are_there() -> None:
    assert {"quickstart", "stories", "hh-harmless", "oasst", "alpaca", "gsm8k", "zh"} <= set(NAMES)
    assert {"qwen-0.5b-1gpu", "llama-8b-8gpu"} <= set(NAMES)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`{name}`" not in readme and f" {name}" not in readme] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_and_found_by_name(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # by name, so from anywhere
    loaded = load_config(name)
    assert Run(loaded.config, loaded.folder, tmp_path).stages
    assert loaded.config.name != "run"  # the default: two recipes would share a run folder


def test_recipes_have_run_folders_of_their_own() -> None:
    names = [load_config(str(recipe)).config.name for recipe in RECIPES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", NAMES)
def test_its_comments_say_commands_that_work(name: str) -> None:
    """`launch <command> <recipe>` in a comment: the command exists, the recipe is this one and has that stage."""
    text = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    run = Run(load_config(name).config, None, Path())
    commands = re.findall(r"launch (\w+) +([\w.-]+)", " ".join(re.findall(r"#(.*)", text)))
    assert commands, "its head says how to start it"
    for command, recipe in commands:
        assert recipe == name
        assert command in ("plan", "run") or command in run.stages


@pytest.mark.parametrize("name", NAMES)
def test_its_comments_name_keys_that_exist(name: str) -> None:
    """`ppo.kl.target` in backticks is a key of the schema; metrics have a slash."""
    text = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    config = load_config(name).config
    for dotted in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", text):
        if dotted.split(".")[0] in RunConfig.model_fields:
            assert is_key(config, dotted), dotted
    for option in re.findall(r"`([a-z_]+): [^`]+`", text):
        fields = {*RunConfig.model_fields, *SourceConfig.model_fields}
        assert option in fields, option


@pytest.mark.parametrize("name", [name for name in NAMES if "gpu" in name])
def test_recipes_for_large_models_are_estimated_from_the_config_alone(name: str, tmp_path: Path) -> None:
    config = load_config(name).config
    shape = known_config(config.base_model)
    assert shape is not None
    run = Run(config, None, tmp_path)
    for stage in run.stages:
        memory = memory_estimate(run, stage, 0)
        assert isinstance(memory, dict), memory
        # bfloat16: two bytes a parameter at least, 0.49 and 8.03 billion of them.
        weights = next(size for part, size in memory.items() if part.endswith("weights"))
        assert weights == pytest.approx({24: 0.988e9, 32: 16.06e9}[shape["num_hidden_layers"]], rel=0.01)


@pytest.mark.real_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is missing")
@pytest.mark.parametrize("name", NAMES)
def test_files_that_a_recipe_names_are_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # `../shared` is beside the project
    config = load_config(name).config
    assert set(STAGES) >= set(Run(config, None, Path()).stages)
    for path in [config.base_model, *(source.path for source in sources(config))]:
        assert "shared" not in path or Path(path).exists(), path
