"""Token rewards and generalised advantage estimation, against hand-worked numbers and the O(R^2) definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.ppo.advantages import gae, token_rewards

NAN = float("nan")
MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_token_rewards_put_the_score_on_the_last_response_token() -> None:
    kl_BR = torch.tensor([[0.5, -0.25, 1.0], [2.0, 0.0, 0.0]])
    rewards = token_rewards(torch.tensor([3.0, -1.0]), kl_BR, MASK, 0.1)
    # -0.1 * kl everywhere; + 3 at the third token of the first response, - 1 at the only token of the second
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.025, 2.9], [-1.2, 0.0, 0.0]]))


def test_summed_token_rewards_are_score_minus_weighted_kl() -> None:
    torch.manual_seed(0)
    mask_BR = torch.arange(9)[None, :] < torch.randint(1, 10, (20, 1))
    kl_BR, score_B = torch.randn(20, 9, dtype=torch.float64) * mask_BR, torch.randn(20, dtype=torch.float64)
    total_B = token_rewards(score_B, kl_BR, mask_BR, 0.37).sum(1)
    torch.testing.assert_close(total_B, score_B - 0.37 * kl_BR.sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("garbage", [NAN, math.inf, 7.0])
def test_garbage_in_padding_changes_nothing_bit_for_bit(garbage: float) -> None:
    torch.manual_seed(0)
    score_B, kl_BR, values_BR, after_B = torch.randn(2), torch.randn(2, 3), torch.randn(2, 3), torch.randn(2)
    options = {"gamma": 0.9, "gae_lambda": 0.8, "after_B": after_B}

    def chain(filler: float) -> tuple[Tensor, Tensor, Tensor]:
        reward_BR = token_rewards(score_B, torch.where(MASK, kl_BR, filler), MASK, 0.1)
        dirty_BR = torch.where(MASK, reward_BR, filler)
        return reward_BR, *gae(dirty_BR, torch.where(MASK, values_BR, filler), MASK, **options)

    for dirty, clean in zip(chain(garbage), chain(0.0), strict=True):
        assert torch.equal(dirty, clean)
        assert torch.equal(dirty[~MASK], torch.zeros(2))


def test_a_response_without_tokens_gets_no_reward_and_no_advantage() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    rewards = token_rewards(torch.tensor([3.0, -1.0]), torch.full((2, 3), NAN), nothing, 0.1)
    assert torch.equal(rewards, torch.zeros(2, 3))
    for after_B in (None, torch.tensor([2.0, NAN])):
        for result in gae(rewards, torch.full((2, 3), NAN), nothing, gamma=1.0, gae_lambda=0.95, after_B=after_B):
            assert torch.equal(result, torch.zeros(2, 3))


def test_gae_by_hand() -> None:
    # gamma = lambda = 1/2. Response 1: r = 1, 2, 4; V = 2, 4, 8.
    #   delta_3 = 4 + 0 - 8 = -4;        A_3 = -4
    #   delta_2 = 2 + 8/2 - 4 = 2;       A_2 = 2 - 4/4 = 1
    #   delta_1 = 1 + 4/2 - 2 = 1;       A_1 = 1 + 1/4 = 1.25
    # Response 2: r = 3, V = 1: A = 2. Returns are A + V.
    reward_BR, values_BR = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0, 0]]), torch.tensor([[2.0, 4.0, 8.0], [1.0, 0, 0]])
    advantages, returns = gae(reward_BR, values_BR, MASK, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[1.25, 1.0, -4.0], [2.0, 0.0, 0.0]]
    assert returns.tolist() == [[3.25, 5.0, 4.0], [3.0, 0.0, 0.0]]


def test_gae_bootstraps_from_the_value_after_a_response_that_was_cut_off() -> None:
    # The numbers of above, but response 1 goes on with value 16 and response 2 with value 6; gamma = lambda = 1/2.
    #   delta_3 = 4 + 16/2 - 8 = 4;      A_3 = 4
    #   delta_2 = 2 + 8/2 - 4 = 2;       A_2 = 2 + 4/4 = 3
    #   delta_1 = 1 + 4/2 - 2 = 1;       A_1 = 1 + 3/4 = 1.75
    # Response 2: A = 3 + 6/2 - 1 = 5.
    reward_BR, values_BR = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0, 0]]), torch.tensor([[2.0, 4.0, 8.0], [1.0, 0, 0]])
    after_B = torch.tensor([16.0, 6.0])
    advantages, returns = gae(reward_BR, values_BR, MASK, gamma=0.5, gae_lambda=0.5, after_B=after_B)
    assert advantages.tolist() == [[1.75, 3.0, 4.0], [5.0, 0.0, 0.0]]
    assert returns.tolist() == [[3.75, 7.0, 12.0], [6.0, 0.0, 0.0]]
    # One of the two ended by itself: it is as without a bootstrap.
    advantages, _ = gae(reward_BR, values_BR, MASK, gamma=0.5, gae_lambda=0.5, after_B=torch.tensor([16.0, 0.0]))
    assert advantages.tolist() == [[1.75, 3.0, 4.0], [2.0, 0.0, 0.0]]


def test_a_bootstrap_of_zero_is_none_bit_for_bit() -> None:
    torch.manual_seed(0)
    reward_BR, values_BR = torch.randn(2, 3), torch.randn(2, 3)
    options = {"gamma": 0.9, "gae_lambda": 0.8}
    for ours, theirs in zip(
        gae(reward_BR, values_BR, MASK, **options, after_B=torch.zeros(2)),
        gae(reward_BR, values_BR, MASK, **options),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def advantage_by_definition(
    rewards: list[float], values: list[float], end: float, gamma: float, gae_lambda: float
) -> list[float]:
    """sum over l of (gamma * lambda)^l * delta_{t+l}, each term by itself; `end` is the value after the last token."""
    after = [*values[1:], end]
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, after, strict=True)]
    return [
        math.fsum((gamma * gae_lambda) ** (later - t) * deltas[later] for later in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


@settings(max_examples=1000, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    gamma=st.floats(0.05, 1),
    gae_lambda=st.floats(0, 1),
    bootstrap=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_gae_equals_its_definition(
    lengths: list[int], gamma: float, gae_lambda: float, bootstrap: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    mask_BR = torch.arange(shape[1])[None, :] < torch.tensor(lengths)[:, None]
    reward_BR, values_BR = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    after_B = torch.randn(len(lengths), generator=generator, dtype=torch.float64) * bootstrap
    options = {"gamma": gamma, "gae_lambda": gae_lambda}
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        end_B = after_B.to(dtype) if bootstrap else None
        advantages, returns = gae(reward_BR.to(dtype), values_BR.to(dtype), mask_BR, **options, after_B=end_B)
        for row, length in enumerate(lengths):
            rewards, values = reward_BR[row, :length].tolist(), values_BR[row, :length].tolist()
            expected = advantage_by_definition(rewards, values, after_B[row].item(), gamma, gae_lambda)
            assert advantages[row, :length].tolist() == pytest.approx(expected, rel=tolerance, abs=10 * tolerance)
            totals = [a + v for a, v in zip(expected, values, strict=True)]
            assert returns[row, :length].tolist() == pytest.approx(totals, rel=tolerance, abs=10 * tolerance)


def test_lambda_one_is_monte_carlo_minus_value_and_lambda_zero_is_the_td_error() -> None:
    torch.manual_seed(0)
    reward_BR, values_BR = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    mask_BR = torch.ones(3, 6, dtype=torch.bool)
    advantages, returns = gae(reward_BR, values_BR, mask_BR, gamma=1.0, gae_lambda=1.0)
    to_go_BR = reward_BR.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, to_go_BR, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(advantages, to_go_BR - values_BR, rtol=1e-12, atol=1e-12)

    advantages, _ = gae(reward_BR, values_BR, mask_BR, gamma=0.9, gae_lambda=0.0)
    next_BR = torch.cat([values_BR[:, 1:], torch.zeros(3, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(advantages, reward_BR + 0.9 * next_BR - values_BR, rtol=1e-12, atol=1e-12)
