"""Packed batches of sft and rm: documents do not see each other, padding and masks have no effect, order is exact."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from data.encoded import EncodedDemonstration
from stages.core import attention
from stages.core.documents import one_by_one
from stages.core.padding import pad_right
from stages.core.pairs import measure as measure_pairs
from stages.core.supervised_config import SupervisedSection
from stages.core.supervised_run import row_order
from stages.dpo.trainer import pair_logprobs
from stages.rm.trainer import last_token_scores
from stages.sft.trainer import LossPlaces, measure, summed_nll
from tests.supervised import token_demonstrations, token_preferences
from tests.tiny import tiny_llama

ROW = EncodedDemonstration([7, 8, 9, 5, 6], [False, False, True, False, True], "a:1")


@pytest.fixture(scope="module")
def packed_model():
    attention.register()
    model = tiny_llama()
    model.set_attn_implementation(attention.NAME)
    return model


@pytest.fixture(scope="module")
def reward_model():
    from transformers import LlamaForSequenceClassification

    attention.register()
    config = tiny_llama().config
    config.num_labels = 1
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(config).eval()
    model.set_attn_implementation(attention.NAME)
    return model


def test_places_of_two_rows() -> None:
    # Row 0 learns tokens 9 (place 2) and 6 (place 4); row 1 learns its second token, and its first has none before it.
    second = EncodedDemonstration([3, 4], [True, True], "a:2")
    places = LossPlaces.of([ROW, second])
    assert places.row_M.tolist() == [0, 0, 1]
    assert places.before_M.tolist() == [1, 3, 0]
    assert places.target_M.tolist() == [9, 6, 4]
    assert measure([ROW, second]).weight == 3
    assert measure([ROW, second]).tokens == 7


def test_loss_is_the_sum_over_learned_tokens(packed_model) -> None:
    logits = packed_model(torch.tensor([ROW.tokens]), attention_mask=None, layout=_alone(5), use_cache=False).logits[0]
    logprobs = logits.log_softmax(-1)
    expected = -(logprobs[1, 9] + logprobs[3, 6])
    assert summed_nll(packed_model, [ROW], packing=True).item() == pytest.approx(expected.item(), abs=1e-5)


def _alone(length: int) -> attention.Layout:
    return attention.pack_layout(one_by_one([length]), torch.device("cpu"))


def test_neighbours_change_nothing(packed_model) -> None:
    rows = token_demonstrations(6)
    alone = sum(summed_nll(packed_model, [row], packing=True).item() for row in rows)
    together = summed_nll(packed_model, rows, packing=True).item()
    assert together == pytest.approx(alone, rel=1e-5)
    reversed_rows = summed_nll(packed_model, rows[::-1], packing=True).item()
    assert reversed_rows == pytest.approx(alone, rel=1e-5)


def test_gradient_of_one_row_does_not_reach_another(packed_model) -> None:
    rows = token_demonstrations(2)
    quiet = [rows[0], replace(rows[1], loss_mask=[False] * len(rows[1].tokens))]
    packed_model.zero_grad()
    summed_nll(packed_model, quiet, packing=True).backward()
    together = packed_model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    packed_model.zero_grad()
    summed_nll(packed_model, rows[:1], packing=True).backward()
    torch.testing.assert_close(
        together, packed_model.model.layers[0].self_attn.q_proj.weight.grad, atol=1e-6, rtol=1e-5
    )


def test_packed_is_padded_for_sft(packed_model) -> None:
    padded_model = tiny_llama()
    rows = token_demonstrations(6)
    packed = summed_nll(packed_model, rows, packing=True).item()
    assert summed_nll(padded_model, rows, packing=False).item() == pytest.approx(packed, rel=1e-5)


def test_packed_is_padded_for_scores(reward_model) -> None:
    sequences = [row.chosen for row in token_preferences(6)]
    packed_B = last_token_scores(reward_model, sequences, packing=True)
    reward_model.set_attn_implementation("sdpa")
    padded_B = last_token_scores(reward_model, sequences, packing=False)
    reward_model.set_attn_implementation(attention.NAME)
    torch.testing.assert_close(packed_B, padded_B, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("multiple", [16, 1024])
def test_tokens_that_make_up_a_multiple_change_nothing(packed_model, reward_model, multiple: int) -> None:
    """Fewer and more of them than there are tokens; PPO, SFT, the reward model and DPO take such passes in bfloat16."""
    rows, pairs = token_demonstrations(5), token_preferences(5)
    sequences = [row.chosen for row in pairs]
    expected = summed_nll(packed_model, rows, packing=True)
    assert summed_nll(packed_model, rows, packing=True, multiple=multiple).item() == pytest.approx(
        expected.item(), rel=1e-5
    )
    torch.testing.assert_close(
        last_token_scores(reward_model, sequences, packing=True, multiple=multiple),
        last_token_scores(reward_model, sequences, packing=True),
        atol=1e-5,
        rtol=1e-5,
    )
    padded, plain = (pair_logprobs(packed_model, pairs, packing=True, multiple=each) for each in (multiple, 1))
    torch.testing.assert_close(padded, plain, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_score_is_read_at_the_last_token_whatever_it_is(reward_model, packing: bool) -> None:
    """Also where it is the padding token: transformers' own forward would look before it."""
    reward_model.set_attn_implementation(attention.NAME if packing else "sdpa")
    pad = reward_model.config.pad_token_id
    scores_B = last_token_scores(reward_model, [[5, 6, 7, pad], [5, 6, 7], [9, 9, 9, 9, 9, 9]], packing=packing)
    reward_model.set_attn_implementation("sdpa")
    hidden = reward_model.model(torch.tensor([[5, 6, 7, pad]])).last_hidden_state[0]
    expected = reward_model.score(hidden)[:, 0]
    reward_model.set_attn_implementation(attention.NAME)
    assert scores_B[0].item() == pytest.approx(expected[3].item(), abs=1e-5)
    assert scores_B[1].item() == pytest.approx(expected[2].item(), abs=1e-5)
    assert abs(scores_B[0].item() - scores_B[1].item()) > 1e-3


