"""Our PPO against TRL 1.12's, the last that has one: the same numbers, and each difference shown.

Legend: B sequences, R padded response.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.core.bank import PolicyBank
from stages.core.ops import kl_estimate, masked_whiten
from stages.core.rewards import RewardModel
from stages.ppo.advantages import gae, token_rewards
from stages.ppo.control import ScoreShaper
from stages.ppo.experience import Experience, shaped_scores
from tests.parity.trl_cases import PEER, Run, base_models, case, common_name, our_steps, run_trl

pytestmark = pytest.mark.slow

K1, K3 = {"kl_estimator": "k1"}, {"kl_estimator": "k3"}
ENDS = {"stop_token": "eos", "missing_eos_penalty": 0.7}
CUT = {"response_length": 7}  # no stop token: all responses have this length
SAME: dict[str, tuple[str, dict[str, Any]]] = {
    f"{kind}, {ending}, {estimator['kl_estimator']}": (kind, options | estimator)
    for kind in ("lora-adapter", "lora-model", "full-model")
    for ending, options, estimator in (("ends", ENDS, K1), ("ends", ENDS, K3), ("cut", CUT, K1), ("cut", CUT, K3))
    if kind == "lora-adapter" or (ending == "cut") == (estimator is K3)
}
ALL_CUT = [name for name in SAME if "cut" in name]
ENDED = [name for name in SAME if "ends" in name]

ONCE = ENDS | {"num_ppo_epochs": 1}
HALVES = ONCE | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
TWO_STEPS = ONCE | {"num_mini_batches": 2}
DIFFERENT: dict[str, dict[str, Any]] = {
    "two microbatches": {"prompts": 16} | HALVES,
    "two minibatches": {"prompts": 16} | TWO_STEPS,
    "two minibatches of one microbatch": {"prompts": 16, "num_mini_batches": 2} | HALVES,
    "the last batch of the prompts": {"prompts": 8} | HALVES,
    "padding is the end token": {"pad_is_eos": True} | ONCE,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    if not PEER.is_dir():
        pytest.skip("run `make peers` first")
    folder: Path = tmp_path_factory.mktemp("trl")
    base_models(folder)
    cases = {name: case(folder, kind, **options) for name, (kind, options) in SAME.items()}
    cases |= {name: case(folder, "lora-adapter", **options) for name, options in DIFFERENT.items()}
    return run_trl(folder, cases)


@pytest.fixture
def run(runs: dict[str, Run], request: pytest.FixtureRequest) -> Run:
    return runs[request.param]


def of_case(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("run", names, indirect=True)


def assert_close(ours: Tensor, theirs: Tensor, mask: Tensor | None = None) -> None:
    """Equal to 1e-5, where `mask` is True; there is something to compare."""
    if mask is not None:
        ours, theirs = ours[mask], theirs[mask]
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def assert_same_steps(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]], part: str = "") -> None:
    """Equal gradients at every step, to 1e-4 of each parameter's largest, which is not 0 in the first."""
    assert len(ours) == len(theirs)
    for number, (step, their_step) in enumerate(zip(ours, theirs, strict=True)):
        expected = {common_name(name): grad for name, grad in their_step.items() if common_name(name).startswith(part)}
        assert step.keys() == expected.keys()
        for name, grad in expected.items():
            size = float(grad.abs().max())
            assert number > 0 or size > 1e-5, name
            torch.testing.assert_close(step[name], grad, rtol=0, atol=1e-4 * size, msg=lambda t, n=name: f"{n}: {t}")


def norm(step: dict[str, Tensor]) -> float:
    return float(torch.stack([grad.norm() for grad in step.values()]).norm())


def started(run: Run) -> tuple[PolicyBank, RewardModel, Experience]:
    """Our models and our experience of TRL's responses."""
    bank, reward = run.start()
    return bank, reward, run.experience(bank, reward)


def rewards(run: Run, experience: Experience, mask_BR: Tensor) -> Tensor:
    """Our rewards BR over the slots of `mask_BR`."""
    config = run.config
    score_B = shaped_scores(experience.score_B.tolist(), experience.responses, config, ScoreShaper(config.score))
    kl_BR = kl_estimate(experience.logprobs_BR, experience.ref_logprobs_BR, config.kl.estimator)
    return token_rewards(score_B, kl_BR, mask_BR, config.kl.coef)


def longer(run: Run, bank: PolicyBank, experience: Experience) -> Experience:
    """Our experience if an ended response were one slot longer, by our functions."""
    config, mask_BR = run.config, run.longer_mask_BR
    experience = run.longer(experience, bank)
    reward_BR = rewards(run, experience, mask_BR)
    advantages_BR, returns_BR = gae(
        reward_BR, experience.values_BR, mask_BR, gamma=config.gamma, gae_lambda=config.gae_lambda
    )
    return replace(experience, advantages_BR=masked_whiten(advantages_BR, run.mask_BR), returns_BR=returns_BR)


