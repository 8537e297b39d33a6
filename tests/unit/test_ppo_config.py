"""The `ppo:` section: keys that would change nothing are refused, each in one line that says what to do."""

import pytest

from data.errors import UserError
from pipeline.config import RunConfig, dump_config, validate
from pipeline.yaml_text import parse_yaml


def run_config(**ppo: object) -> RunConfig:
    return validate({"base_model": "m", "ppo": {"prompts": [{"path": "p.jsonl"}], **ppo}}, [])


def problem(**ppo: object) -> str:
    with pytest.raises(UserError) as caught:
        run_config(**ppo)
    (line,) = caught.value.problems
    return line


CRITIC_CHANGES: list[dict[str, object]] = [
    {"critic": "shared"},
    {"value_learning_rate": 1e-3},
    {"value_coef": 0.5},
    {"value_clip_range": None},
    {"critic_warmup": 3},
    {"gae_lambda": 1.0},
    {"bootstrap_truncated": True},
    {"value_init": "fresh"},
    {"value_fit": False},
]


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "reinforce++"])
@pytest.mark.parametrize("change", CRITIC_CHANGES, ids=lambda change: next(iter(change)))
def test_a_critics_keys_belong_to_gae(advantage: str, change: dict[str, object]) -> None:
    ((name, value),) = change.items()
    line = problem(advantage=advantage, samples_per_prompt=2, **change)
    assert line.startswith(f"ppo.{name}={value}: no effect with advantage={advantage}")
    assert line.endswith("use advantage=gae")
    assert run_config(**change).ppo is not None


def test_gamma_belongs_to_whoever_discounts() -> None:
    for advantage in ("grpo", "rloo"):
        line = problem(advantage=advantage, samples_per_prompt=2, gamma=0.9)
        assert line.startswith(f"ppo.gamma=0.9: no effect with advantage={advantage}, which has no critic and no disc")
    for advantage in ("gae", "reinforce++"):
        assert run_config(advantage=advantage, gamma=0.9).ppo is not None


def test_all_idle_keys_are_named_at_once() -> None:
    line = problem(advantage="rloo", samples_per_prompt=2, gamma=0.9, critic="shared")
    assert line.startswith("ppo.critic=shared, gamma=0.9: no effect with advantage=rloo")


@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
def test_comparing_takes_two_samples(advantage: str) -> None:
    assert problem(advantage=advantage) == (
        f"ppo.samples_per_prompt=1: advantage={advantage} compares the samples of a prompt; use 2 or more"
    )
    config = run_config(advantage=advantage, samples_per_prompt=2).ppo
    assert config is not None
    assert not config.has_critic


def test_k1_in_the_loss_is_refused_for_its_gradient() -> None:
    line = problem(kl={"place": "loss"})
    assert line.startswith("ppo.kl.estimator=k1 with place=loss trains nothing")
    assert "expected gradient of k1 is zero" in line
    for estimator in ("k2", "k3"):
        assert run_config(kl={"place": "loss", "estimator": estimator}).ppo is not None


@pytest.mark.parametrize(("name", "value", "whole"), [("top_p", 0.9, "1"), ("top_k", 50, "0"), ("top_p", 1.5, "1")])
def test_cut_distributions_are_refused_with_the_reason(name: str, value: float, whole: str) -> None:
    line = problem(rollout={name: value})
    assert line.startswith(f"ppo.rollout.{name}={value}: PPO's ratios need the log-probabilities")
    assert f"use {whole}," in line
    assert run_config(rollout={"top_p": 1.0, "top_k": 0}).ppo is not None


def test_a_null_that_is_no_default_survives_the_dump() -> None:
    config = run_config(value_clip_range=None)
    again = validate(parse_yaml(dump_config(config)), [])
    assert again == config
    assert again.ppo is not None
    assert again.ppo.value_clip_range is None
    assert "clip_range_high" not in dump_config(config)  # null by default: left out


def test_a_narrower_upper_clip_is_allowed() -> None:
    assert run_config(clip_range=0.2, clip_range_high=0.1).ppo is not None


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"dual_clip": 1.0}, "ppo.dual_clip=1.0: is out of range; use a number above 1.0"),
        ({"entropy_coef": -0.1}, "ppo.entropy_coef=-0.1: is out of range; use a number at least 0.0"),
        ({"early_stop_kl": 0}, "ppo.early_stop_kl=0: is out of range; use a number above 0.0"),
        ({"ptx": {"data": []}}, "ppo.ptx.data=[]: is too short; give at least 1"),
        ({"ptx": {}}, "ppo.ptx.data: is missing; add it"),
    ],
)
def test_values_out_of_range_are_one_line(change: dict[str, object], line: str) -> None:
    assert problem(**change) == line


def test_the_value_loss_weighs_by_the_critic_unless_a_weight_is_given() -> None:
    def weight(**ppo: object) -> float:
        config = run_config(**ppo).ppo
        assert config is not None
        return config.value_weight

    assert [weight(critic=critic) for critic in ("adapter", "model", "shared")] == [0.1, 0.1, 0.3]
    assert [weight(critic=critic, value_coef=0.4) for critic in ("adapter", "shared")] == [0.4, 0.4]
    assert weight(value_coef=0) == 0


def test_overlong_keys_that_would_do_nothing_are_refused() -> None:
    assert problem(overlong={"penalty": 2.0}) == (
        "ppo.overlong.penalty=2.0: no effect with buffer=0; set buffer to the tokens it grows over"
    )
    line = problem(overlong={"filter": True}, bootstrap_truncated=True)
    assert line.startswith("ppo.bootstrap_truncated=true: no effect with overlong.filter=true")
    assert run_config(overlong={"penalty": 2.0, "buffer": 4}).ppo is not None
