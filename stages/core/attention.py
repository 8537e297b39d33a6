"""Attention over packed tokens: every linear layer runs on real tokens only, attention alone is padded.

Documents stand one after the other in one row of N tokens; what several begin with may stand there once, and the others
borrow it. The function below is registered with transformers' AttentionInterface, so any model that passes keyword
arguments down to its attention can use it; the layout of the documents travels as the keyword `layout`. In decoding,
the same function reads and extends a key/value cache, so a step costs one token per unfinished response.

Legend: B documents, N packed tokens, M those of a bucket, L longest document, H heads, G key/value heads, E head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

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


class Document(NamedTuple):
    """Where the tokens of a document stand among the packed ones.

    The first `borrowed` of them are those of another document, from `home` on; its own follow one another from `start`.
    """

    length: int
    start: int
    borrowed: int = 0
    home: int = 0

    def places(self) -> Tensor:
        """The place of each token, in their order."""
        own = torch.arange(self.length - self.borrowed) + self.start
        return torch.cat([torch.arange(self.borrowed) + self.home, own]) if self.borrowed else own


def one_by_one(lengths: Sequence[int]) -> list[Document]:
    """Documents of these lengths, one behind the other."""
    return [Document(length, end - length) for length, end in zip(lengths, accumulate(lengths), strict=True)]


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


@dataclass(frozen=True)
class Layout:
    """How packed tokens divide into documents (some may belong to none); with a cache, what of it to write and read."""

    buckets: tuple[Bucket, ...] = ()
    fills: KvCache | None = None  # a prefill: keys and values go there
    step: DecodeStep | None = None  # one new token for each sequence of a cache, instead of documents


def pack_layout(documents: Sequence[Document], device: torch.device, cache: KvCache | None = None) -> Layout:
    """The layout of packed documents; with `cache`, a prefill that fills it."""
    lengths = [document.length for document in documents]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups: list[list[int]] = []
    for row in order:
        if cache is not None or (groups and lengths[row] >= BUCKET_SHARE * lengths[groups[-1][0]]):
            groups = groups or [[]]
            groups[-1].append(row)
        else:
            groups.append([row])
    if cache is not None:
        cache.lengths_B = torch.tensor(lengths, device=device)
    return Layout(tuple(_bucket([documents[row] for row in sorted(group)], device) for group in groups), fills=cache)


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
