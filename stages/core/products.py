"""Linear layers that read the same input, worked out together: base products, low-rank additions, and their gradients.

Legend: N tokens, I inputs and O outputs of a layer, r its rank; R, P: the ranks and outputs of a group side by side.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear


class Part(NamedTuple):
    """One layer of a group: x W' + bias + scaling * (x A') B' (Hu et al. 2021, 2106.09685, eq. 3)."""

    weight_OI: Tensor
    bias_O: Tensor | None = None
    low_rI: Tensor | None = None  # A; None: no adapter
    high_Or: Tensor | None = None  # B
    scaling: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What autograd has to see."""
        return self[:4]

    @property
    def rank(self) -> int:
        """Of the adapter; 0 where there is none."""
        return 0 if self.low_rI is None else len(self.low_rI)

    def folded(self) -> Tensor:
        """The weight OI with the adapter in it. Exact to rounding in float32; bfloat16 would lose most of it."""
        if self.low_rI is None or self.high_Or is None:
            return self.weight_OI
        return torch.addmm(self.weight_OI, self.high_Or, self.low_rI, alpha=self.scaling)


TENSORS = len(Part._fields) - 1
LAID_OUT = 2**17  # numbers of a float32 weight from which oneDNN's own layout pays at 8 to 64 rows


def parts_from(tensors: Sequence[Tensor | None], scalings: Sequence[float]) -> list[Part]:
    """The parts whose `tensors` stand one after the other."""
    starts = range(0, TENSORS * len(scalings), TENSORS)
    return [Part(*tensors[start : start + TENSORS], scaling) for start, scaling in zip(starts, scalings, strict=True)]  # type: ignore[arg-type]


def _folds(x_NI: Tensor, parts: Sequence[Part]) -> bool:
    """Whether the adapters go into copies of the weights: for many tokens that costs less than the thin products.

    A copy costs r I O operations and the thin products beside a weight N r (I + O). It must be exact to rounding.
    """
    return x_NI.dtype == torch.float32 and len(x_NI) > x_NI.shape[1] and any(part.rank for part in parts)


def project(x_NI: Tensor, parts: Sequence[Part]) -> tuple[list[Tensor], Tensor | None]:
    """The outputs NO of each part; and x A' of all side by side, NR, where it was needed for them."""
    if _folds(x_NI, parts):
        return [linear(x_NI, part.folded(), part.bias_O) for part in parts], None
    dtype = x_NI.dtype
    lows_RI = _lows(parts, dtype)
    low_NR = None if lows_RI is None else x_NI @ lows_RI.T
    outs: list[Tensor] = []
    start = 0
    for part in parts:
        out_NO = linear(x_NI, part.weight_OI, part.bias_O)
        if part.high_Or is not None and low_NR is not None:
            low_Nr = low_NR[:, start : start + part.rank]
            out_NO.addmm_(low_Nr, part.high_Or.to(dtype).T, alpha=part.scaling)
        start += part.rank
        outs.append(out_NO)
    return outs, low_NR


