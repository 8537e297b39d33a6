"""How rows divide into passes and over ranks, where several begin with one prompt: a pass reads that prompt once."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from stages.core import ranks


class Row(NamedTuple):
    """A sequence of tokens, as what it takes to read it."""

    prompt: int  # the same number, the same prompt
    prompt_tokens: int
    own_tokens: int  # behind the prompt


def number_prompts(rows: Iterable[tuple[Sequence[int], int]]) -> list[Row]:
    """Rows of prompts and how many tokens stand behind each."""
    numbers: dict[tuple[int, ...], int] = {}
    return [Row(numbers.setdefault(tuple(prompt), len(numbers)), len(prompt), own) for prompt, own in rows]


def tokens_of(rows: Sequence[Row]) -> int:
    """What one pass over the rows takes."""
    return sum(row.own_tokens for row in rows) + sum({row.prompt: row.prompt_tokens for row in rows}.values())


def split_rows(rows: Sequence[Row], max_tokens: int) -> list[list[int]]:
    """Places of the rows in consecutive groups that take at most `max_tokens` tokens (a larger row stands alone)."""
    groups: list[list[int]] = []
    held: set[int] = set()
    used = 0
    for place, row in enumerate(rows):
        more = row.own_tokens if row.prompt in held else row.prompt_tokens + row.own_tokens
        if not groups or used + more > max_tokens:
            groups.append([])
            held, used, more = set(), 0, row.prompt_tokens + row.own_tokens
        groups[-1].append(place)
        held.add(row.prompt)
        used += more
    return groups


def share_rows(rows: Sequence[Row]) -> list[int]:
    """Places of this rank's part of the rows, in their order, such that the largest part is small; may be empty.

    Whole prompts go to the ranks where that evens out, else the rows are cut as they stand: few prompts are torn.
    """
    here = ranks.current()
    if not here.are_many:
        return list(range(len(rows)))
    divisions = _by_prompt(rows, here.world_size), _consecutive(rows, here.world_size)
    return min(divisions, key=lambda parts: _largest(rows, parts))[here.rank]


def _largest(rows: Sequence[Row], parts: Sequence[Sequence[int]]) -> int:
    return max(tokens_of([rows[place] for place in part]) for part in parts)


def _by_prompt(rows: Sequence[Row], parts: int) -> list[list[int]]:
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.prompt, []).append(place)
    sizes = [tokens_of([rows[place] for place in own]) for own in places.values()]
    owners = ranks.balanced_owners(sizes, parts)
    pairs = list(zip(places.values(), owners, strict=True))
    return [sorted(place for own, owner in pairs if owner == part for place in own) for part in range(parts)]


def _consecutive(rows: Sequence[Row], parts: int) -> list[list[int]]:
    """The groups of `split_rows` for the lowest bound that makes no more of them than there are parts."""
    low, high = 0, tokens_of(rows)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(split_rows(rows, middle)) <= parts else (middle + 1, high)
    groups = split_rows(rows, low)
    return groups + [[] for _ in range(parts - len(groups))]
