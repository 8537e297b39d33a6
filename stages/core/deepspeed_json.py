"""What DeepSpeed is told: derived from a run's config, or the user's own file. Imports neither torch nor DeepSpeed."""

import json
from pathlib import Path
from typing import Any

from data.errors import UserError
from stages.core.config import Distributed
from stages.core.memory import ZERO_BUCKET, ZERO_LIVE

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
# What the run settles by itself: batches, precision, optimizer. A file that names one of them would be at odds with it.
OURS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "scheduler", "fp16", "bf16", "torch_autocast", "managed_gradient_accumulation"),
)


def shown_json(distributed: Distributed) -> dict[str, Any]:
    """What a file of the user's own would have to say to change nothing: all that the run does not settle by itself."""
    return {name: value for name, value in deepspeed_json(distributed, max_grad_norm=1).items() if name not in OURS}


def deepspeed_json(distributed: Distributed, *, max_grad_norm: float | None) -> dict[str, Any]:
    """The configuration of the DeepSpeed engine.

    The stages cut their batches themselves and step when they are done (`managed_gradient_accumulation` off), so the
    sizes here only have to be consistent. Weights, gradients and moments are float32 where they train; products run
    in bfloat16 by autocast. torch's AdamW is kept wherever the state lies, so that a strategy changes no result.
    Raises UserError for a file of the user's that cannot be used.
    """
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm or 0.0,  # 0: no bound
    }
    if distributed.deepspeed is not None:
        return _users(Path(distributed.deepspeed), STAGES[distributed.strategy]) | ours
    zero: dict[str, Any] = {
        "stage": STAGES[distributed.strategy],
        "overlap_comm": distributed.strategy != "zero1",
        "reduce_bucket_size": ZERO_BUCKET,  # DeepSpeed's ten times as much takes 4 GB of a GPU, however small the model
        "allgather_bucket_size": ZERO_BUCKET,
    }
    if distributed.strategy == "zero3":
        zero["stage3_prefetch_bucket_size"] = ZERO_BUCKET
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = ZERO_LIVE
    if distributed.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if distributed.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        **ours,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _users(path: Path, stage: int) -> dict[str, Any]:
    try:
        own = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"distributed.deepspeed={path}: cannot be read as JSON ({error}); mend it") from error
    if not isinstance(own, dict):
        raise UserError(f"distributed.deepspeed={path}: is no JSON object; mend it")
    zero = own.get("zero_optimization", {})
    found = zero.get("stage") if isinstance(zero, dict) else None
    problems = [
        f"distributed.deepspeed={path}: sets {name}, which the run's config settles; take it out"
        for name in OURS
        if own.get(name, "auto") != "auto"
    ]
    if found != stage:
        problems.append(
            f"distributed.deepspeed={path}: zero_optimization.stage is {found}, and distributed.strategy=zero{stage}; "
            "make them agree"
        )
    if problems:
        raise UserError(*problems)
    own = {name: value for name, value in own.items() if name not in OURS}
    return {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False} | own
