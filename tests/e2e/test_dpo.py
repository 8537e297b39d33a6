"""`launch` with a dpo section, by the real command, on a small piece of the quickstart's world."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config

SMALL = (
    "toy={pretrain_steps: 20, demonstrations: 60, preferences: 80, prompts: 20, eval_prompts: 8}",
    "sft.max_steps=2",
    "dpo={data: [{path: 'stage:toy/preferences.jsonl'}], batch_size: 16, max_steps: 3, learning_rate: 1e-3}",
    "eval.scores={gold: {function: 'data.toy:gold'}}",
    "eval.pairs=[]",
    "rm=null",
    "ppo=null",
)


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *arguments, "--out", str(folder / "out"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def answer(folder: Path, *arguments: str) -> dict[str, Any]:
    result = launch(folder, *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.slow
def test_a_chain_with_dpo_in_place_of_rm_and_ppo(tmp_path: Path) -> None:
    planned = answer(tmp_path, "plan", "quickstart", *SMALL)
    assert [stage["stage"] for stage in planned["stages"]] == ["toy", "sft", "dpo", "eval"]
    assert planned["stages"][2]["why"] == "after sft, toy"
    done = answer(tmp_path, "run", "quickstart", *SMALL)
    assert [(stage["stage"], stage["action"]) for stage in done["stages"]] == [
        (name, "built") for name in ("toy", "sft", "dpo", "eval")
    ]
    assert list(done["report"]["figures"]["policies"]) == ["sft", "dpo"]
    assert list(done["report"]["figures"]["differences"]) == ["dpo - sft"]
    folder = tmp_path / "out" / "dpo"
    manifest = json.loads((folder / "artifact.json").read_text())
    assert (manifest["kind"], [Path(each["path"]).name for each in manifest["parents"]]) == ("policy", ["sft"])
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert load_config(str(folder / "config.yaml")).config.dpo is not None
    refused = launch(tmp_path, "dpo", "quickstart", *SMALL, "dpo.data.0.columns={chosen: better}")
    assert refused.returncode == 2, refused.stderr
    assert "Traceback" not in refused.stderr
    assert "no column 'better'" in refused.stderr
