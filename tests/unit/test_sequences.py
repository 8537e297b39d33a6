"""Packing of sequences, the one-position shift, and splitting by a token budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.core.sequences import PackedBatch, ResponseBatch, split_by_budget

CPU = torch.device("cpu")


def test_sequences_stand_one_after_the_other_with_their_own_positions() -> None:
    batch = PackedBatch.of([[7, 8, 9], [4], [5, 6]], CPU)
    assert batch.tokens_1N.tolist() == [[7, 8, 9, 4, 5, 6]]
    assert batch.position_ids_1N.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.last_B.tolist() == [2, 3, 5]


def test_the_shift_of_the_worked_example() -> None:
    batch = ResponseBatch.of([[7, 8], [9]], [[1, 2], [3]], CPU)
    assert batch.packed.tokens_1N.tolist() == [[7, 8, 1, 2, 9, 3]]
    assert batch.before_M.tolist() == [1, 2, 4]
    assert batch.targets_M.tolist() == [1, 2, 3]
    assert batch.lengths == (2, 1)


def test_a_second_response_to_a_prompt_borrows_it() -> None:
    batch = ResponseBatch.of([[7, 8], [9], [7, 8]], [[1, 2], [3], [5, 6]], CPU)
    assert batch.packed.tokens_1N.tolist() == [[7, 8, 1, 2, 9, 3, 5, 6]]
    assert batch.packed.position_ids_1N.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.before_M.tolist() == [1, 2, 4, 1, 6]
    assert batch.targets_M.tolist() == [1, 2, 3, 5, 6]
    assert batch.packed.last_B.tolist() == [3, 5, 7]
    apart = ResponseBatch.of([[7, 8], [9], [7, 8]], [[1, 2], [3], [5, 6]], CPU, share_prompts=False)
    assert apart.packed.tokens_1N.tolist() == [[7, 8, 1, 2, 9, 3, 7, 8, 5, 6]]
    assert apart.before_M.tolist() == [1, 2, 4, 7, 8]


def test_a_sequence_that_is_nothing_but_a_prompt_ends_where_the_prompt_does() -> None:
    batch = PackedBatch.of([[7, 8, 1], [7, 8]], CPU, prompts=[2, 2])
    assert batch.tokens_1N.tolist() == [[7, 8, 1]]
    assert batch.last_B.tolist() == [2, 1]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6))
def test_each_target_is_the_token_behind_its_position(sizes: list[tuple[int, int]]) -> None:
    count = iter(range(1000))
    prompts = [[next(count) for _ in range(prompt)] for prompt, _ in sizes]
    responses = [[next(count) for _ in range(response)] for _, response in sizes]
    batch = ResponseBatch.of(prompts, responses, CPU)
    assert torch.equal(batch.packed.tokens_1N[0, batch.before_M + 1], batch.targets_M)
    assert batch.targets_M.tolist() == [token for response in responses for token in response]
    # The position that predicts a response's first token is its own prompt's last.
    firsts = batch.before_M[torch.tensor([0, *batch.lengths[:-1]]).cumsum(0)]
    assert batch.packed.tokens_1N[0, firsts].tolist() == [prompt[-1] for prompt in prompts]


@pytest.mark.parametrize(
    ("sizes", "budget", "groups"),
    [
        ([3, 3, 3], 6, [[0, 1], [2]]),
        ([3, 3, 3], 9, [[0, 1, 2]]),
        ([7, 1, 9, 1, 1], 8, [[0, 1], [2], [3, 4]]),  # 9 is over the budget and stands alone
        ([5], 1, [[0]]),
        ([], 4, []),
    ],
)
def test_split_by_budget(sizes: list[int], budget: int, groups: list[list[int]]) -> None:
    assert split_by_budget(sizes, budget) == groups


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_split_by_budget_keeps_order_and_budget(sizes: list[int], budget: int) -> None:
    groups = split_by_budget(sizes, budget)
    assert [row for group in groups for row in group] == list(range(len(sizes)))
    for group in groups:
        assert len(group) == 1 or sum(sizes[row] for row in group) <= budget
