"""What `launch doctor` says that depends on the machine."""

import pytest

from launch.doctor import examine
from stages.core import products


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_that_is_slow_in_bfloat16_is_named(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_takes", lambda _: fast)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (line,) = [check["found"] for check in examine().data["checks"] if check["what"] == "would run here"]
    assert ("bfloat16" in line) == (not fast)
