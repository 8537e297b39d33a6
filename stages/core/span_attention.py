"""Attention over packed tokens on a CPU: document by document where they stand, without padding or moving them.

A fused kernel takes 32 queries at a time, and a product for each of them; so few rows are over before a product pays.
Here a span of up to some hundred queries is one product, short enough for its scores to stay in the cache, and sees no
key behind its last query. Its probabilities are kept for the backward pass: less than the padded copies that a fused
kernel keeps of its inputs, with keys and values repeated for every head.

Legend: N packed tokens, H heads, G key/value heads, A = H / G heads that share one, E head size; of a span Q tokens and
K keys, P = Q x A queries, those of a token one below the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from stages.core.documents import Document

MERGED_TOKENS = 64  # short documents share a span up to this: a product of theirs alone costs little less
SPAN_TOKENS = 128  # longer documents are cut into spans
KEPT_KEYS = 512  # of spans that see more, probabilities are worked out anew: they would outgrow all other activations


@dataclass(frozen=True, eq=False)
class Span:
    """Neighbouring packed tokens, and those that all of them see before their own."""

    lengths: list[int]  # of the documents that stand here: each token sees those before it in its own
    before: tuple[slice, ...] = ()  # a prompt that is borrowed, the part of the document that came before
    biases: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def own(self) -> int:
        """Q, how many tokens stand here."""
        return sum(self.lengths)

    @property
    def seen(self) -> int:
        """How many tokens are seen before their own."""
        return sum(each.stop - each.start for each in self.before)

    def bias(self, window: int | None) -> Tensor:
        """To add to the scores of the last keys: 0 where a token sees another, else -inf.

        QQ, the keys that stand here; QK where a sliding window hides others too.
        """
        if window not in self.biases:
            self.biases[window] = self._bias(window)
        return self.biases[window]

    def _bias(self, window: int | None) -> Tensor:
        if window is None and len(self.lengths) == 1:
            return _causal(SPAN_TOKENS)[: self.own, : self.own]
        places_Q = torch.cat([torch.arange(length) for length in self.lengths])
        owners_Q = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        distance_QK = places_Q[:, None] - places_Q
        visible_QK = (distance_QK >= 0) & (owners_Q[:, None] == owners_Q)
        if window is not None:
            distance_QK = places_Q[:, None] - torch.cat([torch.arange(-self.seen, 0), places_Q])
            visible_QK = pad(visible_QK, (self.seen, 0), value=True) & (distance_QK < window)
        return torch.zeros(visible_QK.shape).masked_fill_(~visible_QK, -torch.inf)


@cache
def _causal(tokens: int) -> Tensor:
    """To add to the scores of a document of this many tokens: -inf behind the diagonal, else 0."""
    return torch.full((tokens, tokens), -torch.inf).triu_(1)


def spans_of(documents: Sequence[Document]) -> list[Span]:
    """The spans of packed documents, in their order."""
    spans: list[Span] = []
    for document in documents:
        if not document.own:
            continue
        prompt = (slice(document.home, document.home + document.borrowed),) if document.borrowed else ()
        if spans and spans[-1].before == prompt and spans[-1].own + document.own <= MERGED_TOKENS:
            spans[-1].lengths.append(document.own)
            continue
        parts = -(-document.own // SPAN_TOKENS)
        for cut, end in pairwise(document.own * part // parts for part in range(parts + 1)):
            earlier = (slice(document.start, document.start + cut),) if cut else ()
            spans.append(Span([end - cut], prompt + earlier))
    return spans


class Spans:
    """The spans of packed tokens, and what moves rows in and out of them."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.all = spans_of(documents)
        self.sizes = [span.own for span in self.all]

    @cached_property
    def tokens(self) -> int:
        """How many packed tokens belong to a document."""
        return sum(self.sizes)

    def queries(self, rows_GNAE: Tensor) -> list[Tensor]:
        """GPE of each span."""
        groups, _, shared, size = rows_GNAE.shape
        rows_GPE = rows_GNAE.view(groups, -1, size)[:, : self.tokens * shared]
        return list(rows_GPE.split([own * shared for own in self.sizes], 1))

    def keys(self, rows_NGE: Tensor) -> list[Tensor]:
        """GKE of each span: what is seen before its own, and its own."""
        rows_GNE = rows_NGE.transpose(0, 1)
        own = rows_GNE[:, : self.tokens].split(self.sizes, 1)
        return [
            torch.cat([*(rows_GNE[:, each] for each in span.before), own_GQE], 1) if span.before else own_GQE
            for span, own_GQE in zip(self.all, own, strict=True)
        ]

    def join(self, parts: Sequence[Tensor], tokens: int) -> Tensor:
        """NHE of each span's GPE; 0 for those of `tokens` that belong to no document."""
        groups, _, size = parts[0].shape
        side_by_side = [part_GPE.view(groups, own, -1) for part_GPE, own in zip(parts, self.sizes, strict=True)]
        joined_NGF = parts[0].new_empty(tokens, groups, side_by_side[0].shape[2])
        torch.cat(side_by_side, 1, out=joined_NGF[: self.tokens].transpose(0, 1))
        joined_NGF[self.tokens :] = 0
        return joined_NGF.view(tokens, -1, size)

    def join_keys(self, parts: Sequence[Tensor], tokens: int) -> Tensor:
        """NGE, the sum over all spans of their GKE."""
        own = [each[:, -span.own :] if span.before else each for each, span in zip(parts, self.all, strict=True)]
        joined_NGE = self.join(own, tokens)
        for span, part_GKE in zip(self.all, parts, strict=True):
            for place, rows in zip(span.before, _slices(span.before), strict=True):
                joined_NGE[place] += part_GKE[:, rows].transpose(0, 1)
        return joined_NGE


