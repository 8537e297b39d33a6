"""What `dpo` does: its first step by hand, a reference that stays, a margin that grows, a policy like sft's."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

from data.encoded import EncodedPreference
from data.errors import UserError
from stages.core.pairs import measure
from stages.core.trl_training import train
from stages.dpo.stage import build_trainer
from stages.dpo.trainer import DpoTrainer
from tests.parity.steps import first_step, supervised_run
from tests.supervised import metrics_lines, preferences, run_stage, stage_context, token_preferences, write_rows
from tests.tiny import tiny_adapter_folder, tiny_model_folder, tiny_tokenizer

LORA = {"method": "lora", "rank": 4, "alpha": 8}
FULL = {"method": "full"}
BOTH = pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
SECTION = {"batch_size": 8, "microbatch_size": 4, "holdout": 0.2, "learning_rate": 0.003}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A LoRA policy as sft saves it."""
    return tiny_adapter_folder(tmp_path_factory.mktemp("policy") / "sft", base)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", preferences(60))


def context_of(folder: Path, source: Path, pairs: Path, *, tuning: dict[str, Any] = LORA, **section: Any):
    shared = {"tuning": tuning, **section.pop("shared", {})}
    return stage_context(folder, stage="dpo", source=source, data=pairs, shared=shared, section={**SECTION, **section})


def trainer_of(folder: Path, source: Path, rows: list[EncodedPreference], **values: Any) -> DpoTrainer:
    context = context_of(folder, source, folder, **values)
    return build_trainer(context, supervised_run(context, rows, measure))


def auto_of(tuning: dict[str, Any]) -> Any:
    return AutoPeftModelForCausalLM if tuning is LORA else AutoModelForCausalLM


# --- the first step


def response_logprob(model: Any, tokens: list[int], start: int) -> Tensor:
    """Written out: one sequence at a time, one token at a time, through the model's own forward."""
    logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(logprobs[place - 1, tokens[place]] for place in range(start, len(tokens)))  # type: ignore[return-value]


@BOTH
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_the_first_step_is_the_papers(
    tmp_path: Path, base: Path, policy: Path, tuning: dict[str, Any], packing: bool
) -> None:
    """Equation 7, with soft labels and weights, by plain loops; the policy has moved away from the reference."""
    rows = [
        replace(row, weight=0.5 + number, p_chosen=1 - 0.1 * number) for number, row in enumerate(token_preferences(4))
    ]
    moved = tmp_path / "moved"
    if tuning is LORA:
        tiny_adapter_folder(moved, base, seed=7)
    else:
        tiny_model_folder(moved, seed=7)
    source = policy if tuning is LORA else base
    values = {"batch_size": 4, "microbatch_size": 2, "beta": 0.7, "shared": {"packing": packing}}
    trainer = trainer_of(tmp_path, source, rows, tuning=tuning, **values)
    trainer._load_from_checkpoint(str(moved))
    loss, grads = first_step(trainer)

    ours = auto_of(tuning).from_pretrained(moved, **({"is_trainable": True} if tuning is LORA else {})).eval()
    reference = auto_of(tuning).from_pretrained(source).eval()
    total, weights = torch.tensor(0.0), 0.0
    for row in rows:
        ratios = []
        for side in (row.chosen, row.rejected):
            with torch.no_grad():
                frozen = response_logprob(reference, side, row.prompt_length)
            ratios.append(response_logprob(ours, side, row.prompt_length) - frozen)
        x = 0.7 * (ratios[0] - ratios[1])
        own = -row.p_chosen * torch.log(torch.sigmoid(x)) - (1 - row.p_chosen) * torch.log(1 - torch.sigmoid(x))
        total, weights = total + row.weight * own, weights + row.weight
    expected = total / weights
    expected.backward()
    assert abs(expected.item() - math.log(2)) > 0.01  # there is something to tell
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    theirs = {name: value.grad for name, value in ours.named_parameters() if value.grad is not None}
    assert grads.keys() == theirs.keys()
    assert max(grad.abs().max().item() for grad in theirs.values()) > 1e-3
    for name, grad in theirs.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-5, rtol=1e-4)


@BOTH
def test_training_begins_at_the_reference_whatever_dropout_says(
    tmp_path: Path, policy: Path, pairs: Path, tuning: dict[str, Any]
) -> None:
    """Full tuning has the adapter merged: a reference loaded from where the base is would not be the policy."""
    context = context_of(tmp_path, policy, pairs, tuning=tuning | {"dropout": 0.3}, max_steps=1, warmup=0.0)
    run_stage(context)
    (first,) = metrics_lines(context)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margin"] == 0.0
    assert first["rewards/chosen"] == 0.0
    assert first["logprobs/chosen"] < -1


# --- training


@BOTH
def test_the_reference_stays_where_it_was(
    tmp_path: Path, base: Path, policy: Path, pairs: Path, tuning: dict[str, Any]
) -> None:
    rows = token_preferences(16)
    trainer = trainer_of(tmp_path, policy, rows, tuning=tuning, learning_rate=0.05)
    before = trainer.ref_logprobs(rows)
    policy_before = trainer.logprobs(trainer.model, rows)
    train(trainer)
    assert torch.equal(torch.stack(trainer.ref_logprobs(rows)), torch.stack(before))
    assert not torch.allclose(torch.stack(trainer.logprobs(trainer.model, rows)), torch.stack(policy_before), atol=0.1)
    state = {name: value for name, value in trainer.model.state_dict().items()}
    if tuning is LORA:
        saved = load_file(policy / "adapter_model.safetensors")
        kept = {name.replace(".ref.", "."): value for name, value in state.items() if ".ref." in name}
        assert kept.keys() == saved.keys()
        assert all(torch.equal(kept[name], saved[name]) for name in saved)
        weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
        frozen = {name.replace(".base_layer", ""): value for name, value in state.items() if "lora_" not in name}
        assert all(torch.equal(frozen[f"base_model.model.{name}"], value) for name, value in weights.items())
        assert trainer.ref_model is None  # one base in memory
    optimized = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    trainable = {id(each) for name, each in trainer.model.named_parameters() if tuning is FULL or ".default." in name}
    assert optimized == trainable


