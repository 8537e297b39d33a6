"""The native rollout engine: what it samples, with what log-probability, and on what that depends."""

import math

import pytest
import torch
from torch import Tensor

from stages.core import attention, blocks
from stages.core.config import Tuning
from stages.core.kv_cache import KvCache
from stages.core.logprobs import token_logprobs
from stages.core.models import lora_config
from stages.core.rollout import native
from stages.core.rollout.native import ROWS_MULTIPLE, NativeEngine, rows_to_keep, sample_tokens
from stages.core.rollout.protocol import Completion, Sampling, rollout_seed
from stages.core.sequences import PackedBatch, ResponseBatch
from stages.core.trunk import Trunk
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
PROMPTS = [[0, 5, 6, 7], [0, 9], [0, 11, 12, 13, 14, 15, 16, 17], [0, 3, 4]]


def sharp_trunk(vocabulary: int = 40) -> Trunk:
    """A tiny Llama whose distribution is far from uniform, so that a wrong one shows."""
    attention.register()
    model = tiny_llama(vocabulary=vocabulary)
    with torch.no_grad():
        model.lm_head.weight.mul_(25)
    model.set_attn_implementation(attention.NAME)
    blocks.speed_up(model)
    return Trunk(model, CPU)


@pytest.fixture(scope="module")
def trunk() -> Trunk:
    return sharp_trunk()


def sampling(*, max_new_tokens: int = 12, temperature: float = 1.0, ends: tuple[int, ...] = (1,)) -> Sampling:
    return Sampling(max_new_tokens, temperature, ends)


def seeds_for(prompts: int, samples: int = 1, update: int = 0) -> list[list[int]]:
    return [[rollout_seed(7, "test", update, row, each) for each in range(samples)] for row in range(prompts)]


def teacher_forced(trunk: Trunk, prompt: list[int], completion: Completion, temperature: float) -> Tensor:
    """Log-probabilities of a completion by one forward pass over prompt and completion."""
    batch = ResponseBatch.of([prompt], [completion.tokens], CPU)
    hidden = trunk.hidden(batch.packed, None)[batch.before_M]
    return token_logprobs(hidden, trunk.lm_head, batch.targets_M, temperature).detach()


