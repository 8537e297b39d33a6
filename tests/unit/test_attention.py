"""Packed attention: the same logits and gradients as documents run one by one or padded, and none of a neighbour."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.errors import UserError
from stages.core import attention, span_attention
from stages.core.attention import Layout, pack_layout
from stages.core.documents import one_by_one
from stages.core.kv_cache import DecodeStep, KvCache
from stages.core.models import backbone
from stages.core.sequences import PackedBatch
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mistral

CPU = torch.device("cpu")
LENGTHS = [3, 40, 9, 1, 30, 12, 40]  # four buckets: 40 40 30 | 12 9 | 3 | 1, and beyond a window of 8
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "mistral": tiny_mistral}


KERNELS = {  # SPAN_DEVICES, MERGED_TOKENS, SPAN_TOKENS, KEPT_KEYS
    "padded": ((), 64, 128, 512),
    "spans": (("cpu",), 64, 128, 512),
    "short spans": (
        ("cpu",),
        10,
        16,
        20,
    ),  # documents of LENGTHS are merged, cut, and their probabilities worked out anew
}


@pytest.fixture(params=KERNELS, autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How attention is worked out."""
    devices, merged, span, kept = KERNELS[request.param]
    monkeypatch.setattr(attention, "SPAN_DEVICES", devices)
    monkeypatch.setattr(span_attention, "MERGED_TOKENS", merged)
    monkeypatch.setattr(span_attention, "SPAN_TOKENS", span)
    monkeypatch.setattr(span_attention, "KEPT_KEYS", kept)