@BOTH
def test_the_margin_grows_and_the_policy_learns_the_preference(
    tmp_path: Path, policy: Path, pairs: Path, tuning: dict[str, Any]
) -> None:
    """The better response ends with `yes`, the worse with `no`."""
    context = context_of(tmp_path, policy, pairs, tuning=tuning, epochs=8, eval_every=6, learning_rate=0.01)
    result = run_stage(context)
    lines = metrics_lines(context)
    assert result.kind == "policy"
    assert {"step", "tokens", "loss", "lr", "grad_norm", "seconds", "memory/peak_bytes"} <= lines[0].keys()
    names = {"rewards/chosen", "rewards/rejected", "rewards/margin", "logprobs/chosen", "logprobs/rejected"}
    assert names | {f"eval/{name}" for name in names} | {"eval/loss", "eval/accuracy"} <= lines[-1].keys()
    evaluated = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluated] == [6, 12, 18, 24, 30, 36, 42, 48]
    assert evaluated[-1]["eval/loss"] < evaluated[0]["eval/loss"] < math.log(2)
    assert evaluated[-1]["eval/accuracy"] > 0.9
    assert lines[-1]["rewards/margin"] > lines[8]["rewards/margin"] > 0
    margin = lines[-1]["rewards/chosen"] - lines[-1]["rewards/rejected"]
    assert lines[-1]["rewards/margin"] == pytest.approx(margin)


@BOTH
def test_the_policy_is_saved_as_sfts_is_and_scores_as_logged(
    tmp_path: Path, policy: Path, pairs: Path, tuning: dict[str, Any]
) -> None:
    context = context_of(tmp_path, policy, pairs, tuning=tuning, epochs=2, beta=0.4)
    result = run_stage(context)
    weights = context.out / "weights"
    kept = {"adapter_config.json", "adapter_model.safetensors"} if tuning is LORA else {"config.json"}
    assert kept | {"tokenizer.json"} <= {path.name for path in weights.iterdir()}
    # neither a folder `ref` nor anything else of the reference, here or in a checkpoint
    assert not [path for path in context.out.rglob("*") if path.name == "ref"]
    trained = auto_of(tuning).from_pretrained(weights).eval()
    reference = AutoPeftModelForCausalLM.from_pretrained(policy).eval()
    tokenizer = tiny_tokenizer()
    samples = [json.loads(line) for line in (context.out / "samples.jsonl").read_text().splitlines()]
    shown = [row for row in samples if row["step"] == result.metrics["best/step"]]
    assert len(shown) == 8
    for row in shown:
        prompt = [tokenizer.bos_token_id, *tokenizer(row["prompt"], add_special_tokens=False).input_ids]
        response = [*tokenizer(row["response"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            ratio = [response_logprob(model, prompt + response, len(prompt)) for model in (trained, reference)]
        assert row["score"] == pytest.approx(0.4 * (ratio[0] - ratio[1]).item(), abs=1e-4)


@pytest.mark.parametrize("values", [{"packing": False}, {"dtype": "bfloat16"}], ids=["padded", "bfloat16"])
@BOTH
def test_other_ways_to_compute_give_the_same_losses(
    tmp_path: Path, policy: Path, pairs: Path, tuning: dict[str, Any], values: dict[str, Any]
) -> None:
    usual = context_of(tmp_path / "usual", policy, pairs, tuning=tuning)
    other = context_of(tmp_path / "other", policy, pairs, tuning=tuning, shared=values)
    run_stage(usual)
    run_stage(other)
    for left, right in zip(metrics_lines(usual), metrics_lines(other), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=0.05 if "dtype" in values else 1e-5)
        assert left["tokens"] == right["tokens"]
    assert metrics_lines(other)[0]["rewards/margin"] == 0.0


# --- mistakes


def test_a_margin_is_refused_not_ignored(tmp_path: Path, policy: Path) -> None:
    rows = preferences(10)
    rows[3]["margin"] = 1.5
    context = context_of(tmp_path, policy, write_rows(tmp_path / "pairs.jsonl", rows))
    with pytest.raises(UserError) as caught:
        run_stage(context)
    (problem,) = caught.value.problems
    assert "1 of 10 pairs have a margin (1.5 in " in problem
    assert "pairs.jsonl:4" in problem


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([], "no rows left to use"), ([{"prompt": "a", "response": "b"}] * 3, "chosen")],
    ids=["none", "demonstrations"],
)
def test_rows_that_are_no_pairs(tmp_path: Path, policy: Path, rows: list[dict[str, Any]], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        run_stage(context_of(tmp_path, policy, write_rows(tmp_path / "rows.jsonl", rows)))


def test_lora_on_the_head_is_refused(tmp_path: Path, base: Path, pairs: Path) -> None:
    with pytest.raises(UserError, match=r"tuning\.targets: names the model's head"):
        run_stage(context_of(tmp_path, base, pairs, tuning={**LORA, "targets": ["q_proj", "lm_head"]}))


def test_logits_that_the_head_alone_does_not_give_are_refused(tmp_path: Path, pairs: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = GraniteConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=8.0,
    )
    GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
    tokenizer.save_pretrained(tmp_path / "granite")
    with pytest.raises(UserError, match="GraniteForCausalLM: its logits are scaled"):
        run_stage(context_of(tmp_path, tmp_path / "granite", pairs))