def test_pad_right() -> None:
    tokens_BS, mask_BS = pad_right([[4, 5, 6], [7]], torch.device("cpu"))
    assert tokens_BS.tolist() == [[4, 5, 6], [7, 0, 0]]
    assert mask_BS.tolist() == [[True, True, True], [True, False, False]]


def test_weight_and_tokens_of_pairs() -> None:
    rows = [replace(row, weight=weight) for row, weight in zip(token_preferences(2), (0.5, 2.0), strict=True)]
    microbatch = measure_pairs(rows)
    assert microbatch.weight == 2.5
    assert microbatch.tokens == sum(len(row.chosen) + len(row.rejected) for row in rows)


def section(**values: object) -> SupervisedSection:
    return SupervisedSection(data=[{"path": "rows.jsonl"}], batch_size=4, **values)


def test_row_order_takes_each_row_once_an_epoch_in_its_own_order() -> None:
    order = row_order(10, section=section(epochs=2), seed=3)
    assert Counter(order[:10]) == Counter(range(10)) == Counter(order[10:])
    assert order[:10] != order[10:]
    assert order == row_order(10, section=section(epochs=2), seed=3)
    assert order != row_order(10, section=section(epochs=2), seed=4)


def test_row_order_of_parts_of_an_epoch_and_of_steps() -> None:
    assert len(row_order(10, section=section(epochs=0.5), seed=0)) == 5
    assert len(row_order(10, section=section(epochs=1.25), seed=0)) == math.floor(12.5)  # round half to even
    assert len(row_order(3, section=section(max_steps=5), seed=0)) == 20
    assert len(row_order(1, section=section(epochs=0.1), seed=0)) == 1


@pytest.mark.parametrize(("batch", "microbatch", "passes"), [(32, 8, 4), (4, 8, 1), (6, 2, 3)])
def test_microbatches_of_a_batch(batch: int, microbatch: int, passes: int) -> None:
    values = SupervisedSection(data=[{"path": "a"}], batch_size=batch, microbatch_size=microbatch)
    assert values.accumulation == passes
    assert values.rows_per_pass * passes == batch


def test_a_microbatch_must_divide_the_batch() -> None:
    with pytest.raises(ValueError, match=r"microbatch_size=5 does not divide batch_size=12; use one of 1, 2, 3, 4, 6"):
        SupervisedSection(data=[{"path": "a"}], batch_size=12, microbatch_size=5)
