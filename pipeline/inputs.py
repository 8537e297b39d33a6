"""What a stage reads, by role, and the facts that its result depends on: together they make its content key."""

import functools
import importlib.metadata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

import data
import stages
from data.artifacts import MANIFEST, read_artifact, sha256_file, sha256_json
from data.errors import UserError
from data.paths import in_run
from data.sources import SourceConfig, content_digest
from pipeline.config import RunConfig
from stages.core.judge.config import Endpoint
from stages.core.reward_config import RewardConfig
from stages.core.rollout.config import EngineConfig
from stages.label.config import LabelConfig
from stages.label.people.config import PeopleConfig

STAGES = ("toy", "sft", "label", "rm", "dpo", "ppo", "eval")
TRAINING = ("sft", "rm", "dpo", "ppo")
# Shared settings that change a result. The others (name, trackers, keep_checkpoints, checkpoint_every, max_refused,
# threads) say how a run is kept, watched or stopped; threads only reorder float sums.
_SHARED_FACTS = ("seed", "dtype", "max_length", "overlong", "packing")
# How a rollout server is reached, and when a run stops for it: neither changes what is learned.
_ENGINE_FIELDS = (
    *("servers", "server_count", "token_env", "timeout_s", "vllm_python"),
    *("gpu_memory_share", "devices", "sleep", "max_sampler_kl"),
)
# Fields that name another stage's result or a model: they enter the key as inputs, by content and not by path.
_INPUT_FIELDS = ("policy", "policies")


@dataclass(frozen=True)
class Run:
    """One config in one run folder."""

    config: RunConfig
    config_folder: Path | None
    folder: Path

    @property
    def stages(self) -> list[str]:
        """The stages that the config has a section for, in order."""
        return [stage for stage in STAGES if getattr(self.config, stage) is not None]

    def stage_folder(self, stage: str) -> Path:
        """Where a stage's artifact is."""
        return self.folder / stage


def stage_inputs(run: Run, stage: str) -> dict[str, str]:
    """Role -> stage folder, model folder, hub id or `file.py:function`.

    sft: `base`; label: `policy.0`, … (or `base`, where only endpoints answer), `score` and `judge.0`, … where they are
    models; rm and dpo: `policy`; ppo: `policy` and `reward.0`, `reward.1`, … in the config's order; eval:
    `policy.NAME` and `score.NAME`.
    """
    config = run.config
    base = in_run(config.base_model, run.folder)
    if stage == "sft" and config.sft is not None:
        return {"base": in_run(config.sft.policy or base, run.folder)}
    if stage == "label" and config.label is not None:
        return _label_inputs(run, config.label, base)
    if stage == "rm" and config.rm is not None:
        return {"policy": _policy(run, config.rm.policy, base)}
    if stage == "dpo" and config.dpo is not None:
        return {"policy": _policy(run, config.dpo.policy, base)}
    if stage == "ppo" and config.ppo is not None:
        rewards = {
            f"reward.{place}": _score_source(run, reward)
            for place, reward in enumerate(config.ppo.rewards)
            if reward.judge is None
        }
        return {"policy": _policy(run, config.ppo.policy, base), **rewards}
    if stage == "eval" and config.eval is not None:
        policies = {f"policy.{name}": in_run(path, run.folder) for name, path in config.eval.policies.items()}
        scores = {
            f"score.{name}": _score_source(run, score)
            for name, score in config.eval.scores.items()
            if score.judge is None
        }
        return {**policies, **scores}
    return {}


def _label_inputs(run: Run, label: LabelConfig, base: str) -> dict[str, str]:
    found: dict[str, str] = {}
    if label.prompts:
        own = [] if label.endpoints else [_policy(run, None, base)]
        answering = [in_run(policy, run.folder) for policy in label.policies] or own
        found = {f"policy.{place}": policy for place, policy in enumerate(answering)} or {"base": base}
    if label.candidates.score is not None:
        found["score"] = _score_source(run, label.candidates.score)
    local = [judge.local for judge in label.judges]
    return found | {f"judge.{place}": in_run(name, run.folder) for place, name in enumerate(local) if name is not None}


def _policy(run: Run, named: str | None, base: str) -> str:
    """The policy a stage starts from: the one named, else the sft stage's, else the base model."""
    if named is not None:
        return in_run(named, run.folder)
    sft = run.stage_folder("sft")
    return str(sft) if run.config.sft is not None or (sft / MANIFEST).is_file() else base


def _score_source(run: Run, reward: RewardConfig) -> str:
    if reward.function is not None:
        return in_run(reward.function, run.folder)
    assert reward.model is not None
    return str(run.stage_folder("rm")) if reward.model == "rm" else in_run(reward.model, run.folder)


def parent_folders(inputs: Mapping[str, str]) -> dict[str, Path]:
    """The inputs that are finished artifacts, by role, verified.

    Raises UserError where one is damaged or not of the kind that its role takes.
    """
    found: dict[str, Path] = {}
    for role, value in inputs.items():
        if (Path(value) / MANIFEST).is_file():
            read_artifact(Path(value), kind=kind_of(role))
            found[role] = Path(value)
    return found


def kind_of(role: str) -> str:
    """The kind of artifact that a role takes."""
    return "reward_model" if role.startswith(("reward", "score")) else "policy"


