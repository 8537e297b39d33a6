"""Policies answering the same prompts with the same seeds, and how far each has moved from the first.

Legend: M response tokens, B responses.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from data.chat import ChatEncoder
from data.encoded import EncodedPrompt
from stages.core.bank import View
from stages.core.logprobs import token_logprobs
from stages.core.models import end_tokens
from stages.core.responses import Responses, Sampler, kl_per_response
from stages.core.rollout.protocol import RolloutEngine, Sampling
from stages.core.sequences import ResponseBatch

BATCH_TOKENS = 16384


@dataclass(frozen=True)
class Policy:
    """A policy to evaluate: where it comes from, how it reads text, and the prompts as its token ids."""

    name: str
    source: str
    encoder: ChatEncoder
    prompts: list[EncodedPrompt]


def answer(
    policy: Policy, view: View, engine: RolloutEngine, *, max_new_tokens: int, temperature: float, run_seed: int
) -> Responses:
    """One response to each prompt by an engine that has this policy; a prompt's seed is the same for every policy."""
    sampling = Sampling(max_new_tokens, temperature, end_tokens(policy.encoder, view.trunk.model))
    return Sampler(engine, policy.encoder, sampling, run_seed).respond(policy.prompts, "evaluation", 0)


def kl_to_reference(
    reference: Policy, view: View, policy: Policy, responses: Responses, *, temperature: float
) -> list[float] | None:
    """KL of each of the policy's responses to the reference, in nats per response.

    `view` is the reference's; it reads the prompt through its own chat template. None where the two policies have
    different vocabularies: their log-probabilities are of different things.
    """
    if policy.encoder.tokenizer.get_vocab() != reference.encoder.tokenizer.get_vocab():
        return None

    def ref_logprobs(batch: ResponseBatch) -> Tensor:
        return token_logprobs(view.hidden_before(batch), view.trunk.lm_head, batch.targets_M, temperature)

    as_read = replace(responses, prompts=reference.prompts)
    return kl_per_response(as_read, ref_logprobs, max_tokens=BATCH_TOKENS, device=view.trunk.device)