@of_case(*SAME)
def test_models_kl_and_scores_are_trls(run: Run) -> None:
    bank, _, experience = started(run)
    mask_BR, theirs = run.mask_BR, run.tensors
    with torch.no_grad():
        logprobs_M = bank.policy_logprobs(experience.responses.batch(range(len(mask_BR)), experience.mask_BR.device))
    assert_close(logprobs_M, theirs["logprobs"][mask_BR])
    assert_close(experience.ref_logprobs_BR, theirs["ref_logprobs"], mask_BR)
    assert_close(experience.values_BR, theirs["values"], mask_BR)
    kl_BR = kl_estimate(experience.logprobs_BR, experience.ref_logprobs_BR, run.config.kl.estimator)
    assert (theirs["logprobs"][~mask_BR] == 1).all()  # its mark of padding, which no sum of ours would survive
    assert_close(kl_BR, theirs["kl"])  # 0 in the padding, on both sides
    if run.config.kl.estimator == "k1":  # TRL logs the estimator of the reward; ours is k1 always
        assert float(experience.kl_B.mean()) == pytest.approx(run.metrics["objective/kl"], abs=1e-5)
    assert_close(
        shaped_scores(experience.score_B.tolist(), experience.responses, run.config, ScoreShaper(run.config.score)),
        theirs["scores"],
    )


@of_case(*ALL_CUT)
def test_without_end_tokens_an_update_is_trls(run: Run) -> None:
    """Rewards, advantages, returns, losses, and the gradients of three epochs, both clips at work in the later ones."""
    bank, _, experience = started(run)
    theirs = run.tensors
    assert_close(rewards(run, experience, run.mask_BR), theirs["rewards"])
    assert_close(experience.advantages_BR, theirs["advantages"])
    assert_close(experience.returns_BR, theirs["returns"])
    steps, figures = our_steps(bank, run, experience)
    assert_same_steps(steps, run.steps)
    assert figures["policy/loss"] == pytest.approx(float(theirs["pg_loss_stats"].mean()), abs=1e-5)
    assert figures["value/loss"] == pytest.approx(float(theirs["vf_loss_stats"].mean()), abs=1e-5)
    assert figures["policy/ratio_mean"] == pytest.approx(float(theirs["ratio_stats"].mean()), abs=1e-5)
    assert theirs["pg_clipfrac_stats"][1:].min() > 0.1
    assert theirs["vf_clipfrac_stats"][1:].max() > 0.01


@of_case(*ENDED)
def test_with_end_tokens_an_update_is_trls_one_slot_longer(run: Run) -> None:
    """TRL's value after the end token is one more state of the critic's, and takes the score; all else is the same."""
    bank, _, experience = started(run)
    mask_BR, theirs = run.mask_BR, run.tensors
    lengths_B = mask_BR.sum(1)
    assert len(set(lengths_B.tolist())) >= 2
    assert 2 <= sum(experience.responses.finished) < len(lengths_B)
    ours = longer(run, bank, experience)
    assert_close(ours.values_BR, theirs["values"])
    assert_close(rewards(run, ours, run.longer_mask_BR), theirs["rewards"])
    assert_close(ours.returns_BR, theirs["returns"], run.longer_mask_BR)
    assert_close(ours.advantages_BR, theirs["advantages"])
    steps, figures = our_steps(bank, run, replace(experience, advantages_BR=ours.advantages_BR), "policy")
    assert_same_steps(steps, run.steps, "policy")
    assert figures["policy/loss"] == pytest.approx(float(theirs["pg_loss_stats"].mean()), abs=1e-5)
    steps, figures = our_steps(bank, run, ours, "value")
    assert_same_steps(steps, run.steps, "value")
    assert figures["value/loss"] == pytest.approx(float(theirs["vf_loss_stats"].mean()), abs=1e-5)
    assert theirs["pg_clipfrac_stats"][1:].min() > 0.1


@of_case(*ENDED)
def test_the_slot_after_the_end_token_moves_the_advantages(run: Run) -> None:
    """At a response's last token TRL's advantage has gamma V + gamma lambda (score - V) for our score.

    V is the value after the end token. The difference reaches back, gamma lambda smaller with each token; it is none
    where gamma and lambda are 1 and for a response without room for the slot.
    """
    _, _, experience = started(run)
    gamma, both = run.config.gamma, run.config.gamma * run.config.gae_lambda
    reward_BR = rewards(run, experience, run.mask_BR)
    ours_BR, _ = gae(reward_BR, experience.values_BR, run.mask_BR, gamma=gamma, gae_lambda=run.config.gae_lambda)
    theirs_BR = run.tensors["returns"] - run.tensors["values"]  # before whitening
    expected_BR = torch.zeros_like(ours_BR)
    for row, length in enumerate(run.mask_BR.sum(1).tolist()):
        if length < ours_BR.shape[1]:
            value, score = run.tensors["values"][row, length], run.tensors["scores"][row]
            for place in range(length):
                expected_BR[row, place] = both ** (length - 1 - place) * (
                    gamma * value + both * (score - value) - score
                )
    assert expected_BR.abs().max() > 0.05
    assert_close((theirs_BR - ours_BR)[run.mask_BR], expected_BR[run.mask_BR])