def project_back(
    x_NI: Tensor,
    low_NR: Tensor | None,
    grads: Sequence[Tensor],
    parts: Sequence[Part],
    needs: Sequence[bool],
    *,
    input_needed: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x (NI) and of the parts' tensors, one after the other; `needs` says which of those are asked for.

    `grads` are of the outputs NO, in x's dtype; the gradients of a part come in the dtypes of its tensors.
    """
    lows_RI = _lows(parts, x_NI.dtype)
    if low_NR is None and lows_RI is not None:
        low_NR = x_NI @ lows_RI.T
    grad_NR = None if lows_RI is None else _low_gradients(grads, parts)
    grad_x = None
    if input_needed:
        folds = _folds(x_NI, parts)
        weights = (part.folded() if folds else part.weight_OI for part in parts)
        grad_x = grads[0] @ next(weights)
        for grad_NO, weight_OI in zip(grads[1:], weights, strict=True):
            grad_x.addmm_(grad_NO, weight_OI)
        if not folds and grad_NR is not None and lows_RI is not None:
            grad_x.addmm_(grad_NR, lows_RI)
    lows_needed = any(needs[2::TENSORS]) and grad_NR is not None
    found_RI = grad_NR.T @ x_NI if lows_needed else None
    found: list[Tensor | None] = []
    start = 0
    for place, (grad_NO, part) in enumerate(zip(grads, parts, strict=True)):
        ranks, own_needs = slice(start, start + part.rank), needs[place * TENSORS : (place + 1) * TENSORS]
        low_Nr = None if low_NR is None else low_NR[:, ranks]
        found_rI = None if found_RI is None else found_RI[ranks]
        found += _part_gradients(x_NI, grad_NO, part, (low_Nr, found_rI), own_needs)
        start += part.rank
    return grad_x, found


def _part_gradients(
    x_NI: Tensor, grad_NO: Tensor, part: Part, lows: tuple[Tensor | None, Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of weight, bias, A and B; `lows` are x A' and the gradient of A."""
    low_Nr, found_rI = lows
    weight, bias, low, high = needs
    found: list[Tensor | None] = [None] * TENSORS
    if weight:
        found[0] = grad_NO.T @ x_NI
    if bias and part.bias_O is not None:
        found[1] = grad_NO.sum(0)
    if low and part.low_rI is not None and found_rI is not None:
        found[2] = found_rI.to(part.low_rI.dtype)
    if high and part.high_Or is not None and low_Nr is not None:
        # r rows of O is the faster way round for a product this thin.
        found[3] = (low_Nr.T @ grad_NO).T.to(part.high_Or.dtype).mul(part.scaling)
    return found


def _lows(parts: Sequence[Part], dtype: torch.dtype) -> Tensor | None:
    lows = [part.low_rI.to(dtype) for part in parts if part.low_rI is not None]
    return torch.cat(lows) if len(lows) > 1 else lows[0] if lows else None


def _low_gradients(grads: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """Gradients NR of x A' of all parts side by side."""
    ranks = [part.rank for part in parts]
    found_NR = grads[0].new_empty(len(grads[0]), sum(ranks))
    for grad_NO, part, found_Nr in zip(grads, parts, found_NR.split(ranks, 1), strict=True):
        if part.rank:
            torch.mm(grad_NO, _scaled_high(part, grad_NO.dtype).T, out=found_Nr)
    return found_NR


class PackedLinears:
    """A group's weights copied side by side, for decoding on a CPU: laid out for few tokens at a time where oneDNN can.

    It reads a large weight that it has laid out up to twice as fast as MKL a plain one, and takes 25 us to start.
    In float32 the adapters are added to the copy. In bfloat16 that would lose most of them: there A stands below the
    weights, and B is one block-diagonal matrix.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.dtype = parts[0].weight_OI.dtype
        self.width = sum(len(part.weight_OI) for part in parts)
        biases = [part.bias_O for part in parts if part.bias_O is not None]
        self.bias_P = torch.cat(biases) if biases else None
        self.high_RP: Tensor | None = None
        if self.dtype == torch.float32:
            rows = [part.folded() for part in parts]
        else:
            rows = [part.weight_OI for part in parts]
            lows_RI = _lows(parts, self.dtype)
            if lows_RI is not None:
                rows.append(lows_RI)
                self.high_RP = torch.block_diag(*(_scaled_high(part, self.dtype) for part in parts))
        weight = torch.cat(rows)
        self.is_laid_out = onednn_takes(self.dtype) and (self.dtype != torch.float32 or weight.numel() >= LAID_OUT)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.is_laid_out else weight.T.contiguous()

    def __call__(self, x_BI: Tensor, onto_BP: Tensor | None = None) -> Tensor:
        """The outputs of all parts side by side, BP; added to `onto_BP`, where it is given."""
        x_BI = x_BI.to(self.dtype)
        if self.high_RP is not None:
            base_BP, low_BR = self._product(x_BI, None).split([self.width, len(self.high_RP)], 1)
            out_BP = torch.addmm(base_BP if onto_BP is None else base_BP + onto_BP, low_BR, self.high_RP)
        else:
            out_BP = self._product(x_BI, onto_BP)
        return out_BP if self.bias_P is None else out_BP.add_(self.bias_P)

    def _product(self, x_BI: Tensor, onto_BP: Tensor | None) -> Tensor:
        if not self.is_laid_out:
            return x_BI @ self.weight if onto_BP is None else torch.addmm(onto_BP, x_BI, self.weight)
        # What torch.compile calls on a CPU. Each number of tokens is compiled once, so it is not for training.
        product = torch.ops.mkldnn._linear_pointwise
        if onto_BP is None:
            return product(x_BI, self.weight, None, "none", [], "")
        return product.binary(x_BI, onto_BP, self.weight, None, "add")


def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether PyTorch has oneDNN, and this CPU the instructions that it needs for products in `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _scaled_high(part: Part, dtype: torch.dtype) -> Tensor:
    """scaling * B', rO."""
    if part.high_Or is None:
        return part.weight_OI.new_zeros(0, len(part.weight_OI))
    return (part.high_Or * part.scaling).to(dtype).T
