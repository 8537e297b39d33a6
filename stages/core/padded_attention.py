"""Attention over packed tokens, documents of like length padded together: for a device's fused kernels.

Legend: B documents, N packed tokens, M those of a bucket, L longest document, H heads, G key/value heads, E head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from stages.core.documents import Document

# A document shorter than this share of its bucket's longest opens a new bucket. Finer ones cost more than they save.
BUCKET_SHARE = 0.7


class Moves(NamedTuple):
    """Packed tokens and where each stands in a bucket, its documents x longest flattened."""

    tokens_M: Tensor
    slots_M: Tensor


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length, padded together inside attention."""

    shape: tuple[int, int]  # documents, longest
    own: Moves  # each packed token once over all buckets
    borrowed: Moves | None = None  # tokens that stand in a second document; what comes out there nobody reads


def buckets_of(documents: Sequence[Document], device: torch.device, *, share: float) -> tuple[Bucket, ...]:
    """Packed documents in buckets, those together that have at least this `share` of the longest one's length."""
    lengths = [document.length for document in documents]
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and lengths[row] >= share * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return tuple(_bucket([documents[row] for row in sorted(group)], device) for group in groups)


def _bucket(documents: Sequence[Document], device: torch.device) -> Bucket:
    longest = max(document.length for document in documents)
    tokens_M = torch.cat([document.places() for document in documents])
    slots_M = torch.cat([torch.arange(document.length) + row * longest for row, document in enumerate(documents)])
    own_M = torch.cat([torch.arange(document.length) >= document.borrowed for document in documents])
    own, borrowed = (Moves(tokens_M[each_M].to(device), slots_M[each_M].to(device)) for each_M in (own_M, ~own_M))
    return Bucket((len(documents), longest), own, borrowed if len(borrowed.tokens_M) else None)


class Pad(torch.autograd.Function):
    """Packed rows NHE as one tensor a bucket, documents x longest x HE, zeros after each end; keeps no row."""

    @staticmethod
    def forward(ctx: Any, packed_NHE: Tensor, buckets: Sequence[Bucket]) -> tuple[Tensor, ...]:
        """The padded rows."""
        ctx.buckets, ctx.tokens = buckets, len(packed_NHE)
        padded = _pad(packed_NHE, buckets)
        for each, bucket in zip(padded, buckets, strict=True):
            if bucket.borrowed is not None:
                tokens_M, slots_M = bucket.borrowed
                each.flatten(0, 1).index_copy_(0, slots_M, packed_NHE.index_select(0, tokens_M))
        return padded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradients of all rows that came from a packed one, summed."""
        packed_NHE = _unpad(grads, ctx.buckets, ctx.tokens)
        for each, bucket in zip(grads, ctx.buckets, strict=True):
            if bucket.borrowed is not None:
                tokens_M, slots_M = bucket.borrowed
                packed_NHE.index_add_(0, tokens_M, each.flatten(0, 1).index_select(0, slots_M))
        return packed_NHE, None


class Unpad(torch.autograd.Function):
    """The reverse: N packed rows, each from the document that owns it, 0 where no bucket has one."""

    @staticmethod
    def forward(ctx: Any, buckets: Sequence[Bucket], tokens: int, *padded: Tensor) -> Tensor:
        """The packed rows NHE."""
        ctx.buckets = buckets
        return _unpad(padded, buckets, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHE: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient, padded."""
        return None, None, *_pad(grad_NHE, ctx.buckets)


def _pad(packed_NHE: Tensor, buckets: Sequence[Bucket]) -> tuple[Tensor, ...]:
    """Each packed row in the slot that owns it; 0 in all others."""
    padded: list[Tensor] = []
    for bucket in buckets:
        batch, longest = bucket.shape
        empty = packed_NHE.new_zeros(batch * longest, *packed_NHE.shape[1:])
        rows_MHE = packed_NHE.index_select(0, bucket.own.tokens_M)
        padded.append(empty.index_copy_(0, bucket.own.slots_M, rows_MHE).unflatten(0, bucket.shape))
    return tuple(padded)


def _unpad(padded: Sequence[Tensor], buckets: Sequence[Bucket], tokens: int) -> Tensor:
    packed_NHE = padded[0].new_zeros(tokens, *padded[0].shape[2:])
    for each, bucket in zip(padded, buckets, strict=True):
        rows_MHE = each.flatten(0, 1).index_select(0, bucket.own.slots_M)
        packed_NHE.index_copy_(0, bucket.own.tokens_M, rows_MHE)
    return packed_NHE


def _window_mask(longest: int, window: int | None, device: torch.device) -> Tensor | None:
    """The causal mask of sliding-window attention, or None where the window does not bind."""
    if window is None or longest <= window:
        return None
    distance_LL = torch.arange(longest, device=device)[:, None] - torch.arange(longest, device=device)[None, :]
    return (distance_LL >= 0) & (distance_LL < window)


def padded_heads(packed_NHE: Tensor, buckets: Sequence[Bucket]) -> list[Tensor]:
    """Packed rows as BHLE of each bucket."""
    return [each_BLHE.transpose(1, 2) for each_BLHE in Pad.apply(packed_NHE, buckets)]


def attend_padded(
    packed: tuple[Tensor, Tensor, Tensor],
    buckets: Sequence[Bucket],
    fill: Callable[[Tensor, Tensor], None] | None,
    *,
    scale: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Causal attention NHE of query NHE and key and value NGE, inside each document.

    `fill` is told the keys and values BGLE of each bucket.
    """
    outputs: list[Tensor] = []
    for query, key, value in zip(*(padded_heads(each_NHE, buckets) for each_NHE in packed), strict=True):
        if fill is not None:
            fill(key, value)
        mask = _window_mask(query.shape[2], window, query.device)
        out_BHLE = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        outputs.append(out_BHLE.transpose(1, 2))
    return Unpad.apply(buckets, len(packed[0]), *outputs)
