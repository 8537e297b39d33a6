"""Next-token pretraining of the toy model on the world's documents: short, so a broken run simply starts over.

Legend: N packed tokens, M of them with a successor in their document, V vocabulary, D hidden.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from stages.core.context import Metrics
from stages.core.sequences import PackedBatch

BATCH_TOKENS = 1024
WARMUP = 0.05  # share of the steps


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first steps, then a cosine down to a twentieth of `peak`; `step` counts from 1."""
    warmup = max(1, round(WARMUP * steps))
    if step <= warmup:
        return peak * step / warmup
    return peak * (0.525 + 0.475 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def token_batches(documents: Iterator[list[int]]) -> Iterator[list[list[int]]]:
    """Documents in groups of about BATCH_TOKENS tokens; what is left at the end is not used."""
    group: list[list[int]] = []
    for document in documents:
        group.append(document)
        if sum(map(len, group)) >= BATCH_TOKENS:
            yield group
            group = []


def next_token_loss(model: LlamaForCausalLM, documents: Sequence[Sequence[int]]) -> Tensor:
    """Mean cross-entropy, in nats, of each token given those before it in its document."""
    batch = PackedBatch.of(documents, model.device)
    hidden_ND = model.model(
        input_ids=batch.tokens_1N, position_ids=batch.position_ids_1N, layout=batch.layout, use_cache=False
    ).last_hidden_state[0]
    followed_N = torch.ones(len(hidden_ND), dtype=torch.bool, device=model.device)
    followed_N[batch.last_B] = False
    before_M = followed_N.nonzero()[:, 0]
    return cross_entropy(model.lm_head(hidden_ND[before_M]).float(), batch.tokens_1N[0, before_M + 1])


def pretrain(
    model: LlamaForCausalLM,
    batches: Iterator[list[list[int]]],
    *,
    steps: int,
    peak: float,
    metrics: Metrics,
    check_stop: Callable[[], None],
) -> dict[str, float]:
    """Trains `model` in place with AdamW; returns the last step's figures."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.05)
    tokens, values = 0, dict[str, float]()
    for step in range(1, steps + 1):
        check_stop()
        started = time.perf_counter()
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = next_token_loss(model, batch)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(loss) or not torch.isfinite(grad_norm):
            raise FloatingPointError(
                f"toy: loss {loss.item()} or gradient {grad_norm.item()} is not finite at step {step}"
            )
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(map(len, batch))
        values = {
            "tokens": tokens,
            "loss": loss.item(),
            "lr": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm.item(),
            "seconds": time.perf_counter() - started,
        }
        metrics.log(step, values)
    return values
