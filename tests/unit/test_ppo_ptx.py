"""PTX: its gradient is that of supervised fine-tuning times its weight, and its rows follow from the step alone."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.artifacts import sha256_file
from data.encoded import EncodedDemonstration
from data.errors import UserError
from data.sources import SourceConfig
from pipeline.config import validate
from pipeline.inputs import Run, stage_facts
from pipeline.metrics import MetricsLog
from pipeline.plan_batches import ppo_arithmetic
from pipeline.plan_data import check_data
from pipeline.preflight import check_present
from stages.core.bank import PolicyBank
from stages.core.config import SharedConfig
from stages.core.context import Interrupted, StageContext
from stages.core.sequences import PackedBatch
from stages.ppo.config import PpoConfig, PtxConfig
from stages.ppo.ptx import Ptx, demonstration_batch
from stages.ppo.stage import run
from stages.ppo.update import build_optimizer
from tests.tiny import tiny_model_folder
from tests.tiny_ppo import (
    CPU,
    assert_same,
    clear_gradients,
    gradients,
    make_bank,
    make_experience,
    ppo_config,
    still_updater,
    updater_of,
    weights,
)

COEF = 0.4
# Turns of somebody else within the response, and a response that begins the row: its first token cannot be learned.
ROWS = [
    EncodedDemonstration([0, 30, 31, 40, 41, 1], [False, False, False, True, True, True], "demos.jsonl:1"),
    EncodedDemonstration([0, 50, 60, 61, 70, 71, 1], [False, False, True, False, False, True, True], "demos.jsonl:2"),
    EncodedDemonstration([80, 81, 82], [True, True, True], "demos.jsonl:3"),
    EncodedDemonstration([0, 90, 91, 92, 93, 94, 95, 1], [False, True, True, True, True, True, True, True]),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"))


def ptx_of(batch_size: int = 4, *, microbatch_tokens: int = 4096, seed: int = 0) -> Ptx:
    config = PtxConfig(data=[SourceConfig(path="unused.jsonl")], coef=COEF, batch_size=batch_size)
    return Ptx(ROWS, config, microbatch_tokens, seed, CPU)


def mean_nll(bank: PolicyBank, rows: list[EncodedDemonstration]) -> Tensor:
    """Mean negative log-likelihood of the tokens to learn, each row by itself, at temperature 1."""
    losses: list[Tensor] = []
    for row in rows:
        hidden_ND = bank.policy.trunk.hidden(PackedBatch.of([row.tokens], CPU), bank.policy.adapter)
        logprobs_NV = bank.policy.trunk.lm_head(hidden_ND).log_softmax(1)
        losses += [
            -logprobs_NV[place - 1, row.tokens[place]] for place in range(1, len(row.tokens)) if row.loss_mask[place]
        ]
    return torch.stack(losses).mean()


def test_the_batch_by_hand() -> None:
    batch = demonstration_batch(ROWS[1:3], CPU)
    assert batch.packed.tokens_1N.tolist() == [[0, 50, 60, 61, 70, 71, 1, 80, 81, 82]]
    assert batch.before_M.tolist() == [1, 4, 5, 7, 8]
    assert batch.targets_M.tolist() == [60, 71, 1, 81, 82]
    assert batch.lengths == (3, 2)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("microbatch_tokens", [1, 12, 4096])
def test_the_gradient_is_coef_times_that_of_supervised_training(
    base: Path, method: str, microbatch_tokens: int
) -> None:
    bank = make_bank(base, "adapter", method)
    engine = still_updater(bank, ppo_config()).engine
    figure = ptx_of(microbatch_tokens=microbatch_tokens).backward(engine, bank, 0)
    ours = gradients(bank)
    clear_gradients(bank)
    loss = mean_nll(bank, ROWS)
    (COEF * loss).backward()
    assert figure == pytest.approx(loss.item(), rel=1e-5)
    assert_same(ours, gradients(bank))
    assert {name.split(".")[0] for name in ours} == {"policy"}


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_the_update_adds_it_to_the_policys_gradient(base: Path, critic: str) -> None:
    bank, config = make_bank(base, critic), ppo_config(critic=critic)
    experience = make_experience(bank, base, config)
    plain = still_updater(bank, config).update(experience, 1, 0.0)
    without = gradients(bank)
    figures = still_updater(bank, config, ptx=ptx_of()).update(experience, 1, 0.0)
    ours = gradients(bank)
    clear_gradients(bank)
    loss = mean_nll(bank, ROWS)
    (COEF * loss).backward()
    alone = gradients(bank)
    assert_same(ours, {name: each + alone.get(name, 0.0) for name, each in without.items()}, 1e-4)
    assert figures["ptx/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert figures["loss"] == pytest.approx(plain["loss"] + COEF * loss.item(), rel=1e-5)
    assert "ptx/loss" not in plain


def rows_of_steps(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> list[list[EncodedDemonstration]]:
    """The rows that each optimizer step mixed in."""
    seen: list[list[EncodedDemonstration]] = []

    def watching(rows: list[EncodedDemonstration], device: torch.device) -> object:
        seen.append(list(rows))
        return demonstration_batch(rows, device)

    with monkeypatch.context() as patched:
        patched.setattr("stages.ppo.ptx.demonstration_batch", watching)
        action()
    return seen


def test_rows_follow_from_seed_and_step_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, config = make_bank(base), ppo_config(minibatch_size=4, epochs=2)
    experience = make_experience(bank, base, config)

    def update(number: int, seed: int = 0) -> list[list[EncodedDemonstration]]:
        updater = still_updater(bank, config, ptx=ptx_of(2, seed=seed))
        return rows_of_steps(monkeypatch, lambda: updater.update(experience, number, 0.0))

    first, second = update(1), update(2)
    assert [len(rows) for rows in first + second] == [2] * 8
    for start in range(0, 8, 2):  # four rows, two a step: two steps see each once
        epoch = (first + second)[start] + (first + second)[start + 1]
        assert sorted(row.tokens for row in epoch) == sorted(row.tokens for row in ROWS)
    assert update(2) == second  # whatever went before
    assert any(update(number, seed=1) != update(number) for number in (1, 2))


def test_an_early_stop_shifts_no_later_row(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, config = make_bank(base), ppo_config(minibatch_size=4, epochs=2)
    experience = make_experience(bank, base, config)
    moved = replace(experience, logprobs_BR=experience.logprobs_BR - 0.5 * experience.mask_BR)
    stopping = still_updater(bank, ppo_config(minibatch_size=4, epochs=2, early_stop_kl=1e-3), ptx=ptx_of(2))
    plain = still_updater(bank, config, ptx=ptx_of(2))
    assert rows_of_steps(monkeypatch, lambda: stopping.update(moved, 1, 0.0)) == []
    expected = rows_of_steps(monkeypatch, lambda: plain.update(experience, 2, 0.0))
    assert rows_of_steps(monkeypatch, lambda: stopping.update(experience, 2, 0.0)) == expected != []


def test_critic_warmup_mixes_nothing_in(base: Path) -> None:
    bank, config = make_bank(base), ppo_config(critic_warmup=1)
    experience = make_experience(bank, base, config)
    updater = updater_of(bank, config, build_optimizer(bank, config), ptx=ptx_of())
    before = weights(bank)
    assert "ptx/loss" not in updater.update(experience, 1, 0.0)
    moved = {name.split(".")[0] for name, each in bank.trained().items() if not torch.equal(each, before[name])}
    assert moved == {"value", "value_head"}


def test_a_demonstration_that_breaks_the_gradient_stops_before_the_step(base: Path) -> None:
    bank, config = make_bank(base), ppo_config()
    experience = make_experience(bank, base, config)
    ptx = ptx_of()
    endless = replace(ptx, config=ptx.config.model_copy(update={"coef": float("inf")}))
    before = weights(bank)
    with pytest.raises(UserError, match="no update was made"):
        updater_of(bank, config, build_optimizer(bank, config), ptx=endless).update(experience, 1, 0.0)
    assert all(torch.equal(each, before[name]) for name, each in bank.trained().items())


class Quiet:
    """A view that nobody watches."""

    def start(self, total_steps: int, unit: str, done: int) -> None: ...
    def step(self, step: int, values: Mapping[str, float]) -> None: ...
    def say(self, message: str) -> None: ...


def write_data(folder: Path) -> dict[str, object]:
    """Prompts, demonstrations and a reward below `folder`; the ppo section that reads them."""
    prompts = [{"prompt": text} for text in ("the cat", "say", "a dog", "red", "yes or", "user:")]
    demonstrations = [{"prompt": f"say {word}", "response": f" {word}"} for word in ("cat", "dog", "red", "yes", "mat")]
    for name, rows in [("prompts", prompts), ("demos", demonstrations)]:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "reward.py").write_text(
        "def score(prompts, responses, rows):\n    return [len(r) % 5 for r in responses]\n"
    )
    return {
        "prompts": [{"path": str(folder / "prompts.jsonl")}],
        "holdout": 0,
        "reward": {"function": f"{folder / 'reward.py'}:score"},
        "response_length": 6,
        "rollout_batch_size": 4,
        "minibatch_size": 2,
        "epochs": 2,
        "updates": 4,
        "learning_rate": 1e-2,
        "early_stop_kl": 0.05,
        "entropy_coef": 0.01,
        "ptx": {"data": [{"path": str(folder / "demos.jsonl")}], "coef": 0.3, "batch_size": 3},
    }


def run_stage(base: Path, folder: Path, out: Path, *, stop_after: int | None = None) -> dict[str, Tensor]:
    """The stage's weights; raises Interrupted where it was told to stop before the end."""
    out.mkdir(exist_ok=True)
    config = PpoConfig.model_validate(write_data(folder))
    shared = SharedConfig.model_validate({"base_model": str(base), "max_length": 32, "tuning": {"rank": 4, "alpha": 8}})
    inputs = {"policy": str(base), "reward.0": f"{folder / 'reward.py'}:score"}
    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) == stop_after

    metrics = MetricsLog(out, view=Quiet())
    context = StageContext(
        "ppo", out, folder, None, shared, config, inputs=inputs, key="k", metrics=metrics, should_stop=should_stop
    )
    run(context)
    return load_file(out / "weights" / "adapter_model.safetensors")


