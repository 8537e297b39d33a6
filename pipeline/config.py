"""The schema of one whole run: a YAML file and key=value overrides become frozen models, or one line per mistake."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

import pipeline
from data.errors import UserError
from pipeline.config_errors import one_line, problem_lines, show
from pipeline.overrides import apply_overrides
from pipeline.yaml_text import dump_yaml, parse_yaml, yaml_problem
from stages.core.config import SharedConfig
from stages.core.supervised_config import SupervisedSection
from stages.dpo.config import DpoConfig
from stages.eval.config import EvalConfig
from stages.label.config import LabelConfig
from stages.ppo.config import PpoConfig
from stages.rm.config import RmConfig
from stages.sft.config import SftConfig
from stages.toy.config import ToyConfig


class RunConfig(SharedConfig):
    """One run: what the stages share, and a section for each stage that it has."""

    toy: ToyConfig | None = Field(None, description="the built-in model and rows, for a first run")
    sft: SftConfig | None = Field(None, description="supervised fine-tuning")
    label: LabelConfig | None = Field(None, description="preferences from answers, by a judge or by people")
    rm: RmConfig | None = Field(None, description="the reward model")
    dpo: DpoConfig | None = Field(None, description="a policy straight from preference pairs; in place of rm and ppo")
    ppo: PpoConfig | None = Field(None, description="policy optimisation")
    eval: EvalConfig | None = Field(None, description="the closing comparison")

    def supervised(self, stage: str) -> SupervisedSection | None:
        """The section of a stage that trains on labelled rows; None for the other stages."""
        return {"sft": self.sft, "rm": self.rm, "dpo": self.dpo}.get(stage)

    @model_validator(mode="before")
    @classmethod
    def _compare_what_is_there(cls, raw: Any) -> Any:
        """With `dpo:`, eval compares sft with those of dpo and ppo that the config has; without rm, it has no score."""
        if not isinstance(raw, dict):
            return raw
        tree = cast(dict[str, Any], raw)
        if tree.get("dpo") is None or not isinstance(tree.get("eval"), dict):
            return tree
        compared = ["sft", *(stage for stage in ("dpo", "ppo") if tree.get(stage) is not None)]
        defaults: dict[str, Any] = {"policies": {stage: f"stage:{stage}" for stage in compared}}
        if tree.get("rm") is None:
            defaults["scores"] = {}
        return {**tree, "eval": {**defaults, **tree["eval"]}}


@dataclass(frozen=True)
class LoadedConfig:
    """A config, and the folder against which its paths were resolved."""

    config: RunConfig
    folder: Path


def recipes_folder() -> Path:
    """Where the bundled recipes are, installed or in a checkout; never relative to the working directory."""
    return Path(pipeline.__file__).resolve().parent.parent / "configs"


def find_config(name_or_path: str) -> Path:
    """The file of a config given as a path or as a bundled recipe's name. Raises UserError."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path.resolve()
    names = {recipe.stem: recipe for recipe in sorted(recipes_folder().glob("*.yaml"))}
    recipe = names.get(name_or_path.removesuffix(".yaml"))
    if recipe is None:
        what = "is a folder" if path.is_dir() else "no such file, and no bundled recipe has this name"
        raise UserError(f"CONFIG={name_or_path}: {what}; give a YAML file or one of: {', '.join(names)}")
    return recipe


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> LoadedConfig:
    """The validated config: defaults, then the file, then the overrides.

    Relative paths become absolute, looked up beside the file and then in the working directory. Raises UserError with
    every problem found, one line each.
    """
    path = find_config(name_or_path)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = yaml_problem(error) if isinstance(error, yaml.YAMLError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read as YAML: {why}; mend the file") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {show(tree)}, not a mapping; start from `launch init my.yaml`")
    raw = cast(dict[str, Any], tree)
    problems = apply_overrides(raw, overrides)
    try:
        config = validate(raw, [path.parent, Path.cwd()])
    except UserError as error:
        raise UserError(*problems, *error.problems) from error
    if problems:
        raise UserError(*problems)
    return LoadedConfig(config, path.parent)


def validate(raw: dict[str, Any], folders: Sequence[Path]) -> RunConfig:
    """The config that a YAML tree describes. Raises UserError with one line per problem."""
    problems = [one_line(f"{key}={value}: is not finite; use a number") for key, value in _not_finite(raw)]
    try:
        config = RunConfig.model_validate(raw, context={"folders": folders})
    except ValidationError as error:
        raise UserError(*problems, *problem_lines(error, raw, RunConfig)) from error
    if problems:
        raise UserError(*problems)
    return config


def dump_config(config: RunConfig) -> str:
    """The fully resolved config as YAML: reading it gives an equal config, wherever it is read."""
    return dump_yaml(_tree(config))


def _tree(value: object) -> Any:
    """A config as plain data. A null stands only where it is not the default: null may be what the user chose."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {name: _tree(inner) for name, inner in value if inner is not None or fields[name].default is not None}
    if isinstance(value, dict):
        return {name: _tree(inner) for name, inner in cast(dict[str, object], value).items()}
    if isinstance(value, list):
        return [_tree(inner) for inner in cast(list[object], value)]
    return value


def _not_finite(value: object, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, inner in cast(dict[object, object], value).items():
            yield from _not_finite(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for place, inner in enumerate(cast(list[object], value)):
            yield from _not_finite(inner, f"{key}.{place}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield key, value
