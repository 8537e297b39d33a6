"""What DeepSpeed is told, by the config or by the user's own file."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from stages.core.config import Distributed
from stages.core.deepspeed_json import deepspeed_json

STEPS_BY_US = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "managed_gradient_accumulation": False,
    "gradient_clipping": 0.7,
}


def test_the_strategy_and_the_offload_are_told() -> None:
    found = deepspeed_json(Distributed(strategy="zero3", offload="parameters"), max_grad_norm=0.7)
    assert STEPS_BY_US.items() <= found.items()
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert found["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert deepspeed_json(Distributed(strategy="zero1"), max_grad_norm=None)["gradient_clipping"] == 0  # none
    plain = deepspeed_json(Distributed(strategy="zero1"), max_grad_norm=0.7)["zero_optimization"]
    assert plain["stage"] == 1
    assert plain.keys().isdisjoint({"offload_optimizer", "offload_param"})


def test_the_users_file_takes_its_place(tmp_path: Path) -> None:
    own = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 77},
        "train_batch_size": "auto",
        "wall_clock_breakdown": True,
    }
    path = tmp_path / "own.json"
    path.write_text(json.dumps(own))
    found = deepspeed_json(Distributed(strategy="zero2", deepspeed=str(path)), max_grad_norm=0.7)
    assert found["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 77}
    assert found["wall_clock_breakdown"] is True
    assert "train_batch_size" not in found
    assert STEPS_BY_US.items() <= found.items()


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is no JSON object"),
        ('{"zero_optimization": {"stage": 1}}', "zero_optimization.stage is 1, and distributed.strategy=zero2"),
        ('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}', "sets bf16, which the run's config settles"),
    ],
)
def test_a_file_that_is_at_odds_with_the_run_is_refused(tmp_path: Path, own: str, line: str) -> None:
    path = tmp_path / "own.json"
    path.write_text(own)
    with pytest.raises(UserError, match=r"distributed\.deepspeed=") as refused:
        deepspeed_json(Distributed(strategy="zero2", deepspeed=str(path)), max_grad_norm=1.0)
    assert line in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"strategy": "ddp", "offload": "optimizer"}, "offload=optimizer: no effect with strategy=ddp"),
        ({"strategy": "zero2", "offload": "parameters"}, "offload=parameters: needs strategy=zero3, not zero2"),
        ({"strategy": "ddp", "deepspeed": "own.json"}, "deepspeed=own.json: no effect with strategy=ddp"),
    ],
)
def test_a_key_without_effect_is_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)):
        Distributed(**settings)
