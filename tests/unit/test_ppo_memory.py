"""No tensor of tokens x vocabulary: the largest one alive in scoring and update has a stated bound."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.core import logprobs, span_attention
from stages.core.blocks import FastBlock
from tests.largest import Largest
from tests.tiny import tiny_model_folder
from tests.tiny_ppo import (
    CPU,
    assert_same,
    gradients,
    make_bank,
    make_experience,
    ppo_config,
    still_updater,
)

VOCABULARY_ROWS = 7  # tokens whose logits may be alive at once
SPAN_TOKENS = 16  # of a span, whose attention scores are alive at once


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("critic", ["adapter", "shared"])
@pytest.mark.parametrize("length", [10, 40])
def test_scoring_and_update_never_hold_tokens_times_vocabulary(
    base: Path, monkeypatch: pytest.MonkeyPatch, critic: str, length: int
) -> None:
    """The bound: one chunk of logits, one copy of the head, or one activation of all tokens, whichever is largest."""
    bank = make_bank(base, critic)
    head_VD = bank.policy.trunk.lm_head.weight
    vocabulary, hidden = head_VD.shape
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", {"cpu": VOCABULARY_ROWS * vocabulary})
    for name in ("MERGED_TOKENS", "SPAN_TOKENS"):
        monkeypatch.setattr(span_attention, name, SPAN_TOKENS)
    config = ppo_config(response_length=length, microbatch_tokens=10_000)
    experience = make_experience(bank, base, config)
    batch = experience.responses.batch(range(len(experience.score_B)), CPU)
    widest = bank.policy.trunk.model.config.intermediate_size
    bound = max(VOCABULARY_ROWS * vocabulary, vocabulary * hidden, batch.packed.tokens_1N.numel() * widest)
    with Largest() as largest:
        bank.ref_logprobs(batch)
        with torch.no_grad():
            bank.values(batch)
        still_updater(bank, config).update(experience, 1, kl_coef=0.1)
    assert largest.numel <= bound < len(batch.targets_M) * vocabulary


@pytest.mark.parametrize("method", ["lora", "full"])
def test_recomputed_blocks_keep_their_inputs_alone_and_change_no_gradient(base: Path, method: str) -> None:
    """Two blocks keep one tensor of N x D each; written out they keep a dozen, some of them wider."""
    kept: list[list[Tensor]] = []
    found: list[dict[str, Tensor]] = []
    for recompute in (False, True):
        bank, config = make_bank(base, "shared", method, gradient_checkpointing=recompute), ppo_config()
        experience = make_experience(bank, base, config)
        batch = experience.responses.batch(range(len(experience.score_B)), CPU)
        own: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each, own=own: own.append(each) or each, lambda each: each
        ):
            logprobs_M = bank.outputs(batch).logprobs_M
        tokens, hidden = batch.packed.tokens_1N.numel(), bank.policy.trunk.width
        kept.append([each for each in own if each.shape[-2:] == (tokens, hidden)])
        logprobs_M.sum().backward()
        found.append(gradients(bank))
        blocks = [module for module in bank.policy.trunk.model.modules() if isinstance(module, FastBlock)]
        assert [block.training for block in blocks] == [False, False]
    assert len(kept[1]) < len(kept[0])
    assert_same(found[1], found[0])
