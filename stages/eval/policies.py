"""Policies answering the same prompts with the same seeds, and how far each has moved from the first.

Legend: M response tokens, B responses.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from data.chat import ChatEncoder
from data.encoded import EncodedPrompt
from stages.core.bank import BankBuilder, View
from stages.core.logprobs import token_logprobs
from stages.core.models import end_tokens, load_model, resolve_model
from stages.core.responses import Responses, Sampler, kl_per_response
from stages.core.rollout.native import NativeEngine
from stages.core.rollout.protocol import Sampling
from stages.core.sequences import ResponseBatch
from stages.core.trunk import Trunk, read_adapter

BATCH_TOKENS = 16384


@dataclass(frozen=True)
class Policy:
    """A policy to evaluate: where it comes from, how it reads text, and the prompts as its token ids."""

    name: str
    source: str
    encoder: ChatEncoder
    prompts: list[EncodedPrompt]


def load_view(source: str, name: str, builder: BankBuilder) -> View:
    """A frozen policy; adapters on the base that `builder` holds already share it."""
    found = resolve_model(source)
    if builder.frozen is not None and builder.frozen_base == found.base:
        trunk = builder.frozen
    else:
        trunk = Trunk(load_model(found.base, head="lm", dtype=builder.shared.dtype), builder.device)
        trunk.check_head()
    if builder.frozen is None:
        builder.frozen, builder.frozen_base = trunk, found.base
    if found.adapter is None:
        return View(trunk, None)
    config, weights, _ = read_adapter(found.adapter)
    trunk.add_adapter(name, config, weights)
    return View(trunk, name)


def answer(policy: Policy, view: View, *, max_new_tokens: int, temperature: float, run_seed: int) -> Responses:
    """One response to each prompt; a prompt's seed is the same for every policy."""
    sampling = Sampling(max_new_tokens, temperature, end_tokens(policy.encoder, view.trunk.model))
    sampler = Sampler(NativeEngine(view.trunk, view.adapter), policy.encoder, sampling, run_seed)
    return sampler.respond(policy.prompts, "evaluation", 0)


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
