"""The key/value cache of decoding: finished sequences leave it, samples of one prompt share its prefill.

Prompts are right-padded to the longest. Behind it every step takes one place, the same for all sequences: so a step
writes one column, and the only places that a sequence does not see are the gap behind its prompt.

Legend: B sequences, L longest prompt, H heads, G key/value heads, E head size, C capacity, U places in use.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class KvCache:
    """Keys and values of B unfinished sequences, one tensor a layer with a fixed number of places."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.layers: dict[int, Tensor] = {}  # layer -> keys and values B2GCE
        self.prompts_B = torch.empty(0, dtype=torch.long)  # tokens of each sequence's prompt
        self.longest = self.steps = 0
        self._gap_BC: Tensor | None = None

    def begin(self, prompts_B: Tensor) -> None:
        """Takes in prompts of these lengths; `fill` brings their keys and values."""
        self.prompts_B, self.longest = prompts_B, int(prompts_B.max())

    def fill(self, layer: int, keys_BGLE: Tensor, values_BGLE: Tensor) -> None:
        """Stores a layer's keys and values of the prompts."""
        both_B2GLE = torch.stack((keys_BGLE, values_BGLE), 1)
        *outer, longest, size = both_B2GLE.shape
        self.layers[layer] = both_B2GLE.new_zeros(*outer, self.capacity, size)
        self.layers[layer][..., :longest, :] = both_B2GLE

    def select(self, rows_B: Tensor) -> None:
        """Keeps the sequences in `rows_B`, in that order; a row may be named several times."""
        for layer, tensor in self.layers.items():
            self.layers[layer] = tensor.index_select(0, rows_B)
        self.prompts_B = self.prompts_B.index_select(0, rows_B)
        self._gap_BC = None

    def advance(self) -> None:
        """Counts the token that a step has stored in every layer."""
        self.steps += 1

    @property
    def lengths_B(self) -> Tensor:
        """Tokens of each sequence so far."""
        return self.prompts_B + self.steps

    @property
    def used(self) -> int:
        """U, places that hold a token of some sequence; the next one is the coming step's."""
        return self.longest + self.steps

    def gap(self, dtype: torch.dtype) -> Tensor:
        """BC to add to attention scores: -inf where a sequence has no token and never will, else 0."""
        if self._gap_BC is None:
            place_C = torch.arange(self.capacity, device=self.prompts_B.device)
            gap_BC = (place_C >= self.prompts_B[:, None]) & (place_C < self.longest)
            self._gap_BC = torch.zeros(gap_BC.shape, dtype=dtype, device=gap_BC.device).masked_fill_(gap_BC, -torch.inf)
        return self._gap_BC


class DecodeStep:
    """One new token for each sequence of a cache; what all layers need of it is worked out once."""

    def __init__(self, cache: KvCache) -> None:
        self.cache, self.place = cache, cache.used
        self._biases: dict[int | None, Tensor] = {}

    def attend(
        self, layer: int, query_BHE: Tensor, new_B2GE: Tensor, *, scale: float | None, window: int | None
    ) -> Tensor:
        """Attention BHE of each sequence's newest token, whose key and value the cache takes in."""
        stored_B2GCE = self.cache.layers[layer]
        stored_B2GCE.select(3, self.place).copy_(new_B2GE)
        keys_BGUE, values_BGUE = stored_B2GCE.narrow(3, 0, self.place + 1).unbind(1)
        batch, _, groups, size = new_B2GE.shape
        # The heads that share a key/value head are laid out as queries: no repeated keys.
        out = scaled_dot_product_attention(
            query_BHE.reshape(batch, groups, -1, size),
            keys_BGUE,
            values_BGUE,
            attn_mask=self.bias(window, query_BHE.dtype),
            scale=scale,
        )
        return out.reshape(batch, -1, size)

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """B11U to add to the attention scores: 0 where a sequence (and its sliding window) has a token, else -inf."""
        if window not in self._biases:
            bias_BU = self.cache.gap(dtype)[:, : self.place + 1]
            if window is not None:
                prompts_B1, longest = self.cache.prompts_B[:, None], self.cache.longest
                place_U = torch.arange(self.place + 1, device=prompts_B1.device)
                position_BU = torch.where(place_U < longest, place_U, place_U - longest + prompts_B1)
                bias_BU = bias_BU.masked_fill(position_BU <= prompts_B1 + self.cache.steps - window, -torch.inf)
            self._biases[window] = bias_BU[:, None, None, :]
        return self._biases[window]
