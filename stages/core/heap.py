"""What the C library keeps of memory that was freed."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache


def release_heap() -> None:
    """Hands freed memory back to the system where glibc keeps it; other libraries have no such call.

    A phase's tensors of odd sizes leave holes between those that stay. The next phase's do not fit into them, so
    that without this each phase's peak stands on what the others left.
    """
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
