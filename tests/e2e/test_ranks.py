"""Equal results: the same config on one process and on two ranks, under each strategy, interrupted or not.

Two real processes over gloo carry out all cases in one start; each is compared with one plain process.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.ranks import Case, run_case, run_on_ranks
from tests.supervised import demonstrations, preferences, write_rows
from tests.tiny import tiny_adapter_folder, tiny_model_folder
from tests.vllm import PYTHON, needs_vllm, tiny_base

TOLERANCE = 1e-5
# Of a clock or of a process's memory; and what magnifies rounding: the exponential of a loss, and a correlation over
# two pairs of which DPO's implicit rewards are nearly 0.
NOT_COMPARED = ("seconds", "time/", "throughput/", "memory/", "eval/perplexity", "eval/score_length_correlation")
LORA = {"method": "lora", "rank": 4, "alpha": 8}
FULL = {"method": "full"}
# 20 rows twice in batches of 3: ten steps and more, and a last one of a single row, so that one rank has none.
SUPERVISED = {"batch_size": 3, "microbatch_size": 1, "epochs": 2, "learning_rate": 1e-3, "holdout": 0.1}
# Microbatches of few tokens, so that ranks differ in their number. 12 optimizer steps.
PPO = {
    "updates": 3,
    "rollout_batch_size": 8,
    "minibatch_size": 4,
    "epochs": 2,
    "response_length": 8,
    "learning_rate": 1e-3,
    "microbatch_tokens": 40,
    "eval_every": 2,
    "eval_prompts": 4,
}
_NAMELESS = ("ptx", "rollout")  # settings that a trial's name does without
REWARD = "def score(prompts, responses, rows):\n    return [len(each) % 5 - 2.0 for each in responses]\n"


@dataclass(frozen=True)
class Trial:
    """A case on two ranks, and what it must equal on one."""

    stage: str
    tuning: Mapping[str, Any]
    strategy: str
    shared: Mapping[str, Any]
    section: Mapping[str, Any]
    offload: str = "none"

    @property
    def name(self) -> str:
        """Of its folder."""
        changes = [f"{key}-{value}" for key, value in {**self.shared, **self.section}.items() if key not in _NAMELESS]
        return "-".join([self.stage, str(self.tuning["method"]), self.strategy, self.offload, *changes])


def trial(stage: str, tuning: Mapping[str, Any], strategy: str, **section: Any) -> Trial:
    """A trial; `shared` and `offload` among the settings are not the section's."""
    shared, offload = section.pop("shared", {}), section.pop("offload", "none")
    return Trial(stage, tuning, strategy, shared, section, offload)


QUICK = [
    trial("sft", LORA, "ddp"),
    trial("sft", FULL, "zero2", batch_size=8),
    trial("sft", LORA, "zero3", shared={"gradient_checkpointing": True}),
    trial("rm", FULL, "none"),
    trial("rm", LORA, "zero1", offload="optimizer"),
    trial("rm", FULL, "zero3"),
    trial("dpo", LORA, "zero2"),
    trial("ppo", LORA, "ddp", minibatch_size=1),
    trial("ppo", FULL, "zero1"),
    trial("ppo", LORA, "zero2", critic="shared", critic_warmup=1, minibatch_size=1),
    trial("ppo", LORA, "zero3", offload="parameters"),
    trial("ppo", LORA, "zero2", reward_model=True),
    trial("ppo", LORA, "zero3", reward_model=True),
    trial("ppo", FULL, "zero3", critic="model", shared={"gradient_checkpointing": True}),
]
MANY = [
    trial(stage, tuning, strategy, **settings)
    for stage in ("sft", "rm", "ppo")
    for tuning in (LORA, FULL)
    for strategy in ("ddp", "zero1", "zero2", "zero3")
    for settings in ([{"microbatch_size": 3}] if stage != "ppo" else [{}, {"critic": "shared", "critic_warmup": 1}])
]
MORE = [
    trial("ppo", LORA, strategy, early_stop_kl=1e-4, learning_rate=1e-2)
    for strategy in ("ddp", "zero1", "zero2", "zero3")
]
MORE += [trial("ppo", LORA, strategy, ptx=True) for strategy in ("ddp", "zero2", "zero3")]
MORE += [
    trial(stage, tuning, "zero3", offload=offload)
    for stage in ("sft", "ppo")
    for tuning in (LORA, FULL)
    for offload in ("optimizer", "parameters")
]


