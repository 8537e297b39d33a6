"""Advantages without a critic: GRPO, RLOO and REINFORCE++ against numbers worked out by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stages.ppo.advantages import grpo, reinforce_plus_plus, rloo

ROOT2 = math.sqrt(2)
EPSILON = 1e-4
Estimator = Callable[[Tensor, Tensor], Tensor]
GROUPED: dict[str, Callable[[int], Estimator]] = {
    "grpo": lambda samples: lambda reward_BR, mask_BR: grpo(reward_BR, mask_BR, samples),
    "rloo": lambda samples: lambda reward_BR, mask_BR: rloo(reward_BR, mask_BR, samples),
}
ALL = GROUPED | {"reinforce++": lambda samples: lambda reward_BR, mask_BR: reinforce_plus_plus(reward_BR, mask_BR, 0.9)}


def last(*rewards: float) -> tuple[Tensor, Tensor]:
    """Responses of 1, 2, 1, 2, ... tokens that earn what they earn at their last; and their mask."""
    lengths = [1 + row % 2 for row in range(len(rewards))]
    mask_BR = torch.arange(2)[None, :] < torch.tensor(lengths)[:, None]
    reward_BR = torch.zeros(len(rewards), 2)
    for row, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
        reward_BR[row, length - 1] = reward
    return reward_BR, mask_BR


def spread(*advantages: float) -> Tensor:
    """An advantage on every token of the responses of `last`."""
    _, mask_BR = last(*advantages)
    return torch.tensor(advantages)[:, None] * mask_BR


def test_grpo_by_hand() -> None:
    # Two samples a prompt: 3 and 1, mean 2, deviation sqrt((1 + 1) / 1); -1 and 4, mean 1.5, deviation 5 / sqrt(2).
    high, wide = 1 / (ROOT2 + EPSILON), 2.5 / (5 / ROOT2 + EPSILON)
    torch.testing.assert_close(grpo(*last(3.0, 1.0, -1.0, 4.0), 2), spread(high, -high, -wide, wide))
    # Three: 1, 2, 6 has mean 3 and deviation sqrt((4 + 1 + 9) / 2); 0, 0, 3 has mean 1 and deviation sqrt(3).
    seven, three = math.sqrt(7) + EPSILON, math.sqrt(3) + EPSILON
    expected = spread(-2 / seven, -1 / seven, 3 / seven, -1 / three, -1 / three, 2 / three)
    torch.testing.assert_close(grpo(*last(1.0, 2.0, 6.0, 0.0, 0.0, 3.0), 3), expected)


def test_rloo_by_hand() -> None:
    # Two samples a prompt: each minus the other.
    assert torch.equal(rloo(*last(3.0, 1.0, -1.0, 4.0), 2), spread(2.0, -2.0, -5.0, 5.0))
    # Three: 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2; 0 - (0 + 3) / 2 twice, 3 - 0.
    expected = spread(-3.0, -1.5, 4.5, -1.5, -1.5, 3.0)
    assert torch.equal(rloo(*last(1.0, 2.0, 6.0, 0.0, 0.0, 3.0), 3), expected)


@pytest.mark.parametrize("name", GROUPED)
def test_the_reward_of_a_response_is_the_sum_over_its_tokens(name: str) -> None:
    """Score minus weighted KL, wherever in the response it arose."""
    mask_BR = torch.tensor([[True, True, True], [True, True, False]])
    apart_BR = torch.tensor([[-0.25, 0.5, 2.75], [-1.5, 2.5, 0.0]])  # sums 3 and 1
    together_BR = torch.tensor([[0.0, 0.0, 3.0], [0.0, 1.0, 0.0]])
    advantages_BR = GROUPED[name](2)(apart_BR, mask_BR)
    assert torch.equal(advantages_BR, GROUPED[name](2)(together_BR, mask_BR))
    assert torch.equal(advantages_BR[0], advantages_BR[0, :1].expand(3))
    assert advantages_BR[0, 0] == -advantages_BR[1, 0] > 0


def test_reinforce_plus_plus_by_hand() -> None:
    # gamma = 1/2. Rewards 1, 2, 4: to go from the end 4, 2 + 4/2 = 4, 1 + 4/2 = 3. Reward 5: 5.
    # All four: 3, 4, 4, 5; mean 4, variance (1 + 0 + 0 + 1) / (4 - 1).
    reward_BR = torch.tensor([[1.0, 2.0, 4.0], [5.0, 0.0, 0.0]])
    mask_BR = torch.tensor([[True, True, True], [True, False, False]])
    side = math.sqrt(1.5)
    expected = torch.tensor([[-side, 0.0, 0.0], [side, 0.0, 0.0]])
    torch.testing.assert_close(reinforce_plus_plus(reward_BR, mask_BR, 0.5), expected)
    # gamma = 1: 7, 6, 4 and 5; mean 5.5, variance (2.25 + 0.25 + 2.25 + 0.25) / 3 = 5/3.
    expected = torch.tensor([[1.5, 0.5, -1.5], [-0.5, 0.0, 0.0]]) * math.sqrt(3 / 5)
    torch.testing.assert_close(reinforce_plus_plus(reward_BR, mask_BR, 1.0), expected)


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("name", GROUPED)
def test_equal_rewards_give_no_advantage_at_all(name: str, samples: int) -> None:
    # The float32 mean of three equal rewards need not be that reward, and a rounding error over its own deviation is
    # no small advantage.
    for reward in (0.7, -0.1, 1e6 + 0.1):
        assert not bool(
            GROUPED[name](samples)(
                *last(*[reward] * 2 * samples),
            ).any()
        )


def test_equal_rewards_to_go_give_no_advantage_over_the_batch() -> None:
    assert not bool(reinforce_plus_plus(torch.full((4, 1), 0.7), torch.ones(4, 1, dtype=torch.bool), 1.0).any())


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("name", GROUPED)
def test_other_prompts_samples_and_their_order_matter_not_at_all(name: str, samples: int) -> None:
    torch.manual_seed(0)
    prompts, longest = 5, 7
    reward_BR = torch.randn(prompts * samples, longest)
    mask_BR = torch.arange(longest)[None, :] < torch.randint(1, longest + 1, (prompts * samples, 1))
    estimate = GROUPED[name](samples)
    whole_BR = estimate(reward_BR, mask_BR)
    for prompt in range(prompts):
        own = slice(prompt * samples, (prompt + 1) * samples)
        assert torch.equal(estimate(reward_BR[own], mask_BR[own]), whole_BR[own])
    order = torch.tensor([[prompt * samples + sample for sample in range(samples)] for prompt in (3, 0, 4, 2, 1)])
    rows = order.flatten()
    assert torch.equal(estimate(reward_BR[rows], mask_BR[rows]), whole_BR[rows])
    within = order.flip(1).flatten()
    torch.testing.assert_close(estimate(reward_BR[within], mask_BR[within]), whole_BR[within], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e30])
@pytest.mark.parametrize("name", ALL)
def test_tokens_that_do_not_train_change_nothing_bit_for_bit(name: str, garbage: float) -> None:
    """Padding, and a whole response that is filtered out (the second)."""
    torch.manual_seed(0)
    reward_BR = torch.randn(6, 4)
    mask_BR = torch.arange(4)[None, :] < torch.tensor([[4], [0], [2], [1], [3], [4]])
    clean_BR = ALL[name](3)(torch.where(mask_BR, reward_BR, 0.0), mask_BR)
    assert torch.equal(ALL[name](3)(torch.where(mask_BR, reward_BR, garbage), mask_BR), clean_BR)
    assert not bool(clean_BR[~mask_BR].any())
    assert bool(clean_BR[mask_BR].all())


@pytest.mark.parametrize("name", GROUPED)
def test_a_filtered_response_is_out_of_its_groups_statistics(name: str) -> None:
    reward_BR, mask_BR = last(1.0, 2.0, 6.0, 0.0, 0.0, 3.0)
    mask_BR[1] = False
    left = torch.tensor([0, 2])
    pair_BR = GROUPED[name](2)(reward_BR[left], mask_BR[left])
    advantages_BR = GROUPED[name](3)(reward_BR, mask_BR)
    assert torch.equal(advantages_BR[left], pair_BR)
    assert torch.equal(advantages_BR[1], torch.zeros(2))
    # What is left alone has nothing to be compared with, and a group of nothing is nothing.
    mask_BR[0] = False
    mask_BR[3:] = False
    assert torch.equal(GROUPED[name](3)(reward_BR, mask_BR), torch.zeros(6, 2))


def test_a_filtered_response_is_out_of_the_batchs_statistics() -> None:
    reward_BR, mask_BR = torch.tensor([[1.0], [100.0], [3.0]]), torch.tensor([[True], [False], [True]])
    advantages_BR = reinforce_plus_plus(reward_BR, mask_BR, 1.0)
    torch.testing.assert_close(advantages_BR, torch.tensor([[-1 / ROOT2], [0.0], [1 / ROOT2]]))
