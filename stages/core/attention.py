"""Attention over packed tokens: every linear layer runs on real tokens only, attention keeps documents apart.

Documents stand one after the other in one row of N tokens; what several begin with may stand there once, and the others
borrow it. The function below is registered with transformers' AttentionInterface, so any model that passes keyword
arguments down to its attention can use it; the layout of the documents travels as the keyword `layout`. In decoding,
the same function reads and extends a key/value cache, so a step costs one token per unfinished response.

Legend: N packed tokens, H heads, G key/value heads, E head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from data.errors import UserError
from stages.core.documents import Document
from stages.core.kv_cache import DecodeStep, KvCache
from stages.core.padded_attention import BUCKET_SHARE, Bucket, attend_padded, buckets_of, padded_heads
from stages.core.span_attention import SpanAttention, Spans, spans_of

NAME = "packed"
CPU = torch.device("cpu")
SPAN_DEVICES = ("cpu",)  # elsewhere starting an operation costs more than it does, and fused kernels are good


@dataclass(frozen=True)
class Layout:
    """How packed tokens divide into documents (some may belong to none); with a cache, what of it to write and read."""

    documents: tuple[Document, ...] = ()
    fills: KvCache | None = None  # a prefill: keys and values go there
    step: DecodeStep | None = None  # one new token for each sequence of a cache, instead of documents
    device: torch.device = CPU

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """The documents padded together; all in one where they fill a cache."""
        return buckets_of(self.documents, self.device, share=BUCKET_SHARE if self.fills is None else 0.0)

    @cached_property
    def spans(self) -> Spans:
        """The documents where they stand."""
        return Spans(spans_of(self.documents))

    def takes_spans(self, dropout: float) -> bool:
        """Whether attention goes by spans: there, tokens that nobody reads need not ask."""
        return self.step is None and dropout == 0 and self.device.type in SPAN_DEVICES


def pack_layout(documents: Sequence[Document], device: torch.device, cache: KvCache | None = None) -> Layout:
    """The layout of packed documents; with `cache`, a prefill that fills it."""
    if cache is not None:
        cache.begin(torch.tensor([document.length for document in documents], device=device))
    return Layout(tuple(documents), fills=cache, device=device)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: object,
) -> tuple[Tensor, None]:
    """Attention output 1NHE for query 1HNE and key/value 1GNE, by the `layout` among the model's keyword arguments.

    With `asking_M` among them queries and output are of those tokens alone, where the layout `takes_spans`. On a CPU in
    bfloat16 the products run in float32, which is nearly twice as fast there.
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
    packed = tuple(each.squeeze(0).transpose(0, 1).to(dtype) for each in (query, key, value))
    scale, window, layer = options.get("scaling"), options.get("sliding_window"), int(module.layer_idx)
    dropout = float(options.get("dropout") or 0.0)
    if layout.step is not None:
        query, key, value = packed
        out = layout.step.attend(layer, query, torch.stack((key, value), 1), scale=scale, window=window)
    elif layout.takes_spans(dropout):
        if layout.fills is not None:
            layout.fills.fill(layer, *(padded_heads(each, layout.buckets)[0] for each in packed[1:]))
        asking_M = options.get("asking_M")
        spans = layout.spans.asked_by(asking_M) if isinstance(asking_M, Tensor) else layout.spans
        out = SpanAttention.apply(*packed, spans, scale, window)
    else:
        fill = None if layout.fills is None else partial(layout.fills.fill, layer)
        out = attend_padded(packed, layout.buckets, fill, scale=scale, dropout=dropout, window=window)
    return out.to(query.dtype)[None], None


def register() -> None:
    """Makes `attn_implementation="packed"` known to transformers."""
    AttentionInterface.register(NAME, packed_attention)
    # Documents are kept apart by the layout; a mask of N x N would defeat the purpose.
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
