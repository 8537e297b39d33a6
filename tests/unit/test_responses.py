"""How sampled responses are cut into batches."""

from itertools import pairwise

import pytest
import torch

from data.encoded import EncodedPrompt
from data.rows import Prompt
from stages.core.responses import Responses
from stages.core.rollout.protocol import Completion

# Two responses to each of two prompts: 3 + 2, 3 + 2, 2 + 1 and 2 + 4 tokens.
PROMPTS = [[7, 8, 9], [7, 8, 9], [5, 6], [5, 6]]
LENGTHS = [2, 2, 1, 4]


def responses() -> Responses:
    prompts = [EncodedPrompt(tokens, Prompt("a prompt")) for tokens in PROMPTS]
    completions = [Completion((1,) * length, (-1.0,) * length, True) for length in LENGTHS]
    return Responses(prompts, completions, [""] * len(LENGTHS))


@pytest.mark.parametrize(
    ("budget", "groups"),
    [
        (100, [[0, 1, 2, 3]]),
        (10, [[0, 1, 2], [3]]),
        (7, [[0, 1], [2, 3]]),
        (6, [[0], [1], [2], [3]]),
        (1, [[0], [1], [2], [3]]),
    ],
)
def test_a_microbatch_counts_a_prompt_once(budget: int, groups: list[list[int]]) -> None:
    assert responses().microbatches(range(4), budget) == groups


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 1, 3]])
@pytest.mark.parametrize("budget", range(6, 15))
def test_a_microbatch_holds_what_its_batch_has_room_for(budget: int, order: list[int]) -> None:
    def tokens(rows: list[int]) -> int:
        return responses().batch(rows, torch.device("cpu")).packed.tokens_1N.shape[1]

    groups = responses().microbatches(order, budget)
    assert [row for rows in groups for row in rows] == order
    assert all(tokens(rows) <= budget for rows in groups)
    assert all(tokens([*rows, following[0]]) > budget for rows, following in pairwise(groups))


def test_the_shortest_row() -> None:
    """5, 5, 3 and 6 tokens."""
    assert responses().shortest(range(4)) == 2
    assert responses().shortest([3, 1]) == 1
