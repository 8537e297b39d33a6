"""sft and rm on a real, small model and real rows: the loss falls, and the artifacts chain."""

from pathlib import Path

import pytest

from tests.supervised import metrics_lines, preferences, run_stage, stage_context, write_rows

MODEL = Path(__file__).parents[2].parent / "shared" / "models" / "stories260K-llama"
STORIES = [
    {"prompt": "Once upon a time", "response": f" there was a {animal} who liked to {act}. The {animal} was happy."}
    for animal in ("cat", "dog", "bird", "fish", "bear")
    for act in ("play", "run", "sing", "swim", "eat", "sleep")
]


@pytest.mark.real_data
@pytest.mark.skipif(not MODEL.is_dir(), reason="../shared is missing")
def test_a_pretrained_model_learns_rows_and_then_pairs(tmp_path: Path) -> None:
    shared = {"tuning": {"method": "lora", "rank": 8, "alpha": 16}}
    section = {"batch_size": 8, "holdout": 0.2, "epochs": 4, "learning_rate": 5e-3}
    rows = write_rows(
        tmp_path / "rows.jsonl", [{**row, "prompt": f"{row['prompt']}, {number}"} for number, row in enumerate(STORIES)]
    )
    sft = stage_context(tmp_path, stage="sft", source=MODEL, data=rows, shared=shared, section=section)
    run_stage(sft)
    losses = [line["eval/loss"] for line in metrics_lines(sft) if "eval/loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    pairs = write_rows(tmp_path / "pairs.jsonl", preferences(60))
    rm = stage_context(tmp_path, stage="rm", source=sft.out, data=pairs, shared=shared, section=section)
    result = run_stage(rm)
    assert result.metrics["eval/accuracy"] >= 0.9
