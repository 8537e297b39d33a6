"""Policies answering the same prompts with the same seeds, and how far each has moved from the first.

Legend: M response tokens, B responses.
"""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, replace

from torch import Tensor

from data.chat import ChatEncoder
from data.encoded import EncodedPrompt
from stages.core.bank import BankBuilder, PolicyBank, View
from stages.core.context import StageContext
from stages.core.logprobs import token_logprobs
from stages.core.models import end_tokens, load_model, resolve_model
from stages.core.responses import Responses, Sampler, kl_per_response
from stages.core.rollout.choice import choose_engine
from stages.core.rollout.native import NativeEngine
from stages.core.rollout.policy_files import PolicyFiles, policy_files
from stages.core.rollout.protocol import RolloutEngine, Sampling
from stages.core.rollout.start import FOLDER, computing_dtype, start_engine
from stages.core.sequences import ResponseBatch
from stages.core.trunk import Trunk, read_adapter
from stages.eval.config import EvalConfig

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


def answer(
    policy: Policy, view: View, engine: RolloutEngine, *, max_new_tokens: int, temperature: float, run_seed: int
) -> Responses:
    """One response to each prompt by an engine that has this policy; a prompt's seed is the same for every policy."""
    sampling = Sampling(max_new_tokens, temperature, end_tokens(policy.encoder, view.trunk.model))
    return Sampler(engine, policy.encoder, sampling, run_seed).respond(policy.prompts, "evaluation", 0)


@contextlib.contextmanager
def engine_of(context: StageContext[EvalConfig], policy: Policy, view: View) -> Generator[RolloutEngine]:
    """An engine that has the policy as its version 0; it is closed in the end."""
    config = context.config
    choice = choose_engine(config.rollout, "eval.rollout")
    engine = start_engine(
        choice,
        config.rollout,
        NativeEngine(view.trunk, view.adapter),
        lambda: files_of(policy.source, view),
        max_length=context.shared.max_length,
        responses=len(policy.prompts),
        folder=context.out / FOLDER,
    )
    with contextlib.closing(engine):
        engine.sync(0)
        yield engine


def files_of(source: str, view: View) -> PolicyFiles:
    """How a server gets the policy: its adapter, or the whole model as it was read."""
    found, dtype = resolve_model(source), computing_dtype(view.trunk)
    if view.adapter is not None:
        return policy_files(PolicyBank(view, view, source, found.base, 1.0), dtype)
    return PolicyFiles(
        found.base,
        "full",
        dtype,
        # Read anew: adapters may stand on the one in memory, and would be saved with it.
        lambda folder: load_model(found.base, head="lm", dtype=dtype).save_pretrained(str(folder)),
    )


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