@dataclass(frozen=True)
class Bench:
    """Where the inputs are, and where runs go."""

    folder: Path
    base: Path

    def case(self, trial: Trial, kind: str, *, strategy: str, stop_after: int | None = None) -> Case:
        """The trial as a run of one stage; `kind` tells its folder from those of others."""
        rows = {"sft": "demonstrations", "ppo": "prompts"}.get(trial.stage, "pairs")
        section = dict(SUPERVISED if trial.stage != "ppo" else PPO) | dict(trial.section)
        if section.get("ptx"):
            data = [{"path": str(self.folder / "demonstrations.jsonl")}]
            section["ptx"] = {"data": data, "coef": 0.5, "batch_size": 3}
        if trial.stage == "ppo":
            source = f"{self.folder / 'rewards.py'}:score"
            section["reward"] = [{"config": {"function": "rewards.py:score"}, "source": source}]
        if section.pop("reward_model", False):  # the critic starts as it, scaled
            section["reward"] = [{"config": {"model": "rm"}, "source": str(self.folder / "reward-model")}]
        distributed = {"strategy": strategy, "offload": trial.offload if strategy.startswith("zero") else "none"}
        # With seed 0 one token of an evaluation lies so near its neighbour that weights equal to 1.2e-7 sample either.
        shared = {"seed": 1, "tuning": trial.tuning, "max_length": 64, **trial.shared, "distributed": distributed}
        folder = self.folder / kind / trial.name
        folder.mkdir(parents=True, exist_ok=True)
        data = str(self.folder / f"{rows}.jsonl")
        return Case(str(folder), trial.stage, str(self.base), data, shared, section, stop_after)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("ranks")
    write_rows(folder / "demonstrations.jsonl", demonstrations(22))
    write_rows(folder / "pairs.jsonl", preferences(22))
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in demonstrations(16)])
    (folder / "rewards.py").write_text(REWARD)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base = tiny_model_folder(folder / "base")
    tiny_adapter_folder(folder / "reward-model", base, head="score")
    yield Bench(folder, base)
    torch.set_num_threads(threads)


def figures_of(case: Case) -> list[dict[str, float]]:
    """Every line of metrics.jsonl, without what a clock says."""
    text = (Path(case.folder) / case.stage / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(NOT_COMPARED)} for line in lines]


def weights_of(case: Case) -> dict[str, Tensor]:
    """The published weights."""
    (path,) = (Path(case.folder) / case.stage / "weights").glob("*.safetensors")
    return load_file(path)


def assert_equal_runs(ours: Case, theirs: Case) -> None:
    """Every figure of every step, and every published weight, to 1e-5; and the weights have moved."""
    our_lines, their_lines = figures_of(ours), figures_of(theirs)
    assert [line["step"] for line in our_lines] == [line["step"] for line in their_lines]
    for line, expected in zip(our_lines, their_lines, strict=True):
        assert line.keys() == expected.keys()
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), (ours.folder, line["step"], name)
    our_weights, their_weights = weights_of(ours), weights_of(theirs)
    assert our_weights.keys() == their_weights.keys()
    for name, value in their_weights.items():
        torch.testing.assert_close(our_weights[name], value, atol=TOLERANCE, rtol=0, msg=f"{ours.folder}: {name}")


def in_one_pass(trial: Trial) -> Trial:
    """The trial with passes that hold whatever a step asks for."""
    if trial.stage == "ppo":
        return replace(trial, section={**trial.section, "microbatch_tokens": 4096})
    return replace(trial, section={**trial.section, "microbatch_size": 64})


def soaked(name: str, trials: Sequence[Trial]) -> Any:
    """Trials that are too many for every day."""
    return pytest.param(trials, id=name, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])


@pytest.mark.parametrize(
    "trials",
    [
        pytest.param(QUICK, id="quick", marks=pytest.mark.slow),
        *(soaked(f"strategies-{start // 8}", MANY[start : start + 8]) for start in range(0, len(MANY), 8)),
        soaked("more", MORE),
    ],
)
def test_two_ranks_give_what_one_process_gives(bench: Bench, trials: list[Trial]) -> None:
    """Each trial on two ranks is its plain run on one, which takes a step's rows in one pass: 1 x 8, and here 8 x 1."""
    plain = [bench.case(in_one_pass(each), "one", strategy="none") for each in trials]
    several = [bench.case(each, "two", strategy=each.strategy) for each in trials]
    for case in plain:
        run_case(case)
    run_on_ranks(bench.folder, several)
    assert len(plain) == len(trials)
    for ours, theirs in zip(several, plain, strict=True):
        assert_equal_runs(ours, theirs)


