"""Log-probabilities of chosen tokens, without a tensor of all tokens x vocabulary.

Legend: M chosen tokens, V vocabulary, D hidden size, C tokens of one chunk.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from stages.core import memory

# At most this many logits are alive at once. A CPU works on them several times, so they should stay in its cache.
CHUNK_LOGITS = {"cpu": 2**23, "cuda": memory.CHUNK_LOGITS}


def token_logprobs(hidden_MD: Tensor, head: nn.Module, targets_M: Tensor, temperature: float) -> Tensor:
    """Log-probability (nats, float32) of each target under softmax(head(hidden) / temperature).

    Logits are computed in the head's own precision, inside autocast too.
    """
    if type(head) is not nn.Linear:
        return token_logprobs_and_entropy(hidden_MD, head, targets_M, temperature)[0]
    with torch.autocast(hidden_MD.device.type, enabled=False):
        hidden_MD = hidden_MD.to(head.weight.dtype)
        return ChunkedLogprobs.apply(hidden_MD, head.weight, head.bias, targets_M, temperature)


def token_logprobs_and_entropy(
    hidden_MD: Tensor, head: nn.Module, targets_M: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and the entropy (nats, float32, M) of the whole softmax at each place, from the same chunks.

    The logits of a chunk are computed again in the backward pass instead of being kept.
    """

    def chunk(part_CD: Tensor, part_C: Tensor) -> Tensor:
        all_CV = (head(part_CD).float() / temperature).log_softmax(1)
        return torch.stack([all_CV.gather(1, part_C[:, None])[:, 0], -(all_CV.exp() * all_CV).sum(1)], dim=1)

    rows = chunk_rows(head.weight)
    parts = zip(hidden_MD.split(rows), targets_M.split(rows), strict=True)
    chunks = [checkpoint(chunk, part_CD, part_C, use_reentrant=False) for part_CD, part_C in parts]
    logprobs_M, entropy_M = torch.cat(chunks).unbind(1)
    return logprobs_M, entropy_M


def chunk_rows(weight_VD: Tensor) -> int:
    """C: how many tokens' logits may be alive at once."""
    return max(1, CHUNK_LOGITS[weight_VD.device.type] // weight_VD.shape[0])


class ChunkedLogprobs(torch.autograd.Function):
    """log softmax(h W' / T) of the targets.

    Its derivative in h is (W[target] - sum_v p_v W[v]) / T. With a frozen head that M x D tensor is taken on the way
    forward, while a chunk's probabilities are at hand, so that nothing of the vocabulary's size is kept or computed
    twice. A trained head needs the incoming gradient first: there each chunk is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_M: Tensor, temperature: float
    ) -> Tensor:
        """logprobs_M in float32."""
        head_trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        slope_MD = torch.empty_like(hidden_MD) if ctx.needs_input_grad[0] and not head_trains else None
        logprobs_M = torch.empty(len(targets_M), device=hidden_MD.device)
        for chunk in _chunks(len(targets_M), weight_VD):
            targets_C = targets_M[chunk]
            exps_CV, sums_C, logprobs_M[chunk] = _softmax(hidden_MD[chunk], weight_VD, bias_V, targets_C, temperature)
            if slope_MD is not None:
                mean_CD = (exps_CV.to(weight_VD.dtype) @ weight_VD).div_(sums_C[:, None])
                slope_MD[chunk] = (weight_VD[targets_C] - mean_CD).div_(temperature)
        ctx.save_for_backward(slope_MD, hidden_MD, weight_VD, bias_V, targets_M)
        ctx.temperature = temperature
        return logprobs_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Gradients of the hidden states and, where it trains, of the head."""
        slope_MD, hidden_MD, weight_VD, bias_V, targets_M = ctx.saved_tensors
        if slope_MD is not None:
            return slope_MD * grad_M[:, None].to(slope_MD.dtype), None, None, None, None
        grad_MD = torch.zeros_like(hidden_MD)
        grad_VD = torch.zeros_like(weight_VD)
        grad_V = None if bias_V is None else torch.zeros_like(bias_V)
        for chunk in _chunks(len(targets_M), weight_VD):
            grad_C, targets_C = grad_M[chunk], targets_M[chunk]
            exps_CV, sums_C, _ = _softmax(hidden_MD[chunk], weight_VD, bias_V, targets_C, ctx.temperature)
            grad_CV = exps_CV.mul_((-grad_C / sums_C)[:, None])
            grad_CV[torch.arange(len(targets_C), device=grad_C.device), targets_C] += grad_C
            grad_CV = grad_CV.div_(ctx.temperature).to(weight_VD.dtype)
            grad_MD[chunk] = grad_CV @ weight_VD
            grad_VD.addmm_(grad_CV.T, hidden_MD[chunk])
            if grad_V is not None:
                grad_V += grad_CV.sum(0)
        return grad_MD, grad_VD, grad_V, None, None


def _chunks(count: int, weight_VD: Tensor) -> list[slice]:
    rows = chunk_rows(weight_VD)
    return [slice(start, start + rows) for start in range(0, count, rows)]


def _softmax(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_C: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - maximum), the sums of that, and the targets' log-probabilities; in place."""
    logits_CV = linear(hidden_CD, weight_VD, bias_V).float()
    if temperature != 1:
        logits_CV.div_(temperature)
    chosen_C = logits_CV.gather(1, targets_C[:, None])[:, 0]
    highest_C = logits_CV.amax(1)
    exps_CV = logits_CV.sub_(highest_C[:, None]).exp_()
    sums_C = exps_CV.sum(1)
    return exps_CV, sums_C, chosen_C - highest_C - sums_C.log()
