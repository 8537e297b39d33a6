"""Freed memory goes back to the system, though tensors that stay lie between."""

import platform
from pathlib import Path

import pytest
import torch

from stages.core import heap

PAGE = 4096


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed and can be asked for it")
def test_holes_between_tensors_that_stay_are_handed_back() -> None:
    tensors = [torch.ones(16_000) for _ in range(2_000)]  # 64 KB each: too small for a mapping of their own
    kept = tensors[::50]
    del tensors
    full = resident_bytes()
    heap.release_heap()
    assert full - resident_bytes() > 100e6
    assert all(bool((each == 1).all()) for each in kept)


def test_a_library_without_such_a_call_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_into: list[object] = []
    monkeypatch.setattr(heap.sys, "platform", "linux")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: looked_into.append(name) or object())
    monkeypatch.setattr(heap, "_trim", heap._trim.__wrapped__)
    heap.release_heap()
    assert looked_into == [None]
