"""The `dpo:` section: its mistakes, what a chain with it compares, its plan, and its place in a starter config."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.errors import UserError
from launch.starter import starter_text
from pipeline.config import RunConfig, dump_config, validate
from pipeline.inputs import Run, stage_inputs
from pipeline.plan import make_plan
from tests.supervised import preferences, write_rows
from tests.tiny import tiny_model_folder

DATA = [{"path": "pairs.jsonl"}]
PROMPTS = [{"path": "prompts.jsonl"}]
SECTIONS: dict[str, Any] = {"sft": {"data": DATA}, "rm": {"data": DATA}, "ppo": {"prompts": PROMPTS}}


def config(**sections: Any) -> RunConfig:
    return validate({"base_model": "owner/model", **sections}, [])


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"data": []}, "dpo.data=[]: "),
        ({"data": DATA, "beta": 0}, "dpo.beta=0: "),
        ({"data": DATA, "beta": -0.1}, "dpo.beta=-0.1: "),
        ({"data": DATA, "betta": 0.1}, "dpo.betta=0.1: unknown key; did you mean dpo.beta?"),
        ({"data": DATA, "loss": "simpo"}, "dpo.loss=simpo: "),
        ({"data": DATA, "label_smoothing": 0.5}, "dpo.label_smoothing=0.5: "),
        ({"data": DATA, "loss": "robust"}, "dpo.label_smoothing=0 makes loss robust the same as sigmoid"),
        ({"data": DATA, "batch_size": 12}, "dpo.microbatch_size=8 does not divide batch_size=12"),
    ],
)
def test_a_mistake_is_one_line(section: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        config(dpo=section)
    (problem,) = caught.value.problems
    assert problem.startswith(line)


@pytest.mark.parametrize(
    ("names", "policies", "scores"),
    [
        (("sft", "dpo"), ["sft", "dpo"], []),
        (("sft", "rm", "dpo"), ["sft", "dpo"], ["score"]),
        (("sft", "rm", "dpo", "ppo"), ["sft", "dpo", "ppo"], ["score"]),
        (("sft", "rm", "ppo"), ["sft", "ppo"], ["score"]),
    ],
)
def test_eval_compares_what_is_there(
    tmp_path: Path, names: tuple[str, ...], policies: list[str], scores: list[str]
) -> None:
    sections = {name: SECTIONS.get(name, {"data": DATA}) for name in names}
    whole = config(**sections, eval={"prompts": PROMPTS})
    assert whole.eval is not None
    assert whole.eval.policies == {name: f"stage:{name}" for name in policies}
    assert list(whole.eval.scores) == scores
    assert Run(whole, None, tmp_path).stages == [*names, "eval"]
    assert validate(yaml.safe_load(dump_config(whole)), []) == whole


def test_what_eval_names_itself_stays() -> None:
    own = {"prompts": PROMPTS, "policies": {"a": "stage:dpo"}, "scores": {"gold": {"function": "m.py:f"}}}
    whole = config(dpo={"data": DATA}, eval=own)
    assert whole.eval is not None
    assert whole.eval.policies == {"a": "stage:dpo"}
    assert list(whole.eval.scores) == ["gold"]


def test_both_ways_start_from_sft_unless_told_otherwise(tmp_path: Path) -> None:
    run = Run(config(**SECTIONS, dpo={"data": DATA}), None, tmp_path)
    assert stage_inputs(run, "dpo") == {"policy": str(tmp_path / "sft")}
    assert stage_inputs(run, "ppo")["policy"] == str(tmp_path / "sft")
    after = {**SECTIONS["ppo"], "policy": "stage:dpo"}
    run = Run(config(sft=SECTIONS["sft"], dpo={"data": DATA}, ppo=after), None, tmp_path)
    assert stage_inputs(run, "ppo")["policy"] == str(tmp_path / "dpo")
    assert stage_inputs(Run(config(dpo={"data": DATA}), None, tmp_path), "dpo") == {"policy": "owner/model"}


def test_the_plan_shows_the_stage(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model")
    rows = write_rows(tmp_path / "pairs.jsonl", preferences(40))

    def plan(**section: Any) -> Any:
        dpo = {"data": [{"path": str(rows)}], "batch_size": 8, "epochs": 2, "holdout": 0.2, **section}
        tree = {"base_model": str(model), "dpo": dpo, "tuning": {"method": "full"}}
        (found,) = make_plan(Run(validate(tree, []), None, tmp_path / "out"), ["dpo"], resume="auto")
        return found

    found = plan()
    assert (found.action, found.problems) == ("build", [])
    assert (found.data.rows["train"], found.data.rows["holdout"]) == (32, 8)
    assert found.batches[1] == "32 rows / 8 = 4.0 steps per epoch; x 2 epochs = 8 optimizer steps"
    shown = "".join(piece.text for piece in found.data.examples[0] if piece.trained)
    assert " yes</s>" in shown
    assert " no</s>" in shown
    assert found.memory["reference: weights"] == found.memory["policy: weights"]  # a copy of the whole model
    assert plan(tuning={"rank": 2}).memory["reference: weights"] == plan(tuning={"rank": 2}).memory["policy: adapters"]
    rows.write_text("".join(f"{json.dumps(row | {'margin': 1})}\n" for row in preferences(40)), encoding="utf-8")
    (problem,) = plan().problems
    assert problem.startswith("dpo.data: 40 of 40 pairs have a margin")


def test_a_starter_config_shows_it_but_does_not_run_it() -> None:
    text = starter_text("my.yaml")
    assert yaml.safe_load(text).keys() == {"name", "base_model", "seed", "max_length", "sft", "rm", "ppo", "eval"}
    part = text[text.index("# dpo:") :]
    section = "\n".join(line.removeprefix("# ") for line in part[: part.index("\n\n")].splitlines())
    tree = yaml.safe_load(text) | yaml.safe_load(section)
    dpo = validate(tree, []).dpo
    assert dpo is not None
    assert dpo.beta == 0.1
    assert "#   # beta: 0.1 " in text