@pytest.mark.parametrize(
    ("tuning", "strategy"),
    [
        pytest.param(LORA, "zero2", marks=[*needs_vllm, pytest.mark.soak]),
        pytest.param(FULL, "zero3", marks=[*needs_vllm, pytest.mark.soak]),
    ],
)
@pytest.mark.timeout(900)
def test_rollouts_by_vllm_on_two_ranks_train_as_on_one(bench: Bench, tuning: Mapping[str, Any], strategy: str) -> None:
    """Rank 0 has the server and hands it the whole policy; the others train on what it sampled."""
    heads_of_32 = replace(bench, base=tiny_base(bench.folder / "heads-of-32"))
    one = trial("ppo", tuning, strategy, rollout={"engine": "vllm", "vllm_python": PYTHON})
    plain = heads_of_32.case(in_one_pass(one), "vllm-one", strategy="none")
    several = heads_of_32.case(one, "vllm-two", strategy=strategy)
    run_case(plain)
    run_on_ranks(bench.folder, [several])
    assert_equal_runs(several, plain)


@pytest.mark.slow
def test_bfloat16_and_evaluation_on_two_ranks(bench: Bench) -> None:
    """Products in bfloat16 depend on which rows stand together, so figures are near, not equal; an evaluation's are."""
    low = {"shared": {"dtype": "bfloat16"}}
    trials = [
        trial("sft", LORA, "zero3", **low),
        trial("ppo", LORA, "zero2", **low),
        trial("ppo", FULL, "zero3", **low),
    ]
    plain = [bench.case(each, "low-one", strategy="none") for each in trials]
    several = [bench.case(each, "low-two", strategy=each.strategy) for each in trials]
    models = {"first": str(bench.base), "second": str(Path(several[0].folder) / "sft")}
    section = {"policies": models, "scores": {"length": f"{bench.folder / 'rewards.py'}:score"}, "response_length": 8}
    evals = [
        Case(
            str(bench.folder / kind / "eval"),
            "eval",
            str(bench.base),
            str(bench.folder / "prompts.jsonl"),
            {"max_length": 64},
            section,
        )
        for kind in ("low-one", "low-two")
    ]
    run_on_ranks(bench.folder, [*several, evals[1]])
    for case in [*plain, evals[0]]:
        run_case(case)
    for ours, theirs in zip(several, plain, strict=True):
        losses = [[line["loss"] for line in figures_of(case)] for case in (ours, theirs)]
        assert len(losses[1]) >= 3
        assert losses[0] == pytest.approx(losses[1], rel=0.02, abs=0.02)
        assert all(torch.isfinite(value).all() for value in weights_of(ours).values())
    ours, theirs = (figures_of(case)[0] for case in (evals[1], evals[0]))
    assert {"first/length", "second/length", "second/kl"} <= theirs.keys()
    assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.slow
def test_a_run_is_resumed_on_another_number_of_ranks_and_another_strategy(bench: Bench) -> None:
    """Stopped under one strategy, gone on with under another: the run that nobody stopped, to 1e-5."""
    sft, ppo = trial("sft", LORA, "none"), trial("ppo", FULL, "none")
    whole = {each.stage: bench.case(each, "whole", strategy="none") for each in (sft, ppo)}
    stops = {"sft": 4, "ppo": 1}

    def stopped(each: Trial, kind: str, strategy: str) -> Case:
        return bench.case(each, kind, strategy=strategy, stop_after=stops[each.stage])

    def resumed(each: Trial, kind: str, strategy: str) -> Case:
        return bench.case(each, kind, strategy=strategy)

    for each in (sft, ppo):
        run_case(whole[each.stage])
        run_case(stopped(each, "one-to-two", "none"))
    there = [
        *(resumed(each, "one-to-two", strategy) for each, strategy in ((sft, "zero2"), (ppo, "zero3"))),
        *(stopped(each, "two-to-one", strategy) for each, strategy in ((sft, "zero3"), (ppo, "zero2"))),
        *(stopped(each, "stages", strategy) for each, strategy in ((sft, "ddp"), (ppo, "zero1"))),
        *(resumed(each, "stages", strategy) for each, strategy in ((sft, "zero1"), (ppo, "ddp"))),
    ]
    run_on_ranks(bench.folder, there)
    for each in (sft, ppo):
        steps = [line["step"] for line in figures_of(resumed(each, "two-to-one", "none"))]
        assert steps == list(range(1, stops[each.stage] + 1))
        run_case(resumed(each, "two-to-one", "none"))
        for kind in ("one-to-two", "two-to-one", "stages"):
            assert_equal_runs(replace(whole[each.stage], folder=resumed(each, kind, "none").folder), whole[each.stage])
