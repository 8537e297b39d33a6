"""The order that rows are taken in: no state but a count, so that a resumed run goes on where it was."""

from collections.abc import Sequence
from typing import TypeVar

import torch

from stages.core.rollout.protocol import rollout_seed

RowT = TypeVar("RowT")


def rows_after(rows: Sequence[RowT], cursor: int, count: int, *, seed: int, purpose: str) -> list[RowT]:
    """The `count` rows after the first `cursor`: each once an epoch, in an order of seed, purpose and epoch alone."""
    orders: dict[int, list[int]] = {}
    chosen: list[RowT] = []
    for place in range(cursor, cursor + count):
        epoch, offset = divmod(place, len(rows))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(rollout_seed(seed, purpose, epoch, 0, 0))
            orders[epoch] = torch.randperm(len(rows), generator=generator).tolist()
        chosen.append(rows[orders[epoch][offset]])
    return chosen
