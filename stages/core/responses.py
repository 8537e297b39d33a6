"""Sampled responses: drawn by an engine, decoded, and cut into batches for whoever judges them.

Legend: B responses, R longest response, M response tokens one after the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.chat import ChatEncoder
from data.encoded import EncodedPrompt
from stages.core import ranks
from stages.core.portions import Row, number_prompts, share_rows, split_rows
from stages.core.rewards import Answered
from stages.core.rollout.protocol import Completion, EngineError, RolloutEngine, Sampling, rollout_seed
from stages.core.sequences import ResponseBatch


@dataclass(frozen=True)
class Responses:
    """B sampled responses with the prompt of each."""

    prompts: list[EncodedPrompt]
    completions: list[Completion]
    texts: list[str]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response, its end token included."""
        return [len(completion.tokens) for completion in self.completions]

    @property
    def finished(self) -> list[bool]:
        """Whether each response ended by itself."""
        return [completion.finished for completion in self.completions]

    def mask(self) -> Tensor:
        """response_mask_BR."""
        return torch.arange(max(self.lengths))[None, :] < torch.tensor(self.lengths)[:, None]

    def logprobs(self) -> Tensor:
        """Log-probabilities M at sampling time, as the engine reported them."""
        return torch.tensor([logprob for completion in self.completions for logprob in completion.logprobs])

    def values(self) -> Tensor | None:
        """The critic's values M as read while decoding, or None where the engine read none."""
        values = [completion.values for completion in self.completions]
        if any(each is None for each in values):
            return None
        return torch.tensor([value for each in values if each is not None for value in each])

    def batch(self, rows: Sequence[int], device: torch.device) -> ResponseBatch:
        """The rows' prompts and responses, packed."""
        prompts = [self.prompts[row].tokens for row in rows]
        return ResponseBatch.of(prompts, [self.completions[row].tokens for row in rows], device)

    def share(self, rows: Sequence[int]) -> list[int]:
        """This rank's part of `rows`, in their order; may be empty."""
        return [rows[place] for place in share_rows(self._read(rows))]

    def microbatches(self, rows: Sequence[int], max_tokens: int) -> list[list[int]]:
        """`rows` in consecutive groups whose batch has at most `max_tokens` tokens (a longer row stands alone)."""
        return [[rows[place] for place in group] for group in split_rows(self._read(rows), max_tokens)]

    def shortest(self, rows: Sequence[int]) -> int:
        """The row with the fewest tokens."""
        return min(rows, key=lambda row: len(self.prompts[row].tokens) + len(self.completions[row].tokens))

    def _read(self, rows: Sequence[int]) -> list[Row]:
        return number_prompts((self.prompts[row].tokens, len(self.completions[row].tokens)) for row in rows)

    def answered(self) -> Answered:
        """The texts, for a scorer."""
        rows = [prompt.row for prompt in self.prompts]
        return Answered([row.prompt for row in rows], self.texts, self.finished, [row.extra for row in rows])


@dataclass(frozen=True)
class Sampler:
    """Draws responses to prompts; the same seeds give the same responses whatever stood in the batch beside them."""

    engine: RolloutEngine
    encoder: ChatEncoder
    sampling: Sampling
    run_seed: int

    def respond(
        self, prompts: Sequence[EncodedPrompt], purpose: str, update: int, samples: int = 1, *, version: int = 0
    ) -> Responses:
        """`samples` responses to each prompt, a prompt's own beside each other."""
        completions = self.draw(prompts, purpose, update, samples, version=version)
        return self.read(prompts, completions, samples)

    def draw(
        self, prompts: Sequence[EncodedPrompt], purpose: str, update: int, samples: int = 1, *, version: int = 0
    ) -> list[Completion]:
        """What the engine answers, not decoded yet: all that a thread beside the training does.

        `version` is the policy that was handed over last. Raises EngineError where another one answered, or too few.
        """
        seeds = [
            [rollout_seed(self.run_seed, purpose, update, place, sample) for sample in range(samples)]
            for place in range(len(prompts))
        ]
        grouped = self.engine.generate([prompt.tokens for prompt in prompts], self.sampling, seeds)
        if [len(group) for group in grouped] != [samples] * len(prompts):
            raise EngineError(f"rollout engine: answered {sum(map(len, grouped))} of {samples * len(prompts)} requests")
        completions = [completion for group in grouped for completion in group]
        check_versions(completions, version)
        return completions

    def read(self, prompts: Sequence[EncodedPrompt], completions: Sequence[Completion], samples: int = 1) -> Responses:
        """Completions as `draw` gave them, with their texts."""
        texts = [self.encoder.decode_response(list(completion.tokens)) for completion in completions]
        return Responses([prompt for prompt in prompts for _ in range(samples)], list(completions), texts)


def check_versions(completions: Sequence[Completion], version: int) -> None:
    """Raises EngineError where not all completions are by the policy of this version."""
    found = sorted({completion.version for completion in completions})
    if found != [version]:
        raise EngineError(
            f"rollout engine: asked for policy version {version}, and version {', '.join(map(str, found))} answered; "
            "a mixed or stale batch is not trained on"
        )


@torch.no_grad()
def kl_per_response(
    responses: Responses,
    ref_logprobs: Callable[[ResponseBatch], Tensor],
    *,
    max_tokens: int,
    device: torch.device,
) -> list[float]:
    """KL(policy || reference) of each response in nats: log pi - log pi_ref summed over its sampled tokens (k1).

    Each rank asks for its part. `ref_logprobs` gives the reference's log-probabilities M of a batch's response tokens.
    """
    own = responses.share(range(len(responses.completions)))
    kls: list[tuple[int, float]] = []
    for rows in responses.microbatches(own, max_tokens):
        batch = responses.batch(rows, device)
        ref_parts = ref_logprobs(batch).double().cpu().split(list(batch.lengths))
        for row, ref_R in zip(rows, ref_parts, strict=True):
            kls.append((row, sum(responses.completions[row].logprobs) - float(ref_R.sum())))
    return [kl for _, kl in sorted(ranks.gather_lists(kls))]
