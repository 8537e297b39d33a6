"""A plan's estimate of memory against what ranks really held: two sizes, three strategies, within 15 %."""

from pathlib import Path

import pytest

from tests.measured import estimated_bytes, make_model, measured_bytes

WITHIN = 0.15


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_the_estimate_is_what_a_rank_holds(tmp_path: Path, strategy: str) -> None:
    """What a tiny model takes is the framework's own, which estimates leave out."""
    tiny = make_model(tmp_path / "tiny", "tiny")
    own = measured_bytes(tiny, strategy) - estimated_bytes(tiny, strategy)
    for size in ("34M", "103M"):
        config = make_model(tmp_path / size, size)
        measured = measured_bytes(config, strategy) - own
        assert estimated_bytes(config, strategy) == pytest.approx(measured, rel=WITHIN), size
