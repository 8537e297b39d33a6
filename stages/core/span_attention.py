"""Attention over packed tokens on a CPU: document by document where they stand, without padding or moving them.

A fused kernel takes 32 queries at a time, and a product for each of them; so few rows are over before a product pays.
Here a span of up to some hundred queries is one product, short enough for its scores to stay in the cache, and sees no
key behind its last query. Its probabilities are kept for the backward pass: less than the padded copies that a fused
kernel keeps of its inputs, with keys and values repeated for every head.

Legend: N packed tokens, M of them ask, H heads, G key/value heads, A = H / G heads that share one, E head size; of a
span Q tokens that ask and K keys, P = Q x A queries, those of a token one below the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
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
        """How many tokens stand here."""
        return sum(self.lengths)

    @property
    def seen(self) -> int:
        """How many tokens are seen before their own."""
        return sum(each.stop - each.start for each in self.before)

    def bias(self, window: int | None) -> Tensor:
        """To add to the scores of the last keys where all tokens ask: 0 where one sees another, else -inf.

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

    def __init__(self, spans: Sequence[Span], asking: Sequence[Tensor] | None = None) -> None:
        """`asking`: which of each span's own tokens ask; None: all of all."""
        self.all, self.asking = spans, asking
        self.sizes = [span.own for span in spans]
        self.asked = self.sizes if asking is None else [len(rows_Q) for rows_Q in asking]
        self.tokens = sum(self.sizes)  # that belong to a document

    def asked_by(self, tokens_M: Tensor) -> "Spans":
        """The same keys and values for the queries of some tokens: of documents, each once, in their order."""
        borders = [0, *accumulate(self.sizes)]
        counts = torch.searchsorted(tokens_M, torch.tensor(borders)).diff().tolist()
        parts = zip(tokens_M.split(counts), borders[:-1], strict=True)
        return Spans(self.all, [part_Q - start for part_Q, start in parts])

    def biases(self, window: int | None) -> list[Tensor]:
        """QQ or QK of each span, the rows of the tokens that ask."""
        whole = [span.bias(window) for span in self.all]
        if self.asking is None:
            return whole
        return [bias.index_select(0, rows_Q) for bias, rows_Q in zip(whole, self.asking, strict=True)]

    def queries(self, rows_GMAE: Tensor) -> list[Tensor]:
        """GPE of each span."""
        groups, _, shared, size = rows_GMAE.shape
        sizes = [asked * shared for asked in self.asked]
        return list(rows_GMAE.view(groups, -1, size)[:, : sum(sizes)].split(sizes, 1))

    def keys(self, rows_NGE: Tensor) -> list[Tensor]:
        """GKE of each span: what is seen before its own, and its own."""
        rows_GNE = rows_NGE.transpose(0, 1)
        own = rows_GNE[:, : self.tokens].split(self.sizes, 1)
        return [
            torch.cat([*(rows_GNE[:, each] for each in span.before), own_GQE], 1) if span.before else own_GQE
            for span, own_GQE in zip(self.all, own, strict=True)
        ]

    def join(self, parts: Sequence[Tensor], shared: int, tokens: int) -> Tensor:
        """MHE of each span's GPE, A = `shared`; 0 for those of `tokens` that belong to no document."""
        return _joined(parts, self.asked, shared, tokens)

    def join_keys(self, parts: Sequence[Tensor], tokens: int) -> Tensor:
        """NGE, the sum over all spans of their GKE."""
        own = [each[:, -span.own :] if span.before else each for each, span in zip(parts, self.all, strict=True)]
        joined_NGE = _joined(own, self.sizes, 1, tokens)
        for span, part_GKE in zip(self.all, parts, strict=True):
            for place, rows in zip(span.before, _slices(span.before), strict=True):
                joined_NGE[place] += part_GKE[:, rows].transpose(0, 1)
        return joined_NGE


def _joined(parts: Sequence[Tensor], sizes: Sequence[int], shared: int, tokens: int) -> Tensor:
    """The parts' tokens one after the other, `shared` rows of a part each; 0 behind them."""
    groups, _, size = parts[0].shape
    side_by_side = [part.reshape(groups, own, shared * size) for part, own in zip(parts, sizes, strict=True)]
    joined_NGF = parts[0].new_empty(tokens, groups, shared * size)
    torch.cat(side_by_side, 1, out=joined_NGF[: sum(sizes)].transpose(0, 1))
    joined_NGF[sum(sizes) :] = 0
    return joined_NGF.view(tokens, -1, size)


