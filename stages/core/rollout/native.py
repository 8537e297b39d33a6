"""Rollouts in this process, on any device: it is the policy itself, so there is nothing to sync.

Prompts are run once each, packed; their samples share that prefill. A decoding step costs one token per unfinished
response: finished ones leave the cache.

Legend: B unfinished responses, V vocabulary, R most new tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.core.attention import KvCache, decode_layout, pack_layout
from stages.core.rollout.protocol import Completion, Sampling
from stages.core.sequences import PackedBatch, split_by_budget
from stages.core.trunk import Trunk

# Finished responses are dropped from the cache once they make up this share: each drop copies the cache.
COMPACT_SHARE = 0.125


class NativeEngine:
    """Samples from a trunk under one of its adapters."""

    def __init__(self, trunk: Trunk, adapter: str | None, *, batch_size: int = 256) -> None:
        self.trunk = trunk
        self.adapter = adapter
        self.batch_size = batch_size

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """For each prompt one completion a seed, decoded at most `batch_size` responses at a time."""
        completions: list[list[Completion]] = []
        with self.trunk.folded(self.adapter):
            for group in split_by_budget([len(each) for each in seeds], self.batch_size):
                completions += self._generate_group([prompts[i] for i in group], sampling, [seeds[i] for i in group])
        return completions

    def close(self) -> None:
        """Nothing to release: the policy belongs to the trainer."""

    def _generate_group(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        device = self.trunk.device
        cache = KvCache(capacity=max(map(len, prompts)) + sampling.max_new_tokens)
        packed = PackedBatch.of(prompts, device)
        layout = pack_layout([len(prompt) for prompt in prompts], device, cache)
        hidden_ND = self.trunk.step(packed.tokens_1N, packed.position_ids_1N, layout, self.adapter)
        owners = [row for row, own in enumerate(seeds) for _ in own]
        owner_B = torch.tensor(owners, device=device)
        cache.select(owner_B)
        flat_seeds = [seed for own in seeds for seed in own]
        uniforms_BR = _uniforms(flat_seeds, sampling.max_new_tokens).to(device)
        tokens_BR, logprobs_BR, lengths_B, finished_B = self._decode(
            cache, hidden_ND[packed.last_B][owner_B], uniforms_BR, sampling
        )
        completions: list[list[Completion]] = [[] for _ in prompts]
        rows = zip(
            owners, tokens_BR.tolist(), logprobs_BR.tolist(), lengths_B.tolist(), finished_B.tolist(), strict=True
        )
        for owner, tokens, logprobs, length, finished in rows:
            completions[owner].append(Completion(tuple(tokens[:length]), tuple(logprobs[:length]), finished))
        return completions

    def _decode(
        self, cache: KvCache, hidden_BD: Tensor, uniforms_BR: Tensor, sampling: Sampling
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sampled tokens BR, their log-probabilities BR, lengths B and whether each ended B."""
        batch, steps = uniforms_BR.shape
        device = uniforms_BR.device
        tokens_BR = torch.zeros(batch, steps, dtype=torch.long, device=device)
        logprobs_BR = torch.zeros(batch, steps, device=device)
        lengths_B = torch.full((batch,), steps, device=device)
        finished_B = torch.zeros(batch, dtype=torch.bool, device=device)
        ends = torch.tensor(sampling.end_token_ids, device=device)
        rows_B = torch.arange(batch, device=device)  # which response each live row of the cache is
        for step in range(steps):
            logits_BV = self.trunk.lm_head(hidden_BD).float() / sampling.temperature
            token_B, logprob_B = sample_tokens(logits_BV, uniforms_BR[rows_B, step])
            live_B = ~finished_B[rows_B]
            tokens_BR[rows_B, step] = torch.where(live_B, token_B, 0)
            logprobs_BR[rows_B, step] = torch.where(live_B, logprob_B, 0.0)
            ended_B = torch.isin(token_B, ends) & live_B
            lengths_B[rows_B[ended_B]] = step + 1
            finished_B[rows_B[ended_B]] = True
            keep = (live_B & ~ended_B).nonzero()[:, 0]
            if len(keep) == 0 or step == steps - 1:
                break
            if len(keep) <= (1 - COMPACT_SHARE) * len(rows_B):
                cache.select(keep)
                rows_B, token_B = rows_B[keep], token_B[keep]
            hidden_BD = self.trunk.step(token_B[None], cache.lengths_B[None], decode_layout(cache), self.adapter)
            cache.lengths_B = cache.lengths_B + 1
        return tokens_BR, logprobs_BR, lengths_B, finished_B


def sample_tokens(logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """A token a row drawn by inverse CDF from softmax(logits), and its log-probability in nats.

    The uniform number decides, not a generator shared by the batch; it never picks a token of probability zero.
    """
    logprobs_BV = logits_BV.log_softmax(1)
    cumulative_BV = logprobs_BV.exp().cumsum(1)
    target_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
    token_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
    # Rounding can carry the target to the very end: the last token with any probability is meant then.
    token_B = torch.minimum(token_B, (cumulative_BV < cumulative_BV[:, -1:]).sum(1))
    return token_B, logprobs_BV.gather(1, token_B[:, None])[:, 0]


def _uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """Uniform numbers in [0, 1), one row a seed, drawn on the CPU whatever the device."""
    generator = torch.Generator()
    return torch.stack([torch.rand(steps, generator=generator.manual_seed(seed)) for seed in seeds])
