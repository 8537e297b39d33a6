"""Policies answering the same prompts with the same seeds, and how far each has moved from the first.

Legend: M response tokens, B responses.
"""

from dataclasses import dataclass

import torch

from data.chat import ChatEncoder, load_tokenizer
from data.encoded import EncodedPrompt
from stages.core.bank import BankBuilder, View
from stages.core.config import SharedConfig
from stages.core.logprobs import token_logprobs
from stages.core.models import load_model, resolve_model
from stages.core.rewards import Answered
from stages.core.rollout.native import NativeEngine
from stages.core.rollout.protocol import Completion, Sampling, rollout_seed
from stages.core.sequences import ResponseBatch, split_by_budget
from stages.core.trunk import Trunk, read_adapter

BATCH_TOKENS = 16384


@dataclass(frozen=True)
class Policy:
    """A policy to evaluate: where it comes from, how it reads text, and the prompts as its token ids."""

    name: str
    source: str
    encoder: ChatEncoder
    prompts: list[EncodedPrompt]


@dataclass(frozen=True)
class Answers:
    """What one policy said to its B prompts."""

    policy: Policy
    completions: list[Completion]
    texts: list[str]

    @property
    def lengths(self) -> list[float]:
        """Tokens of each response, its end token included."""
        return [float(len(completion.tokens)) for completion in self.completions]

    @property
    def finished(self) -> list[bool]:
        """Whether each response ended by itself."""
        return [completion.finished for completion in self.completions]

    def answered(self) -> Answered:
        """The texts, for a scorer."""
        rows = [prompt.row for prompt in self.policy.prompts]
        return Answered([row.prompt for row in rows], self.texts, self.finished, [row.extra for row in rows])


def open_encoder(source: str, shared: SharedConfig) -> ChatEncoder:
    """How a policy reads text; its weights are loaded later."""
    tokenizer = load_tokenizer(resolve_model(source).folder, shared.chat_template)
    return ChatEncoder(tokenizer, max_length=shared.max_length, overlong=shared.overlong)


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


def answer(policy: Policy, view: View, *, max_new_tokens: int, temperature: float, run_seed: int) -> Answers:
    """One response to each prompt; a prompt's seed is the same for every policy."""
    seeds = [[rollout_seed(run_seed, "evaluation", 0, place, 0)] for place in range(len(policy.prompts))]
    sampling = Sampling(max_new_tokens, temperature, policy.encoder.end_token_ids)
    grouped = NativeEngine(view.trunk, view.adapter).generate(
        [prompt.tokens for prompt in policy.prompts], sampling, seeds
    )
    completions = [group[0] for group in grouped]
    texts = [policy.encoder.decode_response(list(completion.tokens)) for completion in completions]
    return Answers(policy, completions, texts)


@torch.no_grad()
def kl_to_reference(reference: Policy, view: View, answers: Answers, *, temperature: float) -> list[float] | None:
    """Sum over each response of log pi - log pi_ref at its sampled tokens: unbiased, in nats per response.

    `view` is the reference's; it reads the prompt through its own chat template. None where the two policies have
    different vocabularies: their log-probabilities are of different things.
    """
    if answers.policy.encoder.tokenizer.get_vocab() != reference.encoder.tokenizer.get_vocab():
        return None
    prompts = [prompt.tokens for prompt in reference.prompts]
    responses = [completion.tokens for completion in answers.completions]
    sizes = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    kl_B: list[float] = []
    for rows in split_by_budget(sizes, BATCH_TOKENS):
        batch = ResponseBatch.of([prompts[row] for row in rows], [responses[row] for row in rows], view.trunk.device)
        hidden_MD = view.hidden_before(batch)
        logprobs_M = token_logprobs(hidden_MD, view.trunk.lm_head, batch.targets_M, temperature).double().cpu()
        for row, ref_R in zip(rows, logprobs_M.split(list(batch.lengths)), strict=True):
            kl_B.append(sum(answers.completions[row].logprobs) - float(ref_R.sum()))
    return kl_B