@pytest.fixture(params=MODELS)
def plain(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model with transformers' own attention."""
    build: Callable[[], PreTrainedModel] = MODELS[request.param]
    return build()


def documents(lengths: list[int] = LENGTHS, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]


def packing(model: PreTrainedModel) -> PreTrainedModel:
    """The model with our attention."""
    attention.register()
    twin = copy.deepcopy(model)
    twin.set_attn_implementation(attention.NAME)
    return twin


def packed_logits(model: PreTrainedModel, sequences: list[list[int]]) -> Tensor:
    batch = PackedBatch.of(sequences, CPU)
    output = model(input_ids=batch.tokens_1N, position_ids=batch.position_ids_1N, layout=batch.layout, use_cache=False)
    return output.logits[0]


def gradients(model: PreTrainedModel, logits_NV: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss that weighs every logit differently."""
    weights = torch.randn(logits_NV.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (logits_NV * weights).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_there_are_several_buckets() -> None:
    buckets = pack_layout(one_by_one(LENGTHS), CPU).buckets
    assert [bucket.shape for bucket in buckets] == [(3, 40), (2, 12), (1, 3), (1, 1)]


def test_logits_and_gradients_equal_documents_run_one_by_one(plain: PreTrainedModel) -> None:
    sequences, model = documents(), packing(plain)
    packed = packed_logits(model, sequences)
    single = torch.cat([plain(input_ids=torch.tensor([each]), use_cache=False).logits[0] for each in sequences])
    torch.testing.assert_close(packed, single, rtol=1e-5, atol=1e-5)

    ours, theirs = gradients(model, packed), gradients(plain, single)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_logits_equal_a_right_padded_batch(plain: PreTrainedModel) -> None:
    sequences = documents()
    mask_BS = torch.arange(max(LENGTHS))[None, :] < torch.tensor(LENGTHS)[:, None]
    tokens_BS = torch.zeros(mask_BS.shape, dtype=torch.long)
    tokens_BS[mask_BS] = torch.tensor([token for each in sequences for token in each])
    padded = plain(input_ids=tokens_BS, attention_mask=mask_BS.long(), use_cache=False).logits[mask_BS]
    torch.testing.assert_close(packed_logits(packing(plain), sequences), padded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[5], [6, 6, 6], [9, 5], [1, 1]])
def test_one_bucket_equals_one_by_one(plain: PreTrainedModel, lengths: list[int]) -> None:
    sequences = documents(lengths)
    single = torch.cat([plain(input_ids=torch.tensor([each]), use_cache=False).logits[0] for each in sequences])
    torch.testing.assert_close(packed_logits(packing(plain), sequences), single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", [1, 9, 20])
def test_a_prompt_that_is_held_once_gives_what_a_copy_for_each_gives(plain: PreTrainedModel, prompt: int) -> None:
    """Three responses to one prompt, in two buckets, beside two to another and a stranger: logits and gradients."""
    first, second = documents([prompt, 7], seed=3)
    rests = documents([2, 18, 20, 5, 1], seed=4)
    sequences = [[*first, *rests[0]], [*second, *rests[3]], [*first, *rests[1]], [*first, *rests[2]]]
    sequences += [[*second, *rests[4]], documents([6], seed=5)[0]]
    prompts = [prompt, 7, prompt, prompt, 7, 6]
    batch = PackedBatch.of(sequences, CPU, prompts=prompts)
    assert batch.tokens_1N.shape[1] == sum(map(len, sequences)) - 2 * prompt - 7
    model = packing(plain)
    logits_NV = model(
        input_ids=batch.tokens_1N, position_ids=batch.position_ids_1N, layout=batch.layout, use_cache=False
    ).logits[0]
    packed = torch.cat([logits_NV[document.places()] for document in batch.documents])
    single = torch.cat([plain(input_ids=torch.tensor([each]), use_cache=False).logits[0] for each in sequences])
    torch.testing.assert_close(packed, single, rtol=1e-5, atol=1e-5)

    ours, theirs = gradients(model, packed), gradients(plain, single)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


@torch.no_grad()
def test_a_document_changes_no_other_bit_for_bit(plain: PreTrainedModel) -> None:
    model, sequences = packing(plain), documents()
    before = packed_logits(model, sequences).split(LENGTHS)
    for changed in range(len(sequences)):
        other = [*sequences[:changed], documents(seed=9)[changed], *sequences[changed + 1 :]]
        after = packed_logits(model, other).split(LENGTHS)
        for row, (old, new) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(old, new) == (row != changed)


@torch.no_grad()
def test_a_token_changes_nothing_before_it(plain: PreTrainedModel) -> None:
    model, (sequence,) = packing(plain), documents([30])
    before = packed_logits(model, [sequence])
    after = packed_logits(model, [[*sequence[:17], 299, *sequence[18:]]])
    assert torch.equal(before[:17], after[:17])
    assert not torch.equal(before[17:], after[17:])


@torch.no_grad()
def test_decoding_over_the_cache_equals_the_whole_sequence(plain: PreTrainedModel) -> None:
    model, sequences, prompts = packing(plain), documents([15, 26, 13]), [4, 15, 2]
    cache = KvCache(capacity=26)
    packed = PackedBatch.of([each[:cut] for each, cut in zip(sequences, prompts, strict=True)], CPU)
    layout = pack_layout(one_by_one(prompts), CPU, cache)
    body = backbone(model)
    body(input_ids=packed.tokens_1N, position_ids=packed.position_ids_1N, layout=layout, use_cache=False)
    whole = [backbone(plain)(input_ids=torch.tensor([each])).last_hidden_state[0] for each in sequences]
    for step in range(11):  # until a window of 8 has left the first of them behind
        new = torch.tensor([[each[cut + step] for each, cut in zip(sequences, prompts, strict=True)]])
        output = body(
            input_ids=new, position_ids=cache.lengths_B[None], layout=Layout(step=DecodeStep(cache)), use_cache=False
        )
        cache.advance()
        expected = torch.stack([hidden[cut + step] for hidden, cut in zip(whole, prompts, strict=True)])
        torch.testing.assert_close(output.last_hidden_state[0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_selected_cache_rows_continue_as_their_own_sequence() -> None:
    model, sequences = packing(tiny_llama()), documents([6, 11])
    cache = KvCache(capacity=16)
    packed = PackedBatch.of(sequences, CPU)
    layout = pack_layout(one_by_one([6, 11]), CPU, cache)
    backbone(model)(input_ids=packed.tokens_1N, position_ids=packed.position_ids_1N, layout=layout, use_cache=False)
    cache.select(torch.tensor([1, 0, 1]))
    new = torch.tensor([[50, 60, 70]])
    output = backbone(model)(
        input_ids=new, position_ids=cache.lengths_B[None], layout=Layout(step=DecodeStep(cache)), use_cache=False
    )
    expected = [
        backbone(model)(
            input_ids=torch.tensor([[*sequences[row], token]]),
            position_ids=torch.arange(len(sequences[row]) + 1)[None],
            layout=pack_layout(one_by_one([len(sequences[row]) + 1]), CPU),
            use_cache=False,
        ).last_hidden_state[0, -1]
        for row, token in ((1, 50), (0, 60), (1, 70))
    ]
    torch.testing.assert_close(output.last_hidden_state[0], torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_close_to_float32() -> None:
    model, sequences = packing(tiny_llama()), documents()
    exact = packed_logits(model, sequences)
    rough = packed_logits(copy.deepcopy(model).to(torch.bfloat16), sequences)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.02)


def test_spans_are_worked_out_in_float32_under_autocast_too() -> None:
    inputs = [torch.randn(9, heads, 4, requires_grad=True) for heads in (4, 2, 2)]
    spans = pack_layout(one_by_one([5, 4]), CPU).spans
    found: list[list[Tensor]] = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out_NHE = span_attention.SpanAttention.apply(*inputs, spans, None, None)
        found.append([out_NHE, *torch.autograd.grad(out_NHE.square().sum(), inputs)])
    for plain, lowered in zip(*found, strict=True):
        assert torch.equal(plain, lowered)


def test_tokens_of_no_document_get_nothing_and_give_nothing() -> None:
    inputs = [torch.randn(9, heads, 4, requires_grad=True) for heads in (4, 2, 2)]
    spans = pack_layout(one_by_one([4, 3]), CPU).spans
    torch.use_deterministic_algorithms(True)  # memory that nobody fills holds nan
    try:
        out_NHE = span_attention.SpanAttention.apply(*inputs, spans, None, None)
        found = [out_NHE, *torch.autograd.grad(out_NHE.sum(), inputs)]
    finally:
        torch.use_deterministic_algorithms(False)
    for each in found:
        assert each[:7].abs().sum() > 0
        assert torch.equal(each[7:], torch.zeros_like(each[7:]))


def test_a_model_that_passes_no_layout_is_refused() -> None:
    model = packing(tiny_llama())
    with pytest.raises(UserError, match="packing=true"):
        model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
