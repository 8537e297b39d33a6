"""The ranks of a run: this process among those that carry out the same request. The one door to torch.distributed.

Every rank computes the same program on its share of the rows. Rank 0 alone decides and writes; the others follow what
it says. One process by itself is rank 0 of 1: there every function here returns what it was given.
"""

import datetime
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import SharedUserError, UserError

DEFAULT_TIMEOUT_SECONDS = 1800.0  # a rank may compute this long while the others wait for it

BEAT_SECONDS = 20.0
_WORKING = "working"

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is; `local_rank` counts those on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    @property
    def are_many(self) -> bool:
        """Whether there is anybody to talk to."""
        return self.world_size > 1


_current = Ranks()
_object_group: Any = None  # None: the default group


def join(*, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Ranks:
    """This process's place, from RANK, WORLD_SIZE and LOCAL_RANK, once it has met the others.

    They meet at MASTER_ADDR:MASTER_PORT. Without these variables, or in a world of one, there is no group. With GPUs
    each local rank takes its own; small objects travel over gloo beside NCCL.
    """
    global _current, _object_group
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or dist.is_initialized():
        return _current
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl", rank=rank, world_size=world_size, timeout=timeout)
        _object_group = dist.new_group(backend="gloo", timeout=timeout)
    else:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timeout)
    _current = Ranks(rank, world_size, local_rank)
    return _current


def require_group() -> None:
    """Makes a group of this process alone where there is none: DeepSpeed works in no other way."""
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def current() -> Ranks:
    """This process's place; rank 0 of 1 before `join` and after `leave`."""
    return _current


def leave() -> None:
    """Takes the group down; the others need not take part."""
    global _current, _object_group
    if dist.is_initialized():
        dist.destroy_process_group()
    _current, _object_group = Ranks(), None


def barrier() -> None:
    """Returns once every rank is here."""
    if _current.are_many:
        dist.barrier(group=_object_group)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor of this shape, in place and the same bits everywhere."""
    if _current.are_many:
        dist.all_reduce(tensor)
    return tensor


def gather_lists(own: Sequence[ItemT]) -> list[ItemT]:
    """Every rank's items in the order of the ranks, on every rank."""
    if not _current.are_many:
        return list(own)
    parts: list[Any] = [None] * _current.world_size
    dist.all_gather_object(parts, list(own), group=_object_group)
    return [item for part in parts for item in part]


def from_main(value: ItemT) -> ItemT:
    """Rank 0's value, on every rank; what the others give is not looked at."""
    if not _current.are_many:
        return value
    box: list[Any] = [value if _current.is_main else None]
    dist.broadcast_object_list(box, src=0, group=_object_group)
    return box[0]


def on_main(function: Callable[[], ItemT], *errors: type[Exception]) -> ItemT:
    """What `function` gives on rank 0, on every rank.

    Where it raises a UserError, all raise the same SharedUserError; where it raises one of `errors`, all raise that.
    """
    if not _current.are_many:
        return function()
    result: Any = None
    failure: Exception | None = None
    if _current.is_main:
        try:
            result = function()
        except (UserError, *errors) as error:
            failure = error
    result, failure = from_main((result, failure))
    if isinstance(failure, UserError):
        raise SharedUserError(*failure.problems)
    if failure is not None:
        raise failure
    return result


def alone(function: Callable[[], ItemT], *errors: type[Exception]) -> ItemT:
    """What `function` gives on rank 0, which counts as rank 0 of 1 meanwhile; the others wait, however long it takes.

    Errors go to all as with `on_main`.
    """
    global _current
    here = _current
    if not here.are_many:
        return function()
    if not here.is_main:
        while from_main(_WORKING) == _WORKING:
            pass
        return on_main(function, *errors)
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(ended,), daemon=True)
    beats.start()
    result: Any = None
    failure: Exception | None = None
    try:
        _current = Ranks()
        result = function()
    except (UserError, *errors) as error:
        failure = error
    finally:
        _current = here
        ended.set()
        beats.join()
    from_main("ended")

    def outcome() -> ItemT:
        if failure is not None:
            raise failure
        return result

    return on_main(outcome, *errors)


def _beat(ended: threading.Event) -> None:
    """Tells the waiting ranks that there is work, again and again: a single broadcast would run into its time-out."""
    while not ended.wait(BEAT_SECONDS):
        dist.broadcast_object_list([_WORKING], src=0, group=_object_group)


def share(items: Sequence[ItemT]) -> Sequence[ItemT]:
    """This rank's part of `items`: consecutive ones, and the parts differ by one item at most; may be empty."""
    ranks, count = _current, len(items)
    return items[count * ranks.rank // ranks.world_size : count * (ranks.rank + 1) // ranks.world_size]


def balanced_share(items: Sequence[ItemT], sizes: Sequence[int]) -> list[ItemT]:
    """This rank's part of `items` in their order, parts of about equal sums of `sizes`; may be empty."""
    owners = balanced_owners(sizes, _current.world_size)
    return [item for item, owner in zip(items, owners, strict=True) if owner == _current.rank]


def balanced_owners(sizes: Sequence[int], count: int) -> list[int]:
    """Which of `count` owners has each: the largest go first, each to the one that has least."""
    loads, owners = [0] * count, [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        owners[place] = loads.index(min(loads))
        loads[owners[place]] += sizes[place]
    return owners


def any_rank(flag: bool) -> bool:
    """Whether it is True on any rank; to be asked by all of them."""
    return any(gather_lists([flag]))


def check_together(problems: Sequence[str]) -> None:
    """Raises the same SharedUserError on every rank where any has a problem; to be called by all of them."""
    if found := list(dict.fromkeys(gather_lists(problems))):
        raise SharedUserError(*found)
