"""Token sequences padded to one length: the way without packing, for models whose attention we cannot replace.

Legend: B sequences, S longest.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_right(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """tokens_BS and mask_BS (True: a real token); padded places hold token 0, which the mask keeps out."""
    longest = max(len(sequence) for sequence in sequences)
    tokens_BS = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask_BS = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        tokens_BS[row, : len(sequence)] = torch.tensor(sequence)
        mask_BS[row, : len(sequence)] = True
    return tokens_BS.to(device), mask_BS.to(device)
