"""What a running stage measures of itself."""

import resource
import sys

import torch


def peak_memory_bytes() -> float:
    """The most memory this process has held: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