def _slices(pieces: Sequence[slice]) -> list[slice]:
    """Where pieces stand that are put one behind the other."""
    ends = accumulate((piece.stop - piece.start for piece in pieces), initial=0)
    return [slice(*ends) for ends in pairwise(ends)]


class SpanAttention(torch.autograd.Function):
    """Causal attention MHE of queries MHE over keys and values NGE, inside each document; M is N where all ask."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # under autocast too: float32 is the faster one here
    def forward(
        ctx: Any,
        query_MHE: Tensor,
        key_NGE: Tensor,
        value_NGE: Tensor,
        spans: Spans,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """What each token sees; 0 for tokens of no document."""
        ctx.spans, ctx.window = spans, window
        ctx.scale = 1 / math.sqrt(query_MHE.shape[2]) if scale is None else scale
        query_GMAE = _by_group(query_MHE, key_NGE.shape[1], ctx.scale)
        shared = query_GMAE.shape[2]
        outs: list[Tensor] = []
        kept: list[Tensor | None] = []
        inputs = spans.queries(query_GMAE), spans.keys(key_NGE), spans.keys(value_NGE), spans.biases(window)
        for query_GPE, key_GKE, value_GKE, bias in zip(*inputs, strict=True):
            probs_GPK = _probabilities(query_GPE, key_GKE, bias, shared)
            outs.append(torch.bmm(probs_GPK, value_GKE))
            kept.append(probs_GPK if key_GKE.shape[1] <= KEPT_KEYS else None)
        ctx.save_for_backward(query_GMAE, key_NGE, value_NGE, *kept)
        return spans.join(outs, shared, len(query_MHE))

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad_MHE: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        query_GMAE, key_NGE, value_NGE, *kept = ctx.saved_tensors
        spans, shared = ctx.spans, query_GMAE.shape[2]
        grads: tuple[list[Tensor], ...] = ([], [], [])
        wide = spans.queries(query_GMAE), spans.queries(_by_group(grad_MHE, len(query_GMAE)))
        seen = spans.keys(key_NGE), spans.keys(value_NGE), spans.biases(ctx.window)
        for query_GPE, grad_GPE, key_GKE, value_GKE, bias, probs_GPK in zip(*wide, *seen, kept, strict=True):
            if probs_GPK is None:
                probs_GPK = _probabilities(query_GPE, key_GKE, bias, shared)
            grad_GPK = torch.bmm(grad_GPE, value_GKE.transpose(1, 2))
            grad_GPK = torch.ops.aten._softmax_backward_data(grad_GPK, probs_GPK, 2, probs_GPK.dtype)
            grads[0].append(torch.bmm(grad_GPK, key_GKE))
            grads[1].append(torch.bmm(grad_GPK.transpose(1, 2), query_GPE))
            grads[2].append(torch.bmm(probs_GPK.transpose(1, 2), grad_GPE))
        grad_query = spans.join(grads[0], shared, len(grad_MHE)).mul_(ctx.scale)
        grad_key, grad_value = (spans.join_keys(each, len(key_NGE)) for each in grads[1:])
        return grad_query, grad_key, grad_value, None, None, None


def _by_group(rows_MHE: Tensor, groups: int, scale: float = 1.0) -> Tensor:
    """A scaled copy GMAE: what shares a key/value head stands together, so a span's part of it needs no moving."""
    rows_GMF = rows_MHE.reshape(len(rows_MHE), groups, -1).transpose(0, 1)
    copy_GMF = torch.mul(rows_GMF, scale, out=rows_GMF.new_empty(rows_GMF.shape))
    return copy_GMF.unflatten(2, (-1, rows_MHE.shape[2]))


def _probabilities(query_GPE: Tensor, key_GKE: Tensor, bias_QK: Tensor, shared: int) -> Tensor:
    """softmax(query key' + bias), GPK."""
    queries, last = bias_QK.shape
    groups, keys, _ = key_GKE.shape
    scores_GPK = torch.bmm(query_GPE, key_GKE.transpose(1, 2))
    scores_GPK.view(groups, queries, shared, keys).narrow(3, keys - last, last).add_(bias_QK[:, None])
    return scores_GPK.softmax(2)
