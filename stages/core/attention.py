"""Attention over packed tokens: every linear layer runs on real tokens only, attention alone is padded.

Documents stand one after the other in one row of N tokens. The function below is registered with transformers'
AttentionInterface, so any model that passes keyword arguments down to its attention can use it; the layout of the
documents travels as the keyword `layout`. In decoding, the same function reads and extends a key/value cache, so a
step costs one token per unfinished response.

Legend: B documents, N packed tokens, L longest document, H heads, G key/value heads, E head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from data.errors import UserError
from stages.core.kv_cache import DecodeStep, KvCache

NAME = "packed"
# A document shorter than this share of its bucket's longest opens a new bucket. Finer ones cost more than they save.
BUCKET_SHARE = 0.7


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length, padded together inside attention."""

    shape: tuple[int, int]  # documents, longest
    tokens_M: Tensor  # which of the N packed tokens belong here
    slots_M: Tensor  # where each stands in the padded, flattened documents x longest


@dataclass(frozen=True)
class Layout:
    """How packed tokens divide into documents (some may belong to none); with a cache, what of it to write and read."""

    buckets: tuple[Bucket, ...] = ()
    fills: KvCache | None = None  # a prefill: keys and values go there
    step: DecodeStep | None = None  # one new token for each sequence of a cache, instead of documents


def pack_layout(lengths: Sequence[int], device: torch.device, cache: KvCache | None = None) -> Layout:
    """The layout of documents of these lengths, packed in order; with `cache`, a prefill that fills it."""
    lengths_B = torch.tensor(lengths)
    starts_B = lengths_B.cumsum(0) - lengths_B
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups: list[list[int]] = []
    for row in order:
        if cache is not None or (groups and lengths[row] >= BUCKET_SHARE * lengths[groups[-1][0]]):
            groups = groups or [[]]
            groups[-1].append(row)
        else:
            groups.append([row])
    buckets: list[Bucket] = []
    for group in groups:
        rows = sorted(group)
        longest = max(lengths[row] for row in rows)
        tokens = torch.cat([torch.arange(lengths[row]) + starts_B[row] for row in rows])
        slots = torch.cat([torch.arange(lengths[row]) + place * longest for place, row in enumerate(rows)])
        buckets.append(Bucket((len(rows), longest), tokens.to(device), slots.to(device)))
    if cache is not None:
        cache.lengths_B = lengths_B.to(device)
    return Layout(tuple(buckets), fills=cache)


class Pad(torch.autograd.Function):
    """Packed rows NHE as one tensor a bucket, documents x longest x HE, zeros after each end; keeps no row."""

    @staticmethod
    def forward(ctx: Any, packed_NHE: Tensor, buckets: Sequence[Bucket]) -> tuple[Tensor, ...]:
        """The padded rows."""
        ctx.buckets, ctx.tokens = buckets, len(packed_NHE)
        return _pad(packed_NHE, buckets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient's rows, where the rows came from."""
        return _unpad(grads, ctx.buckets, ctx.tokens), None


class Unpad(torch.autograd.Function):
    """The reverse: N packed rows, 0 where no bucket has one."""

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
    padded: list[Tensor] = []
    for bucket in buckets:
        batch, longest = bucket.shape
        empty = packed_NHE.new_zeros(batch * longest, *packed_NHE.shape[1:])
        rows_MHE = packed_NHE.index_select(0, bucket.tokens_M)
        padded.append(empty.index_copy_(0, bucket.slots_M, rows_MHE).unflatten(0, bucket.shape))
    return tuple(padded)


def _unpad(padded: Sequence[Tensor], buckets: Sequence[Bucket], tokens: int) -> Tensor:
    packed_NHE = padded[0].new_zeros(tokens, *padded[0].shape[2:])
    for each, bucket in zip(padded, buckets, strict=True):
        packed_NHE.index_copy_(0, bucket.tokens_M, each.flatten(0, 1).index_select(0, bucket.slots_M))
    return packed_NHE


def _window_mask(longest: int, window: int | None, device: torch.device) -> Tensor | None:
    """The causal mask of sliding-window attention, or None where the window does not bind."""
    if window is None or longest <= window:
        return None
    distance_LL = torch.arange(longest, device=device)[:, None] - torch.arange(longest, device=device)[None, :]
    return (distance_LL >= 0) & (distance_LL < window)


def _attend_documents(
    layout: Layout,
    packed: tuple[Tensor, Tensor, Tensor],
    *,
    layer: int,
    scale: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Causal attention inside each document; returns NHE."""
    outputs: list[Tensor] = []
    for documents in zip(*(Pad.apply(each_NHE, layout.buckets) for each_NHE in packed), strict=True):
        query, key, value = (each_BLHE.transpose(1, 2) for each_BLHE in documents)
        if layout.fills is not None:
            layout.fills.fill(layer, key, value)
        mask = _window_mask(query.shape[2], window, query.device)
        out_BHLE = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        outputs.append(out_BHLE.transpose(1, 2))
    return Unpad.apply(layout.buckets, len(packed[0]), *outputs)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: object,
) -> tuple[Tensor, None]:
    """Attention output 1NHE for query 1HNE and key/value 1GNE, by the `layout` among the model's keyword arguments.

    On a CPU in bfloat16 the products run in float32, which is nearly twice as fast there.
    """
    layout = options.get("layout")
    if not isinstance(layout, Layout):
        raise UserError(
            f"packing=true: {type(module).__name__} passes no keyword arguments to attention; "
            "sft and rm can run with packing=false"
        )
    for name in ("softcap", "s_aux", "sinks"):
        if options.get(name) is not None:
            raise UserError(
                f"packing=true: {type(module).__name__} needs attention with {name}; sft and rm run with packing=false"
            )
    upcast = query.device.type == "cpu" and query.dtype == torch.bfloat16
    # Under autocast, rotated queries and keys are float32 and values are not: one dtype for all, in the cache too.
    dtype = torch.float32 if upcast else query.dtype
    packed = tuple(each[0].transpose(0, 1).to(dtype) for each in (query, key, value))
    scale, window, layer = options.get("scaling"), options.get("sliding_window"), int(module.layer_idx)
    if layout.step is not None:
        out = layout.step.attend(layer, packed, scale=scale, window=window)
    else:
        dropout = float(options.get("dropout") or 0.0)
        out = _attend_documents(layout, packed, layer=layer, scale=scale, dropout=dropout, window=window)
    return out.to(query.dtype)[None], None


def register() -> None:
    """Makes `attn_implementation="packed"` known to transformers."""
    AttentionInterface.register(NAME, packed_attention)
    # Documents are kept apart by the layout; a mask of N x N would defeat the purpose.
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
