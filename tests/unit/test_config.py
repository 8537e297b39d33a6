"""Config: the contract's keys are taken, every mistake is one line, and a dump reads back the same."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.errors import UserError
from pipeline.config import RunConfig, dump_config, find_config, load_config, recipes_folder, validate
from pipeline.yaml_text import dump_yaml, parse_yaml

CONTRACT = """
name: stories
base_model: path/or/hub-id
seed: 0
dtype: float32
max_length: 512
max_refused: 0.01
tuning: {method: lora, rank: 16, alpha: 32}
distributed: {strategy: none}
trackers: [tensorboard]
keep_checkpoints: 2
checkpoint_every: 50
sft:
  data: [{path: rows.jsonl, columns: {prompt: instruction, response: output}, weight: 1.0}]
  holdout: 0.05
  epochs: 1
  batch_size: 32
  learning_rate: 2.0e-4
rm:
  data: [{path: pairs.jsonl.gz}]
  holdout: 0.1
  epochs: 1
  batch_size: 32
  learning_rate: 1.0e-4
ppo:
  prompts: [{path: prompts.jsonl}]
  reward: {model: rm}
  updates: 100
  rollout_batch_size: 64
  samples_per_prompt: 1
  response_length: 64
  rollout: {engine: auto, temperature: 1.0}
  critic: adapter
  epochs: 4
  minibatch_size: 16
  learning_rate: 1.0e-4
  kl: {coef: 0.05, estimator: k1, target: null}
  advantage: gae
