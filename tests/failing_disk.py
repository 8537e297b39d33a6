"""A disk that fails at a chosen operation: the k-th open for writing, write to it, fsync or rename."""

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch


class _Disk:
    """Counts operations and fails the one numbered `failing`; None fails none."""

    def __init__(self, failing: int | None, error: int) -> None:
        self.operations = 0
        self.failing = failing
        self.error = error

    def touch(self, path: object) -> None:
        place, self.operations = self.operations, self.operations + 1
        if place == self.failing:
            raise OSError(self.error, os.strerror(self.error), str(path))

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            self.touch(args[0] if args else None)
            return function(*args, **kwargs)

        return checked

    def opening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`open` whose files for writing fail when they are opened and when they are written to."""

        def checked(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+"):
                return function(file, mode, *args, **kwargs)
            self.touch(file)
            handle = function(file, mode, *args, **kwargs)
            raw_write = handle.write

            def write(content: Any) -> int:
                self.touch(file)
                return raw_write(content)

            if isinstance(handle, io.TextIOWrapper | io.BufferedWriter):
                handle.write = write
            return handle

        return checked


@contextmanager
def _disk(failing: int | None, error: int) -> Iterator[_Disk]:
    disk = _Disk(failing, error)
    with (
        patch.object(os, "fsync", disk.before(os.fsync)),
        patch.object(os, "rename", disk.before(os.rename)),
        patch.object(os, "replace", disk.before(os.replace)),
        patch.object(io, "open", disk.opening(io.open)),
        patch.object(builtins, "open", disk.opening(builtins.open)),
        patch.object(Path, "open", _path_open(disk)),
    ):
        yield disk


def _path_open(disk: _Disk) -> Callable[..., Any]:
    opening = disk.opening(io.open)
    return lambda path, mode="r", *args, **kwargs: opening(path, mode, *args, **kwargs)


def count_operations(action: Callable[[], object]) -> int:
    """How many operations that can fail `action` takes."""
    with _disk(None, errno.ENOSPC) as disk:
        action()
    return disk.operations


@contextmanager
def failing_at(k: int, error: int = errno.ENOSPC) -> Iterator[None]:
    """Inside, the k-th operation (from 0) raises OSError; those after it succeed."""
    with _disk(k, error):
        yield
