"""The last block on chosen tokens only, as far as it can be: same states, same gradients, no trace left behind."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.core import attention, blocks
from stages.core.kv_cache import KvCache
from stages.core.models import backbone
from stages.core.sequences import PackedBatch, ResponseBatch
from stages.core.span_attention import SpanAttention
from stages.core.trim import last_block, trimmed
from stages.core.trunk import Trunk
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen3

CPU = torch.device("cpu")
SEQUENCES = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13]]
PLACES_M = torch.tensor([1, 4, 6, 9, 10])


def packing(model: PreTrainedModel, *, written_out: bool = True) -> PreTrainedModel:
    attention.register()
    model.set_attn_implementation(attention.NAME)
    if written_out:
        blocks.speed_up(model)
    return model


@pytest.mark.parametrize("written_out", [True, False])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_mistral])
def test_states_at_the_places_are_those_of_a_whole_pass(build: object, written_out: bool) -> None:
    trunk = Trunk(packing(build(), written_out=written_out), CPU)  # type: ignore[operator]
    packed = PackedBatch.of(SEQUENCES, CPU)
    with torch.no_grad():
        whole_ND = trunk.hidden(packed, None)
        some_MD = trunk.hidden_at(packed, None, PLACES_M)
        again_ND = trunk.hidden(packed, None)
    torch.testing.assert_close(some_MD, whole_ND[PLACES_M], rtol=1e-5, atol=1e-6)
    assert torch.equal(whole_ND, again_ND)


def assert_a_whole_pass_gives_the_same(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], places_M: Tensor, prompts: Sequence[int] | None = None
) -> None:
    """States and gradients of every parameter, of a loss that tells the places apart."""

    def outcome(trim: bool) -> list[Tensor]:
        trunk = Trunk(copy.deepcopy(model), CPU)
        trunk.train(trunk.backbone.parameters())
        packed = PackedBatch.of(sequences, CPU, prompts=prompts)
        some_MD = trunk.hidden_at(packed, None, places_M) if trim else trunk.hidden(packed, None)[places_M]
        (some_MD * torch.arange(some_MD.numel()).view_as(some_MD).sin()).sum().backward()
        return [some_MD.detach(), *(each.grad for each in trunk.backbone.parameters() if each.grad is not None)]

    ours, whole = outcome(True), outcome(False)
    assert len(ours) == len(whole) > 10
    for mine, expected in zip(ours, whole, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("written_out", [True, False])
def test_gradients_are_those_of_a_whole_pass(written_out: bool) -> None:
    assert_a_whole_pass_gives_the_same(packing(tiny_llama(), written_out=written_out), SEQUENCES, PLACES_M)


@pytest.mark.parametrize("build", [tiny_llama, tiny_mistral, tiny_qwen3])
def test_so_they_are_where_documents_are_cut_share_a_prompt_or_have_nobody_who_asks(build: object) -> None:
    """Of a document of 280 tokens, cut in three, nothing before its last part is read, and of the next one nothing."""
    prompt = [3, 4, 5]
    sequences = [[3 + place % 50 for place in range(280)], [8] * 70, [*prompt, 9, 10], [*prompt, 11], [*prompt, 12, 13]]
    # The shared prompt stands at 350, its responses at 353, 355 and 356.
    places_M = torch.tensor([357, 250, 186, 279, 352, 353, 355])
    assert_a_whole_pass_gives_the_same(packing(build()), sequences, places_M, [0, 0, 3, 3, 3])  # type: ignore[operator]


@pytest.mark.parametrize("fills", [False, True])
def test_tokens_that_nobody_reads_do_not_ask_in_the_last_block(monkeypatch: pytest.MonkeyPatch, fills: bool) -> None:
    """Nor do they where the pass fills a cache with everybody's keys."""
    packed = PackedBatch.of(SEQUENCES, CPU)
    if fills:
        packed = replace(packed, layout=attention.pack_layout(packed.documents, CPU, KvCache(8)))
    seen: list[tuple[int, int]] = []
    apply = SpanAttention.apply

    def counted(query_MHE: Tensor, key_NGE: Tensor, *others: object) -> Tensor:
        seen.append((len(query_MHE), len(key_NGE)))
        return apply(query_MHE, key_NGE, *others)

    monkeypatch.setattr(SpanAttention, "apply", counted)
    with torch.no_grad():
        Trunk(packing(tiny_llama()), CPU).hidden_at(packed, None, PLACES_M)
    tokens = sum(map(len, SEQUENCES))
    assert seen == [(tokens, tokens), (len(PLACES_M), tokens)]


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("written_out", [True, False])
def test_responses_that_share_a_prompt_give_the_states_and_gradients_of_copies(
    written_out: bool, multiple: int
) -> None:
    """The prompt's last token is read once for each response: every reader's gradient counts once."""

    def outcome(share_prompts: bool) -> list[Tensor]:
        trunk = Trunk(packing(tiny_llama(), written_out=written_out), CPU)
        trunk.multiple = multiple
        trunk.train(trunk.backbone.parameters())
        responses = [[13, 14], [15], [16, 17, 18], [19]]
        batch = ResponseBatch.of([[3, 4, 5], [3, 4, 5], [6], [3, 4, 5]], responses, CPU, share_prompts=share_prompts)
        states_MD = trunk.hidden_at(batch.packed, None, batch.before_M)
        (states_MD * torch.arange(states_MD.numel()).view_as(states_MD).sin()).sum().backward()
        return [states_MD.detach(), *(each.grad for each in trunk.backbone.parameters() if each.grad is not None)]

    shared, apart = outcome(True), outcome(False)
    assert len(shared) == len(apart) > 10
    for mine, expected in zip(shared, apart, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_only_the_chosen_tokens_go_through_the_last_feed_forward_part() -> None:
    model = packing(tiny_llama(), written_out=False)
    trunk, seen = Trunk(model, CPU), []
    last = last_block(backbone(model))
    assert last is model.model.layers[-1]
    last.mlp.gate_proj.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    with torch.no_grad():
        trunk.hidden_at(PackedBatch.of(SEQUENCES, CPU), None, PLACES_M)
    assert seen == [len(PLACES_M)]


def test_only_the_chosen_tokens_go_through_the_end_of_a_written_out_block(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    apply = blocks.FeedForward.apply

    def counted(spec: object, x_ND: Tensor, *others: object) -> Tensor:
        seen.append(len(x_ND))
        return apply(spec, x_ND, *others)

    monkeypatch.setattr(blocks.FeedForward, "apply", counted)
    with torch.no_grad():
        Trunk(packing(tiny_llama()), CPU).hidden_at(PackedBatch.of(SEQUENCES, CPU), None, PLACES_M)
    assert seen == [sum(map(len, SEQUENCES)), len(PLACES_M)]


def test_under_autocast_the_last_feed_forward_part_is_trimmed_too() -> None:
    """There transformers' own layers run inside the block."""
    trunk = Trunk(packing(tiny_llama()), CPU, autocast=True)
    trunk.multiple = 1
    packed, seen = PackedBatch.of(SEQUENCES, CPU), []
    trunk.model.model.layers[-1].mlp.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    with torch.no_grad():
        whole_ND = trunk.hidden(packed, None)
        some_MD = trunk.hidden_at(packed, None, PLACES_M)
    assert seen == [sum(map(len, SEQUENCES)), len(PLACES_M)]
    torch.testing.assert_close(some_MD, whole_ND[PLACES_M], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("written_out", [True, False])
def test_a_failed_pass_leaves_no_trace(written_out: bool) -> None:
    body = backbone(packing(tiny_llama(), written_out=written_out))
    with pytest.raises(RuntimeError, match="stop"), trimmed(body, PLACES_M):
        raise RuntimeError("stop")
    last = last_block(body)
    assert getattr(last, "reads_M", None) is None
    assert not last.mlp._forward_hooks
    assert not last.mlp._forward_pre_hooks


def test_a_model_of_unknown_shape_runs_whole() -> None:
    assert last_block(torch.nn.Linear(2, 2)) is None
    with trimmed(torch.nn.Linear(2, 2), PLACES_M):
        pass


def test_padding_behind_the_documents_changes_nothing() -> None:
    """A bfloat16 trunk on a CPU takes multiples of tokens; what is added must not show."""
    model = packing(tiny_llama()).to(torch.bfloat16)
    trunk = Trunk(model, CPU)
    assert trunk.multiple == 128
    packed = PackedBatch.of(SEQUENCES, CPU)
    with torch.no_grad():
        padded_ND, some_MD = trunk.hidden(packed, None), trunk.hidden_at(packed, None, PLACES_M)
        trunk.multiple = 1
        plain_ND = trunk.hidden(packed, None)
    torch.testing.assert_close(padded_ND, plain_ND, rtol=0.02, atol=0.02)  # other kernels round otherwise
    torch.testing.assert_close(some_MD, plain_ND[PLACES_M], rtol=0.02, atol=0.02)


def test_padding_is_exact_in_float32() -> None:
    trunk = Trunk(packing(tiny_llama()), CPU)
    assert trunk.multiple == 1
    packed = PackedBatch.of(SEQUENCES, CPU)
    with torch.no_grad():
        plain_ND = trunk.hidden(packed, None)
        trunk.multiple = 16
        padded_ND, some_MD = trunk.hidden(packed, None), trunk.hidden_at(packed, None, PLACES_M)
    torch.testing.assert_close(padded_ND, plain_ND, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(some_MD, plain_ND[PLACES_M], rtol=1e-5, atol=1e-6)
