"""The key/value cache of decoding: finished sequences leave it, samples of one prompt share its prefill.

Legend: B sequences, L longest prompt, G key/value heads, E head size, C capacity, U places in use.
"""

import torch
from torch import Tensor


class KvCache:
    """Keys and values of B unfinished sequences, one pair of tensors a layer, right-padded to a fixed capacity."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.keys: dict[int, Tensor] = {}  # layer -> BGCE
        self.values: dict[int, Tensor] = {}
        self.lengths_B = torch.empty(0, dtype=torch.long)

    def fill(self, layer: int, keys_BGLE: Tensor, values_BGLE: Tensor) -> None:
        """Stores a layer's keys and values of the prompts."""
        batch, groups, longest, size = keys_BGLE.shape
        for store, new in ((self.keys, keys_BGLE), (self.values, values_BGLE)):
            store[layer] = new.new_zeros(batch, groups, self.capacity, size)
            store[layer][:, :, :longest] = new

    def select(self, rows_B: Tensor) -> None:
        """Keeps the sequences in `rows_B`, in that order; a row may be named several times."""
        for store in (self.keys, self.values):
            for layer, tensor in store.items():
                store[layer] = tensor.index_select(0, rows_B)
        self.lengths_B = self.lengths_B.index_select(0, rows_B)


class DecodeStep:
    """One new token for each sequence of a cache; what all layers need of it is worked out once."""

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache
        self.used = int(cache.lengths_B.max()) + 1
        self._rows_B = torch.arange(len(cache.lengths_B), device=cache.lengths_B.device)
        self._biases: dict[int | None, Tensor] = {}

    def extend(self, layer: int, keys_BGE: Tensor, values_BGE: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new tokens of a layer at `lengths_B`; the keys and values BGUE so far, the new ones included."""
        for store, new in ((self.cache.keys, keys_BGE), (self.cache.values, values_BGE)):
            store[layer][self._rows_B, :, self.cache.lengths_B] = new
        return self.cache.keys[layer][:, :, : self.used], self.cache.values[layer][:, :, : self.used]

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """B11U to add to the attention scores: 0 where a sequence (and its sliding window) has a token, else -inf."""
        if window not in self._biases:
            lengths_B1 = self.cache.lengths_B[:, None]
            place_U = torch.arange(self.used, device=lengths_B1.device)
            visible_BU = place_U <= lengths_B1
            if window is not None:
                visible_BU &= place_U > lengths_B1 - window
            bias_BU = torch.zeros(visible_BU.shape, dtype=dtype, device=visible_BU.device)
            self._biases[window] = bias_BU.masked_fill_(~visible_BU, -torch.inf)[:, None, None, :]
        return self._biases[window]