def missing_inputs(run: Run, inputs: Mapping[str, str], *, building: Collection[str] = ()) -> list[str]:
    """One line for each input that is a path to nothing, or a stage of this run neither finished nor in `building`."""
    lines: list[str] = []
    for role, value in inputs.items():
        folder = Path(value)
        if _is_stage(run, folder):
            if folder.name not in building and not (folder / MANIFEST).is_file():
                lines.append(f"{role}={folder}: {why_unfinished(run, folder.name)}")
        elif is_path(value) and not Path(_without_function(value)).exists():
            lines.append(f"{role}={value}: no such file or folder; paths are looked up beside the config, then here")
    return lines


def why_unfinished(run: Run, stage: str) -> str:
    """What to do about a stage that something needs and that was not built."""
    if getattr(run.config, stage) is None:
        return f"the config has no section {stage}, and no earlier launch built it; add the section, or point elsewhere"
    return f"this stage is not finished; run `launch {'run' if stage == 'toy' else stage} CONFIG` first"


def _is_stage(run: Run, folder: Path) -> bool:
    return folder.parent == run.folder and folder.name in STAGES


def _without_function(source: str) -> str:
    return source.rpartition(":")[0] if ".py:" in source else source


def is_path(source: str) -> bool:
    """Whether a name can only be a path: hub ids are `name` or `owner/name`."""
    return source.count("/") > 1 or Path(source).is_absolute() or source.startswith((".", "~")) or ".py:" in source


def stage_facts(run: Run, stage: str) -> dict[str, Any]:
    """Name -> value of everything the stage's result depends on; files and models by the sha256 of their content."""
    section = getattr(run.config, stage)
    facts: dict[str, Any] = dict(_facts(section, stage, run.folder))
    facts |= {name: getattr(run.config, name) for name in _SHARED_FACTS}
    if stage != "toy":
        template = run.config.chat_template
        facts["chat_template"] = _digest(template) if template is not None else None
    if stage in TRAINING:
        facts = {name: value for name, value in facts.items() if not name.startswith(f"{stage}.tuning")}
        facts |= dict(_facts(section.tuning or run.config.tuning, f"{stage}.tuning", run.folder))
    facts |= {f"input {role}": _digest(value) for role, value in stage_inputs(run, stage).items()}
    return facts | {"code": code_version()}


def stage_key(facts: Mapping[str, Any]) -> str:
    """The content key: what is built under one key never needs building again."""
    return sha256_json(facts)


def changed_facts(recorded: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """What differs between two builds of a stage, in words."""
    lines: list[str] = []
    for name in sorted(recorded.keys() | facts.keys()):
        old, new = recorded.get(name), facts.get(name)
        if old == new:
            continue
        digest = name == "code" or any(isinstance(value, str) and value.startswith("sha256:") for value in (old, new))
        lines.append(name if digest else f"{name} {old} -> {new}")
    return lines


def _facts(value: object, name: str, run_folder: Path) -> Iterator[tuple[str, Any]]:
    """The leaves of a config section by dotted name; a data source counts by its rows, not by where they are."""
    if isinstance(value, BaseModel):
        left_out = {"path"} if isinstance(value, SourceConfig) else set[str]()
        left_out |= {"model", "function"} if isinstance(value, RewardConfig) else {*_INPUT_FIELDS}
        left_out |= {*_ENGINE_FIELDS} if isinstance(value, EngineConfig) else set[str]()
        left_out |= {*value.operational} if isinstance(value, Endpoint | PeopleConfig) else set[str]()
        if isinstance(value, SourceConfig):
            yield f"{name}.rows", f"sha256:{content_digest(value, run_folder)}"
        for field in type(value).model_fields:
            if field not in left_out:
                yield from _facts(getattr(value, field), f"{name}.{field}", run_folder)
    elif isinstance(value, dict):
        for key, inner in cast(dict[str, object], value).items():
            yield from _facts(inner, f"{name}.{key}", run_folder)
    elif isinstance(value, list):
        for place, inner in enumerate(cast(list[object], value)):
            yield from _facts(inner, f"{name}.{place}", run_folder)
    else:
        yield name, value


def _digest(value: str) -> str:
    """`sha256:…` of a finished artifact, of a model folder's files, or of a Python file; a hub id stands for itself."""
    name, colon, function = value.rpartition(":") if ".py:" in value else (value, "", "")
    path = Path(name)
    if (path / MANIFEST).is_file():
        return f"sha256:{sha256_file(path / MANIFEST)}"
    if path.is_dir():
        files = {str(file.relative_to(path)): _file_digest(file) for file in sorted(path.rglob("*")) if file.is_file()}
        return f"sha256:{sha256_json(files)}"
    return f"sha256:{_file_digest(path)}{colon}{function}" if path.is_file() else value


@functools.cache
def _file_digest(path: Path) -> str:
    """Cached: a large base model is hashed once a run, and no run changes it."""
    return sha256_file(path)


@functools.cache
def code_version() -> str:
    """The package's version and a digest of the sources that compute results."""
    roots = [Path(path) for package in (data, stages) for path in package.__path__]
    files = {
        f"{root.name}/{file.relative_to(root)}": sha256_file(file) for root in roots for file in root.rglob("*.py")
    }
    return f"{package_version('rlhf-pipeline')} sha256:{sha256_json(files)}"


def package_version(name: str) -> str:
    """The installed version of a distribution, or "not installed"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def require_inputs(run: Run, stage: str) -> dict[str, Path]:
    """The verified artifacts that a stage starts from, by role. Raises UserError where one is unfinished or unfit."""
    inputs = stage_inputs(run, stage)
    if missing := missing_inputs(run, inputs):
        raise UserError(*missing)
    return parent_folders(inputs)
