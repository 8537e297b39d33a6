"""Rollouts in this process, on any device: it is the policy itself, so there is nothing to sync.

Prompts are run once each, packed; their samples share that prefill. A decoding step costs one token per unfinished
response: finished ones leave the cache.

Legend: L prompts, B unfinished responses, V vocabulary, R most new tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stages.core import ranks
from stages.core.attention import pack_layout
from stages.core.bank import read_values
from stages.core.decoding import Decoder
from stages.core.kv_cache import KvCache
from stages.core.rollout.protocol import Completion, Sampling
from stages.core.sequences import PackedBatch, split_by_budget
from stages.core.trunk import Trunk

# Finished responses are dropped from the cache once they make up this share: each drop copies the cache.
COMPACT_SHARE = 0.125
# Few different batch sizes: on a CPU each new one is compiled for bfloat16.
ROWS_MULTIPLE = 8


class NativeEngine:
    """Samples from a trunk under one of its adapters.

    With `value_head`, a critic's head on the policy's own hidden states, completions carry its values: the decoding
    step has those states at hand, so the critic costs no pass of its own.
    """

    def __init__(
        self, trunk: Trunk, adapter: str | None, *, value_head: nn.Linear | None = None, batch_size: int = 256
    ) -> None:
        self.trunk = trunk
        self.adapter = adapter
        self.value_head = value_head
        self.batch_size = batch_size
        self.version = 0

    def sync(self, version: int) -> None:
        """Names the policy's version; there is nothing to hand over."""
        self.version = version

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """For each prompt one completion a seed, decoded at most `batch_size` responses at a time.

        Each rank answers its part of the prompts; all get every answer.
        """
        prompts, seeds = ranks.share(prompts), ranks.share(seeds)
        completions: list[list[Completion]] = []
        if prompts:
            decoder = self.trunk.decoder(self.adapter)
            for group in split_by_budget([len(each) for each in seeds], self.batch_size):
                asked = [prompts[i] for i in group], [seeds[i] for i in group]
                completions += self._generate_group(*asked, sampling, decoder)
        return ranks.gather_lists(completions)

    def close(self) -> None:
        """Nothing to release: the policy belongs to the trainer."""

    def _generate_group(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling, decoder: Decoder
    ) -> list[list[Completion]]:
        device = self.trunk.device
        cache = KvCache(capacity=max(map(len, prompts)) + sampling.max_new_tokens)
        packed = PackedBatch.of(prompts, device)
        prefill = replace(packed, layout=pack_layout(packed.documents, device, cache))
        hidden_LD = self.trunk.hidden_at(prefill, self.adapter, packed.last_B)
        owners = [row for row, own in enumerate(seeds) for _ in own]
        owner_B = torch.tensor(owners, device=device)
        cache.select(owner_B)
        flat_seeds = [seed for own in seeds for seed in own]
        uniforms_BR = _uniforms(flat_seeds, sampling.max_new_tokens).to(device)
        decoded = self._decode(cache, hidden_LD[owner_B], uniforms_BR, sampling, decoder)
        completions: list[list[Completion]] = [[] for _ in prompts]
        for owner, completion in zip(owners, decoded.completions(self.version), strict=True):
            completions[owner].append(completion)
        return completions

    def _decode(
        self, cache: KvCache, hidden_BD: Tensor, uniforms_BR: Tensor, sampling: Sampling, decoder: Decoder
    ) -> "Decoded":
        """Samples every sequence of the cache to its end; `hidden_BD` is of each prompt's last token."""
        decoded = Decoded.empty(uniforms_BR, with_values=self.value_head is not None)
        ends = torch.tensor(sampling.end_token_ids, device=uniforms_BR.device)
        steps = uniforms_BR.shape[1]
        rows_B = torch.arange(len(uniforms_BR), device=uniforms_BR.device)  # the response of each live row of the cache
        for step in range(steps):
            logits_BV = decoder.logits(hidden_BD).float()
            if sampling.temperature != 1:
                logits_BV = logits_BV / sampling.temperature
            token_B, logprob_B = sample_tokens(logits_BV, uniforms_BR[rows_B, step])
            values_B = None if self.value_head is None else read_values(self.value_head, hidden_BD)
            ended_B = decoded.record(step, rows_B, (token_B, logprob_B, values_B), torch.isin(token_B, ends))
            if bool(ended_B.all()) or step == steps - 1:
                break
            keep = rows_to_keep(ended_B)
            if len(keep) <= (1 - COMPACT_SHARE) * len(rows_B):
                cache.select(keep)
                rows_B, token_B = rows_B[keep], token_B[keep]
            hidden_BD = decoder.step(token_B, cache)
        return decoded


