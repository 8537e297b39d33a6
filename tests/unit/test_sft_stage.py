"""What `sft` leaves behind: weights that load, figures, metrics, and errors that name rows."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.errors import UserError
from stages.core.best_weights import BestWeights
from tests.supervised import demonstrations, metrics_lines, run_stage, stage_context, write_rows
from tests.tiny import tiny_model_folder

LORA = {"method": "lora", "rank": 4, "alpha": 8}
FULL = {"method": "full"}
SECTION = {"batch_size": 8, "microbatch_size": 4, "holdout": 0.2, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", demonstrations(40))


def context_of(folder: Path, base: Path, rows: Path, *, tuning: dict[str, Any] = LORA, **section: Any):
    shared = {"tuning": tuning, **section.pop("shared", {})}
    return stage_context(folder, stage="sft", source=base, data=rows, shared=shared, section={**SECTION, **section})


@pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
def test_published_weights_load_and_have_the_published_loss(
    tmp_path: Path, base: Path, rows: Path, tuning: dict[str, Any]
) -> None:
    context = context_of(tmp_path, base, rows, tuning=tuning, epochs=2)
    result = run_stage(context)
    weights = context.out / "weights"
    assert result.kind == "policy"
    assert not [path for path in weights.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".md")]
    auto = AutoPeftModelForCausalLM if tuning is LORA else AutoModelForCausalLM
    model = auto.from_pretrained(weights).eval()
    tokenizer = AutoTokenizer.from_pretrained(weights)
    assert tokenizer.chat_template
    holdout = [row for row in _all_rows(tokenizer, rows) if row[0] not in _trained_prompts(context, rows)]
    total, count = 0.0, 0
    for _, prompt, response in holdout:
        logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        total -= sum(logprobs[len(prompt) + place - 1, token].item() for place, token in enumerate(response))
        count += len(response)
    assert result.metrics["eval/loss"] == pytest.approx(total / count, rel=1e-4)
    assert result.metrics["eval/loss"] < metrics_lines(context)[0]["eval/loss"]


def _all_rows(tokenizer, rows: Path) -> list[tuple[str, list[int], list[int]]]:
    """Prompt text, its ids behind one BOS, and the response's ids with EOS: written out for this tokenizer."""
    found = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        prompt = [tokenizer.bos_token_id, *tokenizer(row["prompt"], add_special_tokens=False).input_ids]
        response = [*tokenizer(row["response"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        found.append((row["prompt"], prompt, response))
    return found


def _trained_prompts(context, rows: Path) -> set[str]:
    from data.prepare import prepare_demonstrations
    from stages.core.models import open_encoder
    from stages.core.supervised import encode_rows

    encoder = open_encoder(context.inputs["base"], context.shared)
    prepared = encode_rows(context, encoder, prepare_demonstrations)
    lines = {f"{rows}:{number + 1}": json.loads(line) for number, line in enumerate(rows.read_text().splitlines())}
    assert prepared.holdout
    return {lines[row.origin]["prompt"] for row in prepared.train}


def test_metrics_have_one_line_a_step(tmp_path: Path, base: Path, rows: Path) -> None:
    context = context_of(tmp_path, base, rows, epochs=3, eval_every=5, schedule="linear", warmup=0.0)
    result = run_stage(context)
    lines = metrics_lines(context)
    assert [line["step"] for line in lines] == list(range(1, 13))  # 32 rows, 3 epochs, batches of 8
    assert {"tokens", "loss", "lr", "grad_norm", "seconds", "throughput/tokens_per_s", "memory/peak_bytes"} <= lines[
        0
    ].keys()
    assert [line["step"] for line in lines if "eval/loss" in line] == [5, 10, 12]
    assert [line["lr"] for line in lines] == pytest.approx([0.01 * (12 - step) / 12 for step in range(12)])
    tokens = [line["tokens"] for line in lines]
    assert tokens == sorted(tokens)
    assert tokens[3] * 3 == tokens[11]  # three epochs over the same rows
    assert lines[-1]["eval/perplexity"] == pytest.approx(math.exp(lines[-1]["eval/loss"]))
    assert result.metrics["last/loss"] == lines[-1]["eval/loss"]


def test_best_or_last_weights_are_published(tmp_path: Path, base: Path, rows: Path) -> None:
    """With a learning rate this high the holdout loss rises after a while, so the two differ."""
    values = {"epochs": 4, "learning_rate": 1.0, "schedule": "constant", "warmup": 0.0, "eval_every": 1}
    best = context_of(tmp_path / "best", base, rows, **values)
    last = context_of(tmp_path / "last", base, rows, **values, publish="last")
    best_result, last_result = run_stage(best), run_stage(last)
    losses = {line["step"]: line["eval/loss"] for line in metrics_lines(best)}
    best_step = min(losses, key=lambda step: losses[step])
    assert best_step < max(losses)
    assert best_result.metrics["eval/loss"] == min(losses.values())
    assert last_result.metrics["eval/loss"] == losses[max(losses)]
    for result in (best_result, last_result):
        assert result.metrics["best/step"] == best_step
        assert result.metrics["best/loss"] == min(losses.values())
        assert result.metrics["last/loss"] == losses[max(losses)]
    published = [load_file(context.out / "weights/adapter_model.safetensors") for context in (best, last)]
    assert any(not torch.equal(published[0][name], published[1][name]) for name in published[0])


def test_without_a_holdout_the_last_weights_are_published(tmp_path: Path, base: Path, rows: Path) -> None:
    context = context_of(tmp_path, base, rows, holdout=0.0)
    result = run_stage(context)
    assert (context.out / "weights" / "adapter_model.safetensors").is_file()
    assert "eval/loss" not in result.metrics
    assert result.metrics["loss"] == metrics_lines(context)[-1]["loss"]


def test_padded_training_is_packed_training(tmp_path: Path, base: Path, rows: Path) -> None:
    packed = context_of(tmp_path / "packed", base, rows)
    padded = context_of(tmp_path / "padded", base, rows, shared={"packing": False})
    run_stage(packed)
    run_stage(padded)
    for left, right in zip(metrics_lines(packed), metrics_lines(padded), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
        assert left["tokens"] == right["tokens"]


@pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
def test_bfloat16_trains_float32_weights(tmp_path: Path, base: Path, rows: Path, tuning: dict[str, Any]) -> None:
    exact = context_of(tmp_path / "exact", base, rows, tuning=tuning)
    coarse = context_of(tmp_path / "coarse", base, rows, tuning=tuning, shared={"dtype": "bfloat16"})
    run_stage(exact)
    run_stage(coarse)
    name = "adapter_model.safetensors" if tuning is LORA else "model.safetensors"
    assert {value.dtype for value in load_file(coarse.out / "weights" / name).values()} == {torch.float32}
    for left, right in zip(metrics_lines(exact), metrics_lines(coarse), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=0.02)


def test_a_row_with_a_loss_that_is_not_finite_is_named(tmp_path: Path, rows: Path) -> None:
    folder = tiny_model_folder(tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    poison = tokenizer("é", add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    model.save_pretrained(folder)
    lines = rows.read_text().splitlines()
    lines[20] = json.dumps({"prompt": "é", "response": "yes"})
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines) + "\n", encoding="utf-8")
    context = context_of(tmp_path, folder, bad, holdout=0.0, microbatch_size=1)
    with pytest.raises(UserError, match=r"sft step \d+: loss is nan on rows .*bad\.jsonl:21; no update was made"):
        run_stage(context)
    assert all(math.isfinite(line["loss"]) for line in (metrics_lines(context) if _has_metrics(context) else []))


def _has_metrics(context) -> bool:
    return (context.out / "metrics.jsonl").is_file()


def test_sft_goes_on_from_a_policy(tmp_path: Path, base: Path, rows: Path) -> None:
    first = context_of(tmp_path / "first", base, rows)
    before = run_stage(first).metrics["eval/loss"]
    second = context_of(tmp_path / "second", first.out, rows, learning_rate=1e-9, warmup=0.0)
    run_stage(second)
    assert metrics_lines(second)[0]["eval/loss"] == pytest.approx(before, abs=1e-5)
    config = json.loads((second.out / "weights" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)


def test_another_rank_than_the_policys_is_refused(tmp_path: Path, base: Path, rows: Path) -> None:
    first = context_of(tmp_path / "first", base, rows)
    run_stage(first)
    second = context_of(tmp_path / "second", first.out, rows, tuning={**LORA, "rank": 2, "targets": ["q_proj"]})
    with pytest.raises(UserError) as caught:
        run_stage(second)
    assert "tuning.rank=2 differs from 4" in caught.value.problems[0]
    assert caught.value.problems[1].startswith("tuning.targets=q_proj differs from model.layers.0.mlp.down_proj")


def test_full_training_from_a_lora_policy_starts_from_the_merged_weights(
    tmp_path: Path, base: Path, rows: Path
) -> None:
    first = context_of(tmp_path / "first", base, rows)
    before = run_stage(first).metrics["eval/loss"]
    second = context_of(tmp_path / "second", first.out, rows, tuning=FULL, learning_rate=1e-9, warmup=0.0)
    run_stage(second)
    assert metrics_lines(second)[0]["eval/loss"] == pytest.approx(before, abs=1e-5)
    assert (second.out / "weights" / "model.safetensors").is_file()


def test_refused_rows_are_kept_and_too_many_stop_the_run(tmp_path: Path, base: Path, rows: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(rows.read_text() + '{"prompt": "no response"}\n', encoding="utf-8")
    context = context_of(tmp_path, base, bad)
    with pytest.raises(UserError, match="1 of 41 rows"):
        run_stage(context)
    assert "bad.jsonl:41" in (context.out / "quarantine.jsonl").read_text()


def test_best_weights_are_linked_into_checkpoints_and_come_back(tmp_path: Path) -> None:
    best = BestWeights(tmp_path / "best")

    def save(text: str):
        def write(folder: Path) -> None:
            folder.mkdir(parents=True)
            (folder / "model").write_text(text)

        return write

    best.offer(1, {"eval/loss": 2.0}, save("one"))
    best.offer(2, {"eval/loss": 2.0}, save("two"))  # not lower
    (tmp_path / "checkpoint").mkdir()
    best.store(tmp_path / "checkpoint")
    best.offer(3, {"eval/loss": 1.0}, save("three"))
    best.offer(4, {"eval/loss": math.nan}, save("four"))
    assert best.record is not None
    assert best.record.step == 3
    assert (best.weights / "model").read_text() == "three"
    best.restore(tmp_path / "checkpoint")
    assert best.record.step == 1
    assert (best.weights / "model").read_text() == "one"
    best.restore(None)
    assert best.record is None
