"""What a process settles before any library is imported."""

import os

import pytest

from launch.worker import set_environment


def test_few_compiled_products_are_kept_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "500"})
    set_environment(None)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "500"
    assert os.environ["LRU_CACHE_CAPACITY"] == "16"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_no_gpu_is_seen_where_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    set_environment(1)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    set_environment(0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
