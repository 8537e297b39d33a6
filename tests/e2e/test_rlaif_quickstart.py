"""The bundled RLAIF recipe, by its real command: what the README promises of it, and the way of its artifacts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.labelling import figures_of, rows_of

SMALL = (
    *("toy.pretrain_steps=10", "toy.demonstrations=64", "toy.prompts=40", "toy.eval_prompts=8"),
    *("toy.hidden_size=32", "toy.layers=2", "sft.epochs=1", "sft.microbatch_size=8"),
    *("label.candidates.response_length=16", "label.canaries.patience=100", "label.canaries.min_accuracy=0"),
    *("rm.max_steps=2", "ppo.updates=1", "ppo.rollout_batch_size=8", "ppo.minibatch_size=8", "ppo.epochs=1"),
    *("ppo.response_length=8", "eval.response_length=8"),
)
STAGES = ["toy", "sft", "label", "rm", "ppo", "eval"]


def launch(folder: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "launch", "run", "rlaif_quickstart", "--out", str(folder / "out"), "--json"]
    result = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.slow
def test_the_chain_in_small(tmp_path: Path) -> None:
    answer = launch(tmp_path, *SMALL)
    assert [stage["stage"] for stage in answer["stages"]] == STAGES
    out = tmp_path / "out"
    rows = rows_of(out / "label" / "preferences.jsonl")
    asked = {row["prompt"][0]["content"] for row in rows}
    prompts = {row["prompt"][0]["content"] for row in rows_of(out / "toy" / "prompts.jsonl")}
    assert asked <= prompts
    assert len(asked) > 20
    judged = [row for row in rows if row["source"] == "judge:toy"]
    assert len(judged) > 20
    assert all(len(row["ledger_ids"]) == 2 for row in judged)
    # So small a model also says nothing at all, which loses without being judged.
    assert all(row["source"].startswith("rule:") and not row["ledger_ids"] for row in rows if row not in judged)
    assert {row["p_chosen"] for row in rows} <= {0.5, 1.0}
    parents = json.loads((out / "label" / "artifact.json").read_text(encoding="utf-8"))["parents"]
    assert [Path(parent["path"]).name for parent in parents] == ["sft"]
    facts = json.loads((out / "rm" / "inputs.json").read_text(encoding="utf-8"))
    assert "rm.data.0.rows" in facts
    again = launch(tmp_path, *SMALL)
    assert [stage["action"] for stage in again["stages"]] == ["skipped"] * 6


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_judge_s_labels_lift_the_true_quality(tmp_path: Path) -> None:
    figures = launch(tmp_path)["report"]["figures"]
    assert figures["differences"]["ppo - sft"]["gold"]["low"] > 0.2
    assert figures["reward_models"]["score"]["accuracy"] >= 0.8
    assert 0 < figures["policies"]["ppo"]["kl"]["mean"] <= 4
    labelled = figures_of(tmp_path / "out")
    assert labelled["labels"]["labelled"] > 2500
    assert 0.05 < labelled["judges"]["toy"]["inconsistent"] < 0.2  # a tenth goes by the place
    assert labelled["judges"]["toy"]["first_preferred"] > 0.52
