"""What `rm` leaves behind: a reward model that loads and scores as it did in training, and its diagnostics."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from data.errors import UserError
from stages.core.models import open_encoder, resolve_model
from stages.core.tuning import TuningRequest, inner_model, tuned_model
from stages.rm.trainer import last_token_scores
from tests.supervised import demonstrations, metrics_lines, preferences, run_stage, stage_context, write_rows
from tests.tiny import tiny_model_folder

LORA = {"method": "lora", "rank": 4, "alpha": 8}
FULL = {"method": "full"}
SECTION = {"batch_size": 8, "microbatch_size": 4, "holdout": 0.2, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", preferences(60))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A LoRA policy that sft made."""
    folder = tmp_path_factory.mktemp("run")
    rows = write_rows(folder / "rows.jsonl", demonstrations(24))
    context = stage_context(folder, stage="sft", source=base, data=rows, shared={"tuning": LORA}, section=SECTION)
    run_stage(context)
    return context.out


def context_of(folder: Path, source: Path, pairs: Path, *, tuning: dict[str, Any] = LORA, **section: Any):
    shared = {"tuning": tuning, **section.pop("shared", {})}
    return stage_context(folder, stage="rm", source=source, data=pairs, shared=shared, section={**SECTION, **section})


@pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
def test_published_reward_model_loads_and_scores_as_logged(
    tmp_path: Path, policy: Path, pairs: Path, tuning: dict[str, Any]
) -> None:
    context = context_of(tmp_path, policy, pairs, tuning=tuning, epochs=3)
    result = run_stage(context)
    assert result.kind == "reward_model"
    weights = context.out / "weights"
    auto = AutoPeftModelForSequenceClassification if tuning is LORA else AutoModelForSequenceClassification
    model = auto.from_pretrained(weights, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(weights)
    samples = [json.loads(line) for line in (context.out / "samples.jsonl").read_text().splitlines()]
    shown = [row for row in samples if row["step"] == result.metrics["best/step"]]
    assert len(shown) == 8
    for row in shown:
        prompt = [tokenizer.bos_token_id, *tokenizer(row["prompt"], add_special_tokens=False).input_ids]
        response = [*tokenizer(row["response"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            score = model(torch.tensor([prompt + response])).logits[0, 0].item()
        assert score == pytest.approx(row["score"], abs=1e-4)


def test_it_learns_which_side_is_better_and_says_how_well(tmp_path: Path, policy: Path, pairs: Path) -> None:
    context = context_of(tmp_path, policy, pairs, epochs=8)
    result = run_stage(context)
    assert result.metrics["eval/accuracy"] == 1.0
    assert 0.7 < result.metrics["eval/accuracy_low"] < 1.0  # 12 pairs: Wilson's lower end is 12 / (12 + 3.84)
    assert result.metrics["eval/accuracy_low"] == pytest.approx(12 / (12 + 3.841), abs=1e-3)
    lines = [line for line in metrics_lines(context) if "eval/loss" in line]
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"]
    assert {"eval/accuracy", "eval/calibration_error", "eval/score_mean", "eval/score_std"} <= lines[0].keys()
    report = json.loads((context.out / "report.json").read_text())
    assert report["holdout_pairs"] == 12
    assert report["holdout"]["score_std"] == pytest.approx(result.metrics["eval/score_std"], abs=1e-5)


def test_lora_starts_from_the_policys_adapter_on_the_same_base(base: Path, policy: Path) -> None:
    source = resolve_model(str(policy))
    request = TuningRequest(_tuning(LORA), "float32", packing=True, seed=0)
    model = tuned_model(source, head="score", request=request)
    saved = load_file(policy / "weights" / "adapter_model.safetensors")
    ours = {name.replace(".default.", "."): value for name, value in model.state_dict().items() if ".lora_" in name}
    assert ours.keys() == saved.keys()
    assert all(torch.equal(ours[name], saved[name]) for name in saved)
    assert any(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)
    assert model.peft_config["default"].base_model_name_or_path == str(base)
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert any("score" in name for name in trainable)
    assert all("lora_" in name or "score" in name for name in trainable)


def test_fresh_head_is_small_and_seeded(policy: Path) -> None:
    def head(seed: int) -> torch.Tensor:
        request = TuningRequest(_tuning(LORA), "bfloat16", packing=True, seed=seed)
        model = inner_model(tuned_model(resolve_model(str(policy)), head="score", request=request))
        return next(value for name, value in model.score.named_parameters() if "modules_to_save" in name)

    weight = head(0)
    assert weight.dtype == torch.float32
    assert weight.shape == (1, 32)
    assert weight.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.4)
    assert torch.equal(weight, head(0))
    assert not torch.equal(weight, head(1))


def test_full_training_goes_on_from_a_reward_models_head(tmp_path: Path, policy: Path, pairs: Path) -> None:
    first = context_of(tmp_path / "first", policy, pairs, tuning=FULL, epochs=3)
    before = run_stage(first).metrics["eval/loss"]
    second = context_of(tmp_path / "second", first.out, pairs, tuning=FULL, learning_rate=1e-9, warmup=0.0)
    run_stage(second)
    assert metrics_lines(second)[0]["eval/loss"] == pytest.approx(before, abs=1e-5)


def test_another_rank_than_the_policys_is_refused(tmp_path: Path, policy: Path, pairs: Path) -> None:
    context = context_of(tmp_path, policy, pairs, tuning={**LORA, "rank": 8, "alpha": 16})
    with pytest.raises(UserError) as caught:
        run_stage(context)
    assert "tuning.rank=8 differs from 4" in caught.value.problems[0]
    assert "tuning.alpha=16" in caught.value.problems[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
def test_padded_training_is_packed_training(
    tmp_path: Path, policy: Path, pairs: Path, tuning: dict[str, Any], dtype: str
) -> None:
    packed = context_of(tmp_path / "packed", policy, pairs, tuning=tuning, shared={"dtype": dtype})
    padded = context_of(tmp_path / "padded", policy, pairs, tuning=tuning, shared={"dtype": dtype, "packing": False})
    run_stage(packed)
    run_stage(padded)
    for left, right in zip(metrics_lines(packed), metrics_lines(padded), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5 if dtype == "float32" else 0.02)


def test_pairs_columns_reach_the_loss(tmp_path: Path, policy: Path) -> None:
    """Margin, weight and p_chosen in the first step's loss, worked out in plain numbers from the untrained scores."""
    rows = preferences(4)
    rows[0] |= {"margin": 1.5}
    rows[1] |= {"weight": 3.0}
    rows[2] |= {"p_chosen": 0.7, "margin": 0.5}
    context = context_of(tmp_path, policy, write_rows(tmp_path / "a.jsonl", rows), holdout=0.0, centering=0.2)
    run_stage(context)
    source = resolve_model(str(policy))
    model = tuned_model(source, head="score", request=TuningRequest(_tuning(LORA), "float32", packing=True, seed=0))
    encoder = open_encoder(context.inputs["policy"], context.shared)
    total, weights = 0.0, 0.0
    for row in rows:
        sides = [
            encoder.prompt_tokens(row["prompt"]) + encoder.response_tokens(row["prompt"], row[side])
            for side in ("chosen", "rejected")
        ]
        with torch.no_grad():
            chosen, rejected = last_token_scores(model, sides, packing=True).tolist()
        x = chosen - rejected - row.get("margin", 0.0)  # each of these labels prefers chosen
        p = row.get("p_chosen", 1.0)
        loss = p * math.log1p(math.exp(-x)) + (1 - p) * math.log1p(math.exp(x)) + 0.2 * (chosen + rejected) ** 2
        total += row.get("weight", 1.0) * loss
        weights += row.get("weight", 1.0)
    assert metrics_lines(context)[0]["loss"] == pytest.approx(total / weights, abs=1e-5)


def test_padding_with_eos_does_not_move_the_score(tmp_path: Path, pairs: Path) -> None:
    """Where padding is EOS, transformers would read the token before EOS; the artifact says there is no padding."""
    folder = tiny_model_folder(tmp_path / "base")
    for name, key, value in [("config.json", "pad_token_id", 1), ("tokenizer_config.json", "pad_token", "</s>")]:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, key: value}))
    context = context_of(tmp_path, folder, pairs, tuning=FULL)
    run_stage(context)
    assert json.loads((context.out / "weights" / "config.json").read_text())["pad_token_id"] is None


def _tuning(values: dict[str, Any]):
    from stages.core.config import Tuning

    return Tuning(**values)