@of_case(*ALL_CUT[-2:])
def test_trl_clips_no_gradient(run: Run) -> None:
    """`max_grad_norm` stands in its arguments; every step is far beyond it."""
    limit = run.case["args"]["max_grad_norm"]
    assert min(norm(step) for step in run.steps) > 100 * limit
    bank, _, experience = started(run)
    steps, figures = our_steps(bank, run, experience, max_grad_norm=limit)
    assert figures["grad_norm"] > 100 * limit
    assert norm(steps[0]) == pytest.approx(limit, rel=1e-3)


def halves(run: Run, part_tokens: str) -> list[list[int]]:
    """The rows of TRL's two microbatches, of different numbers of tokens."""
    rows = run.tensors["b_inds"].tolist()
    parts = [rows[:4], rows[4:]]
    tokens = [int(getattr(run, part_tokens)[part].sum()) for part in parts]
    assert tokens[0] != tokens[1]
    return parts


def of_rows(experience: Experience, rows: list[int]) -> Experience:
    """The experience with only these rows in the loss."""
    chosen_B1 = torch.tensor([row in rows for row in range(len(experience.score_B))])[:, None]
    return replace(experience, loss_mask_BR=experience.loss_mask_BR & chosen_B1)


@of_case("two microbatches", "two minibatches of one microbatch")
@pytest.mark.parametrize("part", ["policy", "value"])
def test_trl_takes_the_mean_of_microbatch_means(run: Run, part: str) -> None:
    """Tokens of a microbatch with few of them weigh more; ours weigh the same. It is one step, minibatches or not."""
    bank, _, experience = started(run)
    ours = longer(run, bank, experience)
    if part == "policy":
        ours = replace(experience, advantages_BR=ours.advantages_BR)
    parts = halves(run, "mask_BR" if part == "policy" else "longer_mask_BR")

    def gradient(chosen: Experience) -> dict[str, Tensor]:
        return our_steps(run.start()[0], run, chosen, part)[0][0]

    first, second = (gradient(of_rows(ours, rows)) for rows in parts)
    assert_same_steps([{name: (grad + second[name]) / 2 for name, grad in first.items()}], run.steps, part)
    whole = gradient(ours)
    theirs = {common_name(name): grad for name, grad in run.steps[0].items()}
    difference = norm({name: grad - theirs[name] for name, grad in whole.items()})
    assert difference > 0.01 * norm(whole)


@of_case("two minibatches")
def test_trl_steps_once_a_minibatch_only_without_accumulation(runs: dict[str, Run], run: Run) -> None:
    assert len(run.steps) == 2
    assert len(runs["two minibatches of one microbatch"].steps) == 1
    assert len(runs["two microbatches"].steps) == 1


@of_case("the last batch of the prompts")
def test_trl_steps_after_every_microbatch_of_the_last_batch(runs: dict[str, Run], run: Run) -> None:
    """Accelerate ends an accumulation where a data loader ends; each step then has half of its gradient."""
    bank, _, experience = started(run)
    ours = replace(experience, advantages_BR=longer(run, bank, experience).advantages_BR)
    assert len(run.steps) == 2
    first = our_steps(bank, run, of_rows(ours, halves(run, "mask_BR")[0]), "policy")[0][0]
    assert_same_steps([{name: grad / 2 for name, grad in first.items()}], run.steps[:1], "policy")


def test_trls_means_of_ratio_and_kl_count_padding_and_unused_places(runs: dict[str, Run]) -> None:
    """The padding has ratio 1 and KL 0; with minibatches under accumulation, half of the places are never filled."""
    run = runs["lora-adapter, ends, k1"]
    bank, _, experience = started(run)
    ours = replace(experience, advantages_BR=longer(run, bank, experience).advantages_BR)
    _, figures = our_steps(bank, run, ours, "policy")
    filled = float(run.mask_BR.float().mean())
    assert filled < 0.9
    assert figures["policy/ratio_mean"] * filled + 1 - filled == pytest.approx(run.metrics["val/ratio"], abs=1e-5)
    assert figures["policy/first_ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert runs["two microbatches"].metrics["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert runs["two minibatches of one microbatch"].metrics["val/ratio"] == pytest.approx(0.5, abs=1e-6)


@of_case("padding is the end token")
def test_trl_does_not_learn_to_end_where_padding_is_the_end_token(run: Run) -> None:
    """The end token is padding to it: in no policy loss, and the slot after the response, which carries the score."""
    tokens_BR, mask_BR = run.tensors["responses"], run.mask_BR
    end_BR = tokens_BR == 1
    assert end_BR.any()
    assert not (mask_BR & end_BR).any()
    for row in end_BR.any(1).nonzero()[:, 0].tolist():
        place = end_BR[row].tolist().index(True)
        assert mask_BR[row].sum() == place
        assert run.tensors["rewards"][row, place] == run.tensors["scores"][row]
