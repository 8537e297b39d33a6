"""The closing comparison: intervals by hand, KL and accuracy against transformers' own forward pass, the table."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from data.errors import UserError
from data.sources import SourceConfig
from pipeline.config import RunConfig
from pipeline.inputs import Run, stage_inputs
from pipeline.metrics import MetricsLog, read_metrics
from stages.core.answering import load_view
from stages.core.bank import BankBuilder
from stages.core.context import Interrupted, StageContext
from stages.core.rollout.native import NativeEngine
from stages.eval.config import EvalConfig
from stages.eval.figures import Mean
from stages.eval.policies import answer, kl_to_reference
from stages.eval.report import Findings, Measured, make_report
from stages.eval.stage import open_policies, run
from tests.chat_server import ChatServer, Reply
from tests.supervised import SilentView
from tests.tiny import tiny_model_folder

TEMPERATURE = 0.7


def test_a_mean_and_its_interval_by_hand() -> None:
    # deviations -1.5 -0.5 0.5 1.5: variance 5/3; half = 1.96 x sqrt(5/3) / sqrt(4)
    mean = Mean.of([1.0, 2.0, 3.0, 4.0])
    assert (mean.mean, mean.count) == (2.5, 4)
    assert mean.half == pytest.approx(1.959964 * math.sqrt(5 / 3) / 2)
    assert mean.figures()["low"] == pytest.approx(2.5 - 1.2651516)
    assert mean.text() == "2.500 ± 1.265"
    assert Mean.of([0.5]).text() == "0.500"
    assert Mean.of([0.5]).figures()["low"] is None


def test_what_two_policies_share_does_not_widen_their_difference() -> None:
    assert Mean.of_difference([11.0, 2.0, 300.0], [10.0, 1.0, 299.0]) == Mean(1.0, 0.0, 3)
    assert Mean.of_difference([1.0], [3.0]).text(sign=True) == "-2.000"


def findings(kl: float) -> Findings:
    sft = Measured("sft", {"gold": [0.0, 1.0], "length": [4.0, 6.0], "ended": [1.0, 0.0], "kl": [0.0, 0.0]})
    ppo = Measured("ppo", {"gold": [1.0, 1.0], "length": [3.0, 3.0], "ended": [1.0, 1.0], "kl": [kl, kl]})
    accuracy = {"accuracy": 0.9, "accuracy_low": 0.85, "accuracy_high": 0.94, "pairs": 100.0}
    return Findings([sft, ppo], {"score": accuracy})


def config(**changes: Any) -> EvalConfig:
    return EvalConfig(prompts=[SourceConfig(path="x.jsonl")], scores={"gold": {"function": "m:f"}}, **changes)  # type: ignore[dict-item]


def test_the_report_shows_means_differences_and_verdicts() -> None:
    report = make_report(findings(kl=2.0), config(kl_budget=3.0))
    assert report["columns"] == ["policy", "gold", "kl", "length", "ended"]
    assert [row[0] for row in report["rows"]] == ["sft", "ppo", "ppo - sft"]
    # differences of gold are 1 and 0: sd sqrt(1/2), half 1.96 x sqrt(1/2) / sqrt(2) = 0.98
    assert report["rows"][2] == ["ppo - sft", "+0.500 ± 0.980", "", "-2.000 ± 1.960", "+0.500 ± 0.980"]
    assert report["figures"]["differences"]["ppo - sft"]["gold"]["mean"] == 0.5
    assert any("90.0% of 100 pairs" in note for note in report["notes"])
    assert report["notes"][-1] == "ppo: 2.00 nats per response, within the budget of 3."
    assert "OVER" in make_report(findings(kl=4.0), config(kl_budget=3.0))["notes"][-1]
    assert "budget" not in make_report(findings(kl=4.0), config())["notes"][-1]


def test_one_policy_alone_has_no_differences() -> None:
    report = make_report(Findings(findings(0.0).policies[:1]), config(kl_budget=3.0))
    assert [row[0] for row in report["rows"]] == ["sft"]
    assert report["figures"]["differences"] == {}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies of one shape and other weights, and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["first", "second"]):
        tiny_model_folder(folder / name, seed=seed)
    torch.manual_seed(5)
    tiny_model_folder(folder / "reward", seed=2)
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1)
    reward.config.pad_token_id = None
    reward.save_pretrained(folder / "reward")
    return folder


def stage_context(
    models: Path, out: Path, *, stop: bool = False, scores: dict[str, Any] | None = None
) -> StageContext[EvalConfig]:
    prompts = [{"prompt": f"the {noun} sat", "noun": noun} for noun in ("cat", "dog", "red house", "mat", "user")]
    words = ["yes", "no", "cat", "dog", "red", "hello", "good", "day", "on", "ran", "to", "the"]
    pairs = [
        {"prompt": "say", "chosen": f" {one}", "rejected": f" {words[7 * place % 12]}"}
        for place, one in enumerate(words)
    ]
    pairs = [pair for pair in pairs if pair["chosen"] != pair["rejected"]]
    section = {
        "prompts": [{"path": write_rows(out.parent / "prompts.jsonl", prompts)}],
        "pairs": [{"path": write_rows(out.parent / "pairs.jsonl", pairs)}],
        "policies": {"a": str(models / "first"), "b": str(models / "second")},
        "scores": {
            "nouns": {"function": f"{__name__}:noun_length"},
            "score": {"model": str(models / "reward"), "weight": 2.0},
            **(scores or {}),
        },
        "response_length": 12,
        "temperature": TEMPERATURE,
    }
    whole = RunConfig.model_validate({"base_model": str(models / "first"), "max_length": 64, "eval": section})
    assert whole.eval is not None
    out.mkdir(parents=True, exist_ok=True)
    return StageContext(
        stage="eval",
        out=out,
        run_folder=out.parent,
        config_folder=None,
        shared=whole,
        config=whole.eval,
        inputs=stage_inputs(Run(whole, None, out.parent), "eval"),
        key="key",
        metrics=MetricsLog(out, view=SilentView()),
        should_stop=lambda: stop,
    )


def noun_length(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [float(len(row["noun"])) for row in rows]


def reference_logprob(model: torch.nn.Module, prompt: list[int], response: tuple[int, ...]) -> float:
    """Sum of log-probabilities by a plain forward pass of one unpadded sequence."""
    tokens = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logprobs_SV = (model(tokens).logits[0].double() / TEMPERATURE).log_softmax(1)
    return sum(float(logprobs_SV[len(prompt) - 1 + place, token]) for place, token in enumerate(response))


def test_kl_is_the_sampled_difference_of_log_probabilities(models: Path, tmp_path: Path) -> None:
    context = stage_context(models, tmp_path / "eval")
    policies = open_policies(context, [])
    builder = BankBuilder(context.shared)
    reference, view = (load_view(policy.source, f"p{place}", builder) for place, policy in enumerate(policies))
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": TEMPERATURE, "run_seed": 0}
    engine = NativeEngine(view.trunk, view.adapter)
    answers = answer(policies[1], view, engine, **options)
    kls = kl_to_reference(policies[0], reference, policies[1], answers, temperature=TEMPERATURE)
    first, second = (AutoModelForCausalLM.from_pretrained(models / name) for name in ("first", "second"))
    expected = [
        reference_logprob(second, prompt.tokens, each.tokens) - reference_logprob(first, prompt.tokens, each.tokens)
        for prompt, each in zip(policies[1].prompts, answers.completions, strict=True)
    ]
    assert kls == pytest.approx(expected, abs=1e-3)
    assert max(map(abs, expected)) > 0.1
    assert (
        answer(policies[1], view, NativeEngine(view.trunk, view.adapter), **options).texts == answers.texts
    )  # the same seeds, the same words
    own_answers = answer(policies[0], reference, NativeEngine(reference.trunk, reference.adapter), **options)
    own = kl_to_reference(policies[0], reference, policies[0], own_answers, temperature=TEMPERATURE)
    assert own == pytest.approx([0.0] * 5, abs=1e-4)


def test_policies_of_different_vocabularies_have_no_kl(models: Path, tmp_path: Path) -> None:
    context = stage_context(models, tmp_path / "eval")
    policies = open_policies(context, [])
    view = load_view(policies[0].source, "p", BankBuilder(context.shared))
    answers = answer(
        policies[1], view, NativeEngine(view.trunk, view.adapter), max_new_tokens=4, temperature=1.0, run_seed=0
    )
    policies[1].encoder.tokenizer.add_tokens(["<new>"])
    assert kl_to_reference(policies[0], view, policies[1], answers, temperature=1.0) is None


def test_the_stage_writes_report_samples_and_one_line_of_metrics(models: Path, tmp_path: Path) -> None:
    context = stage_context(models, tmp_path / "eval")
    result = run(context)
    assert result.kind == "evaluation"
    report = json.loads((context.out / "report.json").read_text(encoding="utf-8"))
    assert report["columns"] == ["policy", "nouns", "score", "kl", "length", "ended"]
    samples = [json.loads(line) for line in (context.out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(samples) == 10
    assert [row["policy"] for row in samples] == ["a"] * 5 + ["b"] * 5
    assert [row["nouns"] for row in samples[:5]] == [3.0, 3.0, 9.0, 3.0, 4.0]
    assert all(row["kl"] == 0.0 for row in samples[:5])
    mean = sum(row["score"] for row in samples[5:]) / 5
    assert report["figures"]["policies"]["b"]["score"]["mean"] == pytest.approx(mean)
    (line,) = read_metrics(context.out)
    assert line["b/score"] == pytest.approx(mean)
    assert result.metrics["b - a/score"] == pytest.approx(line["b/score"] - line["a/score"])


def test_a_judge_is_an_evaluator_and_what_it_does_not_grade_does_not_count(models: Path, tmp_path: Path) -> None:
    """It grades by whether the prompt is about a cat (10), 1 else, and refuses the dog: 1 of 4 at 1, 3 at -1."""

    def grade(body: dict[str, Any]) -> Reply:
        data = json.loads(body["messages"][-1]["content"].splitlines()[1])
        asked = json.dumps({name: text for name, text in data.items() if name != "response"})
        return Reply("No." if "dog" in asked else json.dumps({"score": 10 if "cat" in asked else 1}))

    with ChatServer(grade) as server:
        judge = {"base_url": server.base_url, "model": "m", "attempts": 1, "max_unanswered": 0.5}
        context = stage_context(models, tmp_path / "eval", scores={"graded": {"judge": judge}})
        run(context)
    report = json.loads((context.out / "report.json").read_text(encoding="utf-8"))
    assert report["columns"] == ["policy", "nouns", "score", "graded", "kl", "length", "ended"]
    for policy in ("a", "b"):
        graded = report["figures"]["policies"][policy]["graded"]
        assert (graded["mean"], graded["count"]) == (pytest.approx(-0.5), 4)
    assert report["figures"]["differences"]["b - a"]["graded"]["count"] == 4
    samples = [json.loads(line) for line in (context.out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["graded"] for row in samples] == [1.0, None, -1.0, -1.0, -1.0] * 2


def test_the_accuracy_is_that_of_the_reward_model_alone(models: Path, tmp_path: Path) -> None:
    context = stage_context(models, tmp_path / "eval")
    figures = run(context).metrics
    model = AutoModelForSequenceClassification.from_pretrained(models / "reward")
    tokenizer = open_policies(context, [])[0].encoder.tokenizer

    def score(text: str) -> float:
        tokens = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            hidden = model.model(torch.tensor([[*tokens, tokenizer.eos_token_id]])).last_hidden_state[0, -1]
            return float(model.score(hidden))

    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    right = [score(row["prompt"] + row["chosen"]) > score(row["prompt"] + row["rejected"]) for row in rows]
    assert 0 < sum(right) < len(right)  # a coin that always falls on one side would test nothing
    assert figures["score/accuracy"] == pytest.approx(sum(right) / len(right))


def test_it_stops_when_asked_and_leaves_no_report(models: Path, tmp_path: Path) -> None:
    context = stage_context(models, tmp_path / "eval", stop=True)
    with pytest.raises(Interrupted):
        run(context)
    assert not (context.out / "report.json").exists()


def test_no_room_for_a_prompt_is_the_users_to_mend(models: Path, tmp_path: Path) -> None:
    context = stage_context(models, tmp_path / "eval")
    object.__setattr__(context, "config", context.config.model_copy(update={"response_length": 64}))
    with pytest.raises(UserError, match="response_length=64 leaves no room in max_length=64"):
        run(context)