def test_a_resumed_run_ends_with_the_same_weights(base: Path, tmp_path: Path) -> None:
    alone = run_stage(base, tmp_path, tmp_path / "alone")
    with pytest.raises(Interrupted):
        run_stage(base, tmp_path, tmp_path / "stopped", stop_after=2)
    resumed = run_stage(base, tmp_path, tmp_path / "stopped")
    assert alone.keys() == resumed.keys()
    assert all(torch.equal(each, resumed[name]) for name, each in alone.items())
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["ptx/loss"] > 0 for line in lines)


def test_the_pipeline_reads_the_demonstrations_as_it_reads_prompts(base: Path, tmp_path: Path) -> None:
    section = write_data(tmp_path)

    def planned() -> Run:
        config = validate({"base_model": str(base), "max_length": 32, "ppo": section}, [])
        return Run(config, tmp_path, tmp_path / "out")

    run = planned()
    plan = check_data(run, "ppo")
    assert (plan.rows["train"], plan.rows["ptx_train"]) == (6, 5)
    assert "ptx: 5 rows read" in plan.summary
    assert [piece.text for piece in plan.examples[3] if piece.trained] == [" cat</s>"]
    assert run.config.ppo is not None
    assert ppo_arithmetic(run.config.ppo)[-1] == "ptx: 3 demonstrations in every optimizer step of the policy"
    check_present(run, ["ppo"])

    demos = tmp_path / "demos.jsonl"
    facts, digest = stage_facts(run, "ppo"), sha256_file(demos)
    demos.write_text(demos.read_text() + '{"prompt": "say", "response": " mat"}\n', encoding="utf-8")
    assert sha256_file(demos) != digest
    changed = {name for name, value in stage_facts(planned(), "ppo").items() if value != facts[name]}
    assert changed == {"ppo.ptx.data.0.rows"}
    demos.unlink()
    with pytest.raises(UserError, match=r"demos\.jsonl"):
        check_present(planned(), ["ppo"])