def _slices(pieces: Sequence[slice]) -> list[slice]:
    """Where pieces stand that are put one behind the other."""
    ends = accumulate((piece.stop - piece.start for piece in pieces), initial=0)
    return [slice(*ends) for ends in pairwise(ends)]


class SpanAttention(torch.autograd.Function):
    """Causal attention NHE of queries NHE over keys and values NGE, inside each document."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # under autocast too: float32 is the faster one here
    def forward(
        ctx: Any,
        query_NHE: Tensor,
        key_NGE: Tensor,
        value_NGE: Tensor,
        spans: Spans,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """What each token sees; 0 for tokens of no document."""
        ctx.spans, ctx.window = spans, window
        ctx.scale = 1 / math.sqrt(query_NHE.shape[2]) if scale is None else scale
        query_GNAE = _by_group(query_NHE, key_NGE.shape[1], ctx.scale)
        outs: list[Tensor] = []
        kept: list[Tensor | None] = []
        inputs = spans.queries(query_GNAE), spans.keys(key_NGE), spans.keys(value_NGE)
        for query_GPE, key_GKE, value_GKE, span in zip(*inputs, spans.all, strict=True):
            probs_GPK = _probabilities(query_GPE, key_GKE, span.bias(window))
            outs.append(torch.bmm(probs_GPK, value_GKE))
            kept.append(probs_GPK if key_GKE.shape[1] <= KEPT_KEYS else None)
        ctx.save_for_backward(query_GNAE, key_NGE, value_NGE, *kept)
        return spans.join(outs, len(query_NHE))

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad_NHE: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        query_GNAE, key_NGE, value_NGE, *kept = ctx.saved_tensors
        spans, tokens = ctx.spans, len(grad_NHE)
        grads: tuple[list[Tensor], ...] = ([], [], [])
        wide = spans.queries(query_GNAE), spans.queries(_by_group(grad_NHE, len(query_GNAE)))
        seen = spans.keys(key_NGE), spans.keys(value_NGE)
        for query_GPE, grad_GPE, key_GKE, value_GKE, span, probs_GPK in zip(*wide, *seen, spans.all, kept, strict=True):
            if probs_GPK is None:
                probs_GPK = _probabilities(query_GPE, key_GKE, span.bias(ctx.window))
            grad_GPK = torch.bmm(grad_GPE, value_GKE.transpose(1, 2))
            grad_GPK = torch.ops.aten._softmax_backward_data(grad_GPK, probs_GPK, 2, probs_GPK.dtype)
            grads[0].append(torch.bmm(grad_GPK, key_GKE))
            grads[1].append(torch.bmm(grad_GPK.transpose(1, 2), query_GPE))
            grads[2].append(torch.bmm(probs_GPK.transpose(1, 2), grad_GPE))
        grad_query = spans.join(grads[0], tokens).mul_(ctx.scale)
        grad_key, grad_value = (spans.join_keys(each, tokens) for each in grads[1:])
        return grad_query, grad_key, grad_value, None, None, None


def _by_group(rows_NHE: Tensor, groups: int, scale: float = 1.0) -> Tensor:
    """A scaled copy GNAE: what shares a key/value head stands together, so a span's part of it needs no moving."""
    rows_GNF = rows_NHE.reshape(len(rows_NHE), groups, -1).transpose(0, 1)
    copy_GNF = torch.mul(rows_GNF, scale, out=rows_GNF.new_empty(rows_GNF.shape))
    return copy_GNF.unflatten(2, (-1, rows_NHE.shape[2]))


def _probabilities(query_GPE: Tensor, key_GKE: Tensor, bias_QK: Tensor) -> Tensor:
    """softmax(query key' + bias), GPK."""
    queries, last = bias_QK.shape
    groups, keys, _ = key_GKE.shape
    scores_GPK = torch.bmm(query_GPE, key_GKE.transpose(1, 2))
    scores_GPK.view(groups, queries, -1, keys).narrow(3, keys - last, last).add_(bias_QK[:, None])
    return scores_GPK.softmax(2)
