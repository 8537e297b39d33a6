"""The key/value cache of decoding: finished sequences leave it, samples of one prompt share its prefill.

Legend: B sequences, L longest prompt, H heads, G key/value heads, E head size, C capacity, U places in use.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


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

    def advance(self) -> None:
        """Counts the token that a step has stored in every layer."""
        self.lengths_B = self.lengths_B + 1


class DecodeStep:
    """One new token for each sequence of a cache; what all layers need of it is worked out once."""

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache
        self.used = int(cache.lengths_B.max()) + 1
        self._places: dict[int, Tensor] = {}
        self._biases: dict[int | None, Tensor] = {}

    def attend(
        self,
        layer: int,
        new: tuple[Tensor, Tensor, Tensor],
        *,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """Attention BHE of each sequence's newest token, query BHE and key and value BGE, which the cache takes in."""
        query_BHE, key_BGE, value_BGE = new
        keys_BGUE = self._extend(self.cache.keys[layer], key_BGE)
        values_BGUE = self._extend(self.cache.values[layer], value_BGE)
        batch, groups, size = key_BGE.shape
        # The heads that share a key/value head are laid out as queries: no repeated keys.
        out = scaled_dot_product_attention(
            query_BHE.reshape(batch, groups, -1, size),
            keys_BGUE,
            values_BGUE,
            attn_mask=self.bias(window, query_BHE.dtype),
            scale=scale,
        )
        return out.reshape(batch, -1, size)

    def _extend(self, stored_BGCE: Tensor, new_BGE: Tensor) -> Tensor:
        """Stores the new tokens at `lengths_B`; what is stored so far, BGUE, the new ones included."""
        # One copy of rows E takes a third of the time of an assignment by two indices.
        stored_BGCE.flatten(0, 2).index_copy_(0, self._places_of(new_BGE.shape[1]), new_BGE.flatten(0, 1))
        return stored_BGCE[:, :, : self.used]

    def _places_of(self, groups: int) -> Tensor:
        """Where the new tokens stand among the cache's B x G x C."""
        if groups not in self._places:
            lengths_B1 = self.cache.lengths_B[:, None]
            row_BG = torch.arange(len(lengths_B1) * groups, device=lengths_B1.device).view(-1, groups)
            self._places[groups] = (row_BG * self.cache.capacity + lengths_B1).flatten()
        return self._places[groups]

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