@dataclass
class Decoded:
    """What has been sampled so far of B responses; R the most new tokens."""

    tokens_BR: Tensor
    logprobs_BR: Tensor
    values_BR: Tensor | None
    lengths_B: Tensor
    finished_B: Tensor

    @classmethod
    def empty(cls, like_BR: Tensor, *, with_values: bool) -> "Decoded":
        """Nothing sampled yet."""
        device, (batch, steps) = like_BR.device, like_BR.shape
        return cls(
            tokens_BR=torch.zeros(batch, steps, dtype=torch.long, device=device),
            logprobs_BR=torch.zeros_like(like_BR),
            values_BR=torch.zeros_like(like_BR) if with_values else None,
            lengths_B=torch.zeros(batch, dtype=torch.long, device=device),
            finished_B=torch.zeros(batch, dtype=torch.bool, device=device),
        )

    def record(
        self, step: int, rows_B: Tensor, sampled: tuple[Tensor, Tensor, Tensor | None], is_end_B: Tensor
    ) -> Tensor:
        """Notes one step of the responses `rows_B`, of which some ended before; which have ended now."""
        token_B, logprob_B, values_B = sampled
        live_B = ~self.finished_B[rows_B]
        live_rows = rows_B[live_B]
        self.tokens_BR[live_rows, step] = token_B[live_B]
        self.logprobs_BR[live_rows, step] = logprob_B[live_B]
        if self.values_BR is not None and values_B is not None:
            self.values_BR[live_rows, step] = values_B[live_B]
        self.lengths_B[live_rows] = step + 1
        self.finished_B[live_rows] = is_end_B[live_B]
        return self.finished_B[rows_B]

    def completions(self, version: int) -> Iterator[Completion]:
        """Each response, cut to its length, by the policy of this version."""
        values = [None] * len(self.lengths_B) if self.values_BR is None else self.values_BR.tolist()
        rows = zip(
            self.tokens_BR.tolist(),
            self.logprobs_BR.tolist(),
            self.lengths_B.tolist(),
            self.finished_B.tolist(),
            values,
            strict=True,
        )
        for tokens, logprobs, length, finished, own in rows:
            read = None if own is None else tuple(own[:length])
            yield Completion(tuple(tokens[:length]), tuple(logprobs[:length]), finished, read, version)


def rows_to_keep(ended_B: Tensor) -> Tensor:
    """The rows that go on, in their order, and as many ended ones as make their number a multiple of ROWS_MULTIPLE."""
    order_B = ended_B.int().sort(stable=True).indices
    live = len(ended_B) - int(ended_B.sum())
    return order_B[: -(-live // ROWS_MULTIPLE) * ROWS_MULTIPLE].sort().values


def sample_tokens(logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """A token a row drawn by inverse CDF from softmax(logits), and its log-probability in nats.

    The uniform number decides, not a generator shared by the batch; it never picks a token of probability zero.
    """
    highest_B = logits_BV.amax(1)
    cumulative_BV = (logits_BV - highest_B[:, None]).exp_().cumsum(1)
    total_B = cumulative_BV[:, -1]
    # Rounding can carry the target to the very end, where no token lies beyond it.
    below_B = torch.nextafter(total_B, torch.zeros_like(total_B))
    target_B = torch.minimum(uniform_B * total_B, below_B)
    token_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]
    return token_B, logits_BV.gather(1, token_B[:, None])[:, 0] - highest_B - total_B.log()


def _uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """Uniform numbers in [0, 1), one row a seed, drawn on the CPU whatever the device."""
    generator = torch.Generator()
    return torch.stack([torch.rand(steps, generator=generator.manual_seed(seed)) for seed in seeds])