"""


@pytest.fixture
def contract(tmp_path: Path) -> Path:
    path = tmp_path / "contract.yaml"
    path.write_text(CONTRACT)
    return path


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        load_config(str(path), overrides)
    return list(error.value.problems)


def test_takes_every_key_of_the_contract(contract: Path):
    config = load_config(str(contract)).config
    assert config.name == "stories"
    assert config.sft is not None
    assert config.sft.learning_rate == 2e-4
    assert config.ppo is not None
    assert config.ppo.kl.coef == 0.05


def test_override_beats_file_beats_default(contract: Path):
    config = load_config(str(contract), ["ppo.kl.coef=0.02", "sft.data.0.path=other.jsonl", "rm.holdout=0.2"]).config
    assert config.ppo is not None
    assert config.sft is not None
    assert config.rm is not None
    assert (config.ppo.kl.coef, config.sft.data[0].path, config.rm.holdout) == (0.02, "other.jsonl", 0.2)
    assert config.sft.batch_size == 32  # the file's
    assert config.overlong == "drop"  # the default's


def test_scientific_notation_without_a_dot_is_a_number(contract: Path):
    config = load_config(str(contract), ["sft.learning_rate=1e-4", "rm.learning_rate=5E-5"]).config
    assert config.sft is not None
    assert config.rm is not None
    assert (config.sft.learning_rate, config.rm.learning_rate) == (1e-4, 5e-5)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("ppo.kl_coef=0.02", "ppo.kl_coef=0.02: unknown key; did you mean ppo.kl.coef?"),
        ("sft.lerning_rate=1", "sft.lerning_rate=1: unknown key; did you mean sft.learning_rate?"),
        ("sft.lr=1", "sft.lr=1: unknown key; did you mean sft.learning_rate?"),
        ("sft.holdout=1.5", "sft.holdout=1.5: is out of range; use a number below 1.0"),
        ("sft.holdout={pth: x}", "sft.holdout.pth=x: unknown key; did you mean sft.holdout.path?"),
        ("sft.holdout=abc", "sft.holdout=abc: is not a number or a mapping; write a number or a mapping"),
        ("seed=x", "seed=x: is not a whole number; write a whole number"),
        ("dtype=int8", "dtype=int8: is none of the choices; use float32 or bfloat16"),
        (
            "distributed.offload=optimizer",
            "distributed.offload=optimizer: no effect with strategy=none; use strategy=zero1, zero2 or zero3",
        ),
        ("max_length=.inf", "max_length=inf: is not finite; use a number"),
        ("sft.data.3.path=x", "sft.data.3.path=x: sft.data is a list of 1, without an item '3'; count from 0"),
        ("nonsense", "nonsense: is no override; write key=value, as in ppo.kl.coef=0.02"),
        ("seed.x=1", "seed.x=1: seed is 0, which has no key 'x'; set the whole value"),
        ("ppo.reward={weight: 2}", 'ppo.reward={"weight": 2}: name exactly one of model, function and judge'),
        (
            "ppo.minibatch_size=7",
            "ppo.minibatch_size=7 does not divide rollout_batch_size=64; use a divisor of it",
        ),
    ],
)
def test_each_mistake_is_one_line(contract: Path, override: str, line: str):
    problems = problems_of(contract, override)
    assert line in problems
    assert all("\n" not in problem for problem in problems)


def test_all_mistakes_are_told_together(contract: Path):
    problems = problems_of(contract, "sft.lr=1", "seed=x", "nonsense", "ppo.epochs=0", "rm.data=[]")
    assert len(problems) == 5
    assert "rm.data=[]: is too short; give at least 1" in problems


def test_an_unlike_key_still_names_the_nearest(contract: Path):
    (problem,) = problems_of(contract, "sft.zzz=1")
    assert "the nearest is sft." in problem
    assert "learning_rate" in problem


def test_duplicate_keys_are_refused(tmp_path: Path):
    path = tmp_path / "twice.yaml"
    path.write_text("base_model: a\nseed: 1\nseed: 2\n")
    assert problems_of(path) == [f"{path}: cannot be read as YAML: line 3: key 'seed' stands twice; mend the file"]


@pytest.mark.parametrize("text", ["- 1\n", "", "a: [\n", "!!python/object/apply:os.system ['true']\n"])
def test_what_is_no_mapping_is_one_line(tmp_path: Path, text: str):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    (problem,) = problems_of(path)
    assert problem.startswith(str(path))


def test_a_missing_config_names_the_bundled_recipes():
    with pytest.raises(UserError, match="no such file, and no bundled recipe"):
        find_config("no-such-recipe")


def test_relative_paths_are_looked_up_beside_the_file_first(contract: Path, monkeypatch: pytest.MonkeyPatch):
    elsewhere = contract.parent / "elsewhere"
    elsewhere.mkdir()
    (contract.parent / "rows.jsonl").write_text("{}")
    (elsewhere / "rows.jsonl").write_text("{}")
    (elsewhere / "prompts.jsonl").write_text("{}")
    monkeypatch.chdir(elsewhere)
    config = load_config(str(contract)).config
    assert config.sft is not None
    assert config.ppo is not None
    assert config.sft.data[0].path == str(contract.parent / "rows.jsonl")
    assert config.ppo.prompts[0].path == str(elsewhere / "prompts.jsonl")
    assert config.base_model == "path/or/hub-id"  # nothing there: a hub id


@pytest.mark.parametrize("recipe", sorted(recipes_folder().glob("*.yaml")), ids=lambda path: path.name)
def test_bundled_recipes_are_valid(recipe: Path):
    config = load_config(recipe.stem).config
    assert validate(parse_yaml(dump_config(config)), []) == config


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_yaml_dump_reads_back(value: Any):
    assert parse_yaml(dump_yaml(value)) == value


@pytest.mark.parametrize(
    "text", ["1e-4", "1E5", ".5", "1.", "yes", "null", "0x1f", "2024-01-01", "~", "1_000", "=", "<<"]
)
def test_strings_that_look_like_other_things_stay_strings(text: str):
    assert parse_yaml(dump_yaml({"a": text})) == {"a": text}


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
positive = st.floats(min_value=1e-9, max_value=1e6)
sources = st.lists(st.fixed_dictionaries({"path": st.text(min_size=1, max_size=20), "weight": positive}), min_size=1)


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {"base_model": st.text(min_size=1), "name": names, "seed": st.integers()},
        optional={
            "threads": st.none() | st.integers(1, 64),
            "tuning": st.fixed_dictionaries({"method": st.sampled_from(["lora", "full"]), "alpha": positive}),
            "sft": st.fixed_dictionaries({"data": sources, "learning_rate": positive, "holdout": st.floats(0, 0.99)}),
            "ppo": st.fixed_dictionaries({"prompts": sources, "score": st.fixed_dictionaries({"clip": positive})}),
        },
    )
)
def test_a_dumped_config_reads_back_equal(tree: dict[str, Any]):
    config = validate(tree, [])
    again = validate(yaml.safe_load(yaml.safe_dump(parse_yaml(dump_config(config)))), [])
    assert validate(parse_yaml(dump_config(config)), []) == config == again


@settings(max_examples=300, deadline=None)
@example({"toy": {"\n": None}})
@given(st.dictionaries(st.sampled_from([*RunConfig.model_fields, "lr", "x y", ""]), TREES, max_size=5))
def test_any_tree_is_a_config_or_one_line_per_mistake(tree: dict[str, Any]):
    problems: list[str] = ["none"]
    try:
        validate(tree, [])
    except UserError as error:
        problems = list(error.problems)
    assert problems
    assert all(problem and "\n" not in problem for problem in problems)
