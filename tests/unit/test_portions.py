"""How rows that share prompts divide over ranks; how they divide into passes stands in test_responses.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.core import ranks
from stages.core.portions import Row, number_prompts, share_rows, tokens_of

ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), min_size=1, max_size=24)


def rows_of(*own: tuple[str, int], prompt: int = 10) -> list[Row]:
    """Rows by the name of their prompt and their own tokens."""
    return [Row(ord(name), prompt, tokens) for name, tokens in own]


def parts_of(rows: list[Row], world_size: int) -> list[list[int]]:
    """What each rank takes."""
    with pytest.MonkeyPatch.context() as patch:
        parts: list[list[int]] = []
        for rank in range(world_size):
            patch.setattr(ranks, "_current", ranks.Ranks(rank, world_size, rank))
            parts.append(share_rows(rows))
    return parts


def test_a_prompts_samples_stay_together_where_that_evens_out() -> None:
    """24 and 16. By size alone the middle two would go to one rank, and both ranks would read both prompts: 30 each."""
    assert parts_of(rows_of(("a", 9), ("a", 5), ("b", 5), ("b", 1)), 2) == [[0, 1], [2, 3]]


def test_one_prompt_of_three_is_torn_where_whole_ones_would_not_be_even() -> None:
    """Whole: 60 and 30; torn in the middle: 10 + 20 + 10 + 10 on each."""
    rows = rows_of(*((name, 5) for name in "aaaabbbbcccc"))
    assert parts_of(rows, 2) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_one_prompt_alone_is_cut() -> None:
    assert parts_of(rows_of(*[("a", 5)] * 5), 2) == [[0, 1, 2], [3, 4]]


def test_rows_of_their_own_prompts_go_by_size() -> None:
    """30 to the first, 28 to the second, 11 to the second, 11 to the first: 41 and 39. As they stand: 30 and 50."""
    assert parts_of(rows_of(("a", 20), ("b", 18), ("c", 1), ("d", 1)), 2) == [[0, 3], [1, 2]]


def test_fewer_rows_than_ranks_leave_some_without() -> None:
    assert sorted(map(len, parts_of(rows_of(("a", 5), ("b", 5)), 3))) == [0, 1, 1]


def test_prompts_are_known_by_their_tokens() -> None:
    rows = number_prompts([([1, 2], 5), ([1], 4), ([1, 2], 3), ([2, 1], 6), ([], 2)])
    assert rows == [Row(0, 2, 5), Row(1, 1, 4), Row(0, 2, 3), Row(2, 2, 6), Row(3, 0, 2)]
    assert tokens_of(rows) == 20 + 2 + 1 + 2


def test_a_process_alone_has_everything() -> None:
    assert share_rows(rows_of(("a", 9), ("b", 1), ("a", 9))) == [0, 1, 2]


@given(ROWS, st.integers(2, 4))
def test_every_row_has_one_rank_and_no_rank_has_much_more_than_its_share(
    drawn: list[tuple[int, int]], world_size: int
) -> None:
    """Of the rows cut as they stand, the largest part is at most an even share, a prompt anew and a row too much."""
    rows = [Row(prompt, 7, own) for prompt, own in sorted(drawn)]
    parts = parts_of(rows, world_size)
    assert sorted(place for part in parts for place in part) == list(range(len(rows)))
    assert all(part == sorted(part) for part in parts)
    largest = max(tokens_of([rows[place] for place in part]) for part in parts)
    assert largest <= tokens_of(rows) / world_size + 7 + max(7 + row.own_tokens for row in rows)