def test_weights_that_train_in_lowered_precision_are_sampled_from() -> None:
    """Under autocast the prompts' pass is in bfloat16 and the steps are not: near, not equal."""
    attention.register()
    model = tiny_llama(vocabulary=40)
    model.set_attn_implementation(attention.NAME)
    blocks.speed_up(model)
    trunk = Trunk(model, CPU, autocast=True)
    groups = NativeEngine(trunk, None).generate(PROMPTS, sampling(), seeds_for(len(PROMPTS)))
    for prompt, (completion,) in zip(PROMPTS, groups, strict=True):
        expected = teacher_forced(trunk, prompt, completion, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_sampled_logprobs_equal_teacher_forced_ones(trunk: Trunk, temperature: float) -> None:
    options = sampling(temperature=temperature, max_new_tokens=20, ends=(1, 4, 5))
    grouped = NativeEngine(trunk, None).generate(PROMPTS, options, seeds_for(len(PROMPTS), samples=3))
    for prompt, completions in zip(PROMPTS, grouped, strict=True):
        assert len(completions) == 3
        for completion in completions:
            expected = teacher_forced(trunk, prompt, completion, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_sampled_from_and_not_the_base() -> None:
    trunk = sharp_trunk()
    trunk.add_adapter("policy", lora_config(Tuning(rank=4), "CAUSAL_LM"))
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in trunk.adapter_parameters("policy"):
            parameter.normal_(std=0.3)
    [[completion]] = NativeEngine(trunk, "policy").generate([PROMPTS[0]], sampling(), [[3]])
    batch = ResponseBatch.of([PROMPTS[0]], [completion.tokens], CPU)

    def logprobs(adapter: str | None) -> Tensor:
        hidden = trunk.hidden(batch.packed, adapter)[batch.before_M]
        return token_logprobs(hidden, trunk.lm_head, batch.targets_M, 1.0).detach()

    torch.testing.assert_close(torch.tensor(completion.logprobs), logprobs("policy"), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(torch.tensor(completion.logprobs), logprobs(None), atol=0.05)


def test_a_low_temperature_is_greedy(trunk: Trunk) -> None:
    grouped = NativeEngine(trunk, None).generate(PROMPTS, sampling(temperature=1e-4), seeds_for(len(PROMPTS)))
    for prompt, [completion] in zip(PROMPTS, grouped, strict=True):
        tokens = list(prompt)
        for token in completion.tokens:
            hidden = trunk.hidden(PackedBatch.of([tokens], CPU), None)
            assert token == int(trunk.lm_head(hidden[-1]).argmax())
            tokens.append(token)


def test_a_completion_depends_on_its_seed_alone(trunk: Trunk) -> None:
    """Neither on who shares the batch, nor on their order, nor on the batch size, nor on compaction."""
    seeds = seeds_for(len(PROMPTS), samples=4)
    options = sampling(max_new_tokens=24, ends=(1, 2, 3, 4, 5, 6))  # many end early: the cache is compacted
    together = NativeEngine(trunk, None).generate(PROMPTS, options, seeds)
    lengths = {len(completion.tokens) for group in together for completion in group}
    assert len(lengths) > 4
    for batch_size in (1, 5, 8):
        split = NativeEngine(trunk, None, batch_size=batch_size).generate(PROMPTS, options, seeds)
        assert [[each.tokens for each in group] for group in split] == [
            [each.tokens for each in group] for group in together
        ]
    for row, prompt in enumerate(PROMPTS):
        for sample in range(4):
            [[alone]] = NativeEngine(trunk, None).generate([prompt], options, [[seeds[row][sample]]])
            assert alone.tokens == together[row][sample].tokens
            assert alone.finished == together[row][sample].finished
            assert alone.logprobs == pytest.approx(together[row][sample].logprobs, abs=1e-5)
    reverse = NativeEngine(trunk, None).generate(PROMPTS[::-1], options, seeds[::-1])
    assert [group[0].tokens for group in reverse[::-1]] == [group[0].tokens for group in together]


def test_the_same_call_twice_is_the_same_bit_for_bit(trunk: Trunk) -> None:
    seeds = seeds_for(len(PROMPTS), samples=2)
    first, second = (NativeEngine(trunk, None).generate(PROMPTS, sampling(), seeds) for _ in range(2))
    assert first == second


def test_other_seeds_give_other_completions(trunk: Trunk) -> None:
    [samples] = NativeEngine(trunk, None).generate([PROMPTS[0]], sampling(), seeds_for(1, samples=8))
    assert len({each.tokens for each in samples}) == 8


def test_compaction_happens(trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    select = KvCache.select

    def counting(cache: KvCache, rows_B: Tensor) -> None:
        kept.append(len(rows_B))
        select(cache, rows_B)

    monkeypatch.setattr(KvCache, "select", counting)
    options = sampling(max_new_tokens=24, ends=(1, 2, 3, 4, 5, 6))
    NativeEngine(trunk, None).generate(PROMPTS, options, seeds_for(len(PROMPTS), samples=12))
    assert kept[0] == 48  # a cache row for each sample
    assert len(kept) > 3
    assert kept == sorted(kept, reverse=True)
    assert all(rows % ROWS_MULTIPLE == 0 for rows in kept)


def test_ended_rows_stay_only_to_fill_a_multiple() -> None:
    ended_B = torch.tensor([True, False, True, True, False, True, True, True, True, False, True])
    # live: 1, 4, 9; ended ones from the front fill up to 8
    assert rows_to_keep(ended_B).tolist() == [0, 1, 2, 3, 4, 5, 6, 9]
    assert rows_to_keep(torch.tensor([False] * 8 + [True])).tolist() == list(range(8))


def test_a_response_ends_with_its_first_end_token(trunk: Trunk) -> None:
    ends = (1, 2, 3, 4, 5, 6)
    options = sampling(max_new_tokens=10, ends=ends)
    grouped = NativeEngine(trunk, None).generate(PROMPTS, options, seeds_for(len(PROMPTS), samples=10))
    completions = [completion for group in grouped for completion in group]
    assert {completion.finished for completion in completions} == {True, False}
    for completion in completions:
        assert len(completion.tokens) == len(completion.logprobs)
        assert not set(completion.tokens[:-1]) & set(ends)
        assert completion.finished == (completion.tokens[-1] in ends)
        assert completion.finished or len(completion.tokens) == 10


def test_a_finished_response_that_is_not_yet_dropped_stays_as_it_is(
    trunk: Trunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So few end at a time that they stay in the cache for some steps."""
    options, seeds = sampling(max_new_tokens=24, ends=(1, 2, 3, 4, 5, 6)), seeds_for(len(PROMPTS), samples=10)
    expected = NativeEngine(trunk, None).generate(PROMPTS, options, seeds)
    monkeypatch.setattr(native, "COMPACT_SHARE", 0.9)
    assert [[each.tokens for each in group] for group in expected] == [
        [each.tokens for each in group] for group in NativeEngine(trunk, None).generate(PROMPTS, options, seeds)
    ]
    for completion in (each for group in expected for each in group):
        assert not set(completion.tokens[:-1]) & {1, 2, 3, 4, 5, 6}


def test_an_end_token_at_the_last_step_finishes(trunk: Trunk) -> None:
    [[completion]] = NativeEngine(trunk, None).generate(
        [PROMPTS[0]], sampling(max_new_tokens=1, ends=tuple(range(40))), [[5]]
    )
    assert completion.finished
    assert len(completion.tokens) == 1


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_first_tokens_follow_the_softmax(temperature: float) -> None:
    """Pearson's chi-square of 4,000 first tokens against softmax(logits / temperature)."""
    draws, trunk = 4000, sharp_trunk(vocabulary=12)
    prompt = [0, 5, 6]
    logits_V = trunk.lm_head(trunk.hidden(PackedBatch.of([prompt], CPU), None)[-1]).detach().double()
    expected_V = draws * (logits_V / temperature).softmax(0)
    seeds = [[rollout_seed(1, "chi", 0, 0, sample) for sample in range(draws)]]
    [samples] = NativeEngine(trunk, None, batch_size=draws).generate(
        [prompt], sampling(max_new_tokens=1, temperature=temperature), seeds
    )
    tokens = torch.tensor([each.tokens[0] for each in samples])
    observed_V = torch.bincount(tokens, minlength=12).double()
    common_V = expected_V >= 5  # rarer tokens are one class of their own
    observed, expected = (
        torch.cat([counts[common_V], counts[~common_V].sum()[None]]) for counts in (observed_V, expected_V)
    )
    chi_square = float(((observed - expected).square() / expected.clamp(min=1)).sum())
    # Mean k, standard deviation sqrt(2 k) for k degrees of freedom; the seeds are fixed, so this never flickers.
    freedom = int(common_V.sum())
    assert freedom >= 5
    assert chi_square < freedom + 3 * math.sqrt(2 * freedom)


def test_the_uniform_number_picks_by_the_cumulative_distribution() -> None:
    # probabilities 1/4, 0, 1/2, 1/4: boundaries at 1/4, 1/4, 3/4, 1
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25]).log()
    picks = {0.0: 0, 0.2: 0, 0.26: 2, 0.74: 2, 0.76: 3, 1 - 2**-24: 3}
    tokens_B, logprobs_B = sample_tokens(logits.expand(len(picks), 4), torch.tensor(list(picks)))
    assert tokens_B.tolist() == list(picks.values())
    torch.testing.assert_close(logprobs_B.exp(), torch.tensor([0.25, 0.25, 0.5, 0.5, 0.25, 0.25]))


@pytest.mark.parametrize("certain", [0, 2, 4])
def test_a_token_of_probability_zero_is_never_picked(certain: int) -> None:
    logits = torch.full((5,), -math.inf)
    logits[certain] = 0.0
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-24, 1.0])
    tokens_B, logprobs_B = sample_tokens(logits.expand(4, 5), uniforms)
    assert tokens_B.tolist() == [certain] * 4
    assert logprobs_B.tolist() == [0.0] * 4


def test_rollout_seeds_differ_in_every_part_and_never_change() -> None:
    assert rollout_seed(0, "train", 1, 2, 3) == rollout_seed(0, "train", 1, 2, 3)
    seeds = {
        rollout_seed(run, purpose, update, prompt, sample)
        for run in range(3)
        for purpose in ("train", "eval")
        for update in range(12)
        for prompt in range(12)
        for sample in range(3)
    }
    assert len(seeds) == 3 * 2 * 12 * 12 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_values_read_while_decoding_are_those_of_a_pass_over_the_response(trunk: Trunk) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(trunk.width, 1)
    options = sampling(max_new_tokens=16, ends=(1, 2, 3, 4))
    seeds = seeds_for(len(PROMPTS), samples=3)
    grouped = NativeEngine(trunk, None, value_head=head).generate(PROMPTS, options, seeds)
    plain = NativeEngine(trunk, None).generate(PROMPTS, options, seeds)
    for prompt, completions, without in zip(PROMPTS, grouped, plain, strict=True):
        for completion, other in zip(completions, without, strict=True):
            assert (completion.tokens, completion.logprobs) == (other.tokens, other.logprobs)
            assert other.values is None
            assert completion.values is not None
            batch = ResponseBatch.of([prompt], [completion.tokens], CPU)
            expected_M = head(trunk.hidden(batch.packed, None)[batch.before_M])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.values), expected_M.detach(), rtol=1e-4, atol=1e-5)
