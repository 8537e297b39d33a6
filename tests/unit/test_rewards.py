"""Scores from functions and reward models: loading, checking, weighing."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data.chat import ChatEncoder, load_tokenizer
from data.encoded import EncodedPreference
from data.errors import UserError
from stages.core import attention
from stages.core.models import load_model
from stages.core.rewards import Answered, FunctionScorer, RewardModel, WeightedSum, load_function, score_head
from stages.core.sequences import PackedBatch
from stages.core.trunk import Trunk
from tests.tiny import tiny_model_folder

ANSWERED = Answered(
    prompts=["the cat", "a dog", "say yes"],
    responses=[" sat on the mat", " ran", ""],
    finished=[True, False, True],
    rows=[{"answer": "mat"}, {"answer": "fast"}, {"answer": ""}],
)


def returning(value: object) -> FunctionScorer:
    return FunctionScorer("fixed.py:score", lambda prompts, responses, rows: value)  # type: ignore[return-value,arg-type]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_function_from_a_file_is_given_prompts_responses_and_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path / "reward.py",
        "def score(prompts, responses, rows):\n"
        "    return [len(p) + 100 * (row['answer'] in r) for p, r, row in zip(prompts, responses, rows)]\n",
    )
    assert load_function(f"{path}:score").score(ANSWERED) == [107.0, 5.0, 107.0]


def test_a_function_from_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "my_reward_module.py", "def lengths(prompts, responses, rows):\n    return map(len, responses)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_function("my_reward_module:lengths").score(ANSWERED) == [15.0, 4.0, 0.0]


def test_a_file_may_hold_what_looks_its_module_up(tmp_path: Path) -> None:
    """Dataclasses with string annotations, and pickling, find a module by its name."""
    path = write(
        tmp_path / "judge.py",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Judge:\n    bonus: float = 1.0\n\n"
        "def score(prompts, responses, rows):\n    return [Judge().bonus for _ in responses]\n",
    )
    assert load_function(f"{path}:score").score(ANSWERED) == [1.0, 1.0, 1.0]


def test_two_files_of_one_name_are_two_functions(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        write(
            tmp_path / name / "reward.py",
            f"def score(prompts, responses, rows):\n    return [{value}] * len(prompts)\n",
        )
    first, second = (load_function(f"{tmp_path / name / 'reward.py'}:score") for name in ("a", "b"))
    assert first.score(ANSWERED) == [1.0] * 3
    assert second.score(ANSWERED) == [2.0] * 3


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere.py:score", "no file nowhere.py"),
        ("no_such_module_here:score", "no_such_module_here"),
        ("math:no_such_function", "no_such_function"),
        ("math:pi", "pi"),
        ("math", "path.py:function"),
        ("reward.py", "path.py:function"),
        (":score", "path.py:function"),
    ],
)
def test_what_is_not_there_is_named(name: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_function(name)
    (problem,) = caught.value.problems
    assert name in problem
    assert says in problem


@pytest.mark.parametrize("returned", [None, 3.0, [1.0, 2.0], [1.0] * 4, [1.0, None, 2.0], [1.0, "2", 3.0]])
def test_what_is_not_one_number_a_response_is_refused(returned: object) -> None:
    with pytest.raises(UserError, match=r"fixed\.py:score"):
        returning(returned).score(ANSWERED)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, True])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(UserError, match="finite"):
        returning([0.0, bad, 1.0]).score(ANSWERED)


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.5, -3],
        (1, 2.5, -3),
        np.array([1, 2.5, -3]),
        np.array([1, 2.5, -3], dtype=np.float32),
        [np.float32(1), np.float64(2.5), np.int64(-3)],
        torch.tensor([1, 2.5, -3]),
    ],
)
def test_every_usual_kind_of_number_is_taken(returned: object) -> None:
    scores = returning(returned).score(ANSWERED)
    assert scores == [1.0, 2.5, -3.0]
    assert all(type(score) is float for score in scores)


def test_a_weighted_sum() -> None:
    scorer = WeightedSum([returning([1.0, 2.0, 3.0]), returning([10.0, 0.0, -10.0])], [0.5, -2.0])
    # 0.5 * 1 - 2 * 10, 0.5 * 2, 0.5 * 3 + 2 * 10
    assert scorer.score(ANSWERED) == [-19.5, 1.0, 21.5]


def tiny_reward_model(folder: Path, *, batch_tokens: int = 16384) -> RewardModel:
    attention.register()
    tiny_model_folder(folder)
    encoder = ChatEncoder(load_tokenizer(str(folder)), max_length=64)
    trunk = Trunk(load_model(str(folder), head="lm"), torch.device("cpu"))
    head = nn.Linear(trunk.width, 1, bias=False)
    torch.manual_seed(3)
    nn.init.normal_(head.weight)
    return RewardModel(trunk, None, head, encoder, str(folder), batch_tokens)


def test_a_reward_model_scores_the_last_token_whatever_shares_the_batch(tmp_path: Path) -> None:
    model = tiny_reward_model(tmp_path)
    small = RewardModel(model.trunk, None, model.head, model.encoder, model.source, batch_tokens=1)
    scores = model.score(ANSWERED)
    assert small.score(ANSWERED) == pytest.approx(scores, abs=1e-5)
    # By hand: prompt and response as text, an end token where the response ended, the plain model, its last state.
    tokenizer, plain = model.encoder.tokenizer, load_model(str(tmp_path), head="lm", packing=False)
    for row, score in enumerate(scores):
        ids = tokenizer.encode(ANSWERED.prompts[row]) + tokenizer.encode(
            ANSWERED.responses[row], add_special_tokens=False
        )
        ids += [tokenizer.eos_token_id] if ANSWERED.finished[row] else []
        hidden = plain.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        assert score == pytest.approx(model.head(hidden).item(), abs=1e-5)


def test_a_reward_model_reads_a_prompt_once_for_all_its_responses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_reward_model(tmp_path)
    read: list[list[int]] = []
    plain = Trunk.hidden_at

    def noted(trunk: Trunk, packed: PackedBatch, adapter: str | None, places: torch.Tensor) -> torch.Tensor:
        read.append(packed.tokens_1N[0].tolist())
        return plain(trunk, packed, adapter, places)

    monkeypatch.setattr(Trunk, "hidden_at", noted)
    prompt, other = [5, 6, 7], [5, 6, 8]
    sequences = [([*prompt, 9], 3), ([*prompt, 10, 11], 3), ([*other, 9], 3), ([*prompt, 12], 3)]
    together = model.score_sequences(sequences)
    assert read.pop() == [5, 6, 7, 9, 10, 11, 5, 6, 8, 9, 12]
    assert together == pytest.approx([model.score_sequences([each])[0] for each in sequences], abs=1e-5)
    read.clear()
    replace(model, batch_tokens=7).score_sequences(sequences)
    assert read == [[5, 6, 7, 9, 10, 11], [5, 6, 8, 9], [5, 6, 7, 12]]  # a prompt held is not counted: 6, then 6 + 4


def test_a_pair_has_the_score_of_each_side(tmp_path: Path) -> None:
    model = tiny_reward_model(tmp_path)
    sides = [([5, 6, 7, 9], [5, 6, 7, 10, 11]), ([8, 9], [8, 12])]
    pairs = [EncodedPreference(*both, prompt_length=length) for both, length in zip(sides, (3, 1), strict=True)]
    for (chosen, rejected), both in zip(model.score_pairs(pairs), sides, strict=True):
        alone = [model.score_sequences([(side, 0)])[0] for side in both]
        assert [chosen, rejected] == pytest.approx(alone, abs=1e-5)
        assert abs(chosen - rejected) > 1e-3


def test_a_reward_model_reads_the_end_of_what_is_beyond_its_positions(tmp_path: Path) -> None:
    model = tiny_reward_model(tmp_path)
    limit = model.trunk.model.config.max_position_embeddings
    prompt, ends = [5 + place % 7 for place in range(limit + 1)], [[9], [9], [10, 11]]
    cut = model.score_sequences([([*prompt, *end], len(prompt)) for end in ends])
    whole = [([*prompt, *end][-limit:], 0) for end in ends]
    assert cut == pytest.approx([model.score_sequences([each])[0] for each in whole], abs=1e-5)


def test_a_score_head_has_one_output() -> None:
    weights = {"base_model.model.score.weight": torch.ones(1, 4), "base_model.model.other.weight": torch.ones(4, 4)}
    head = score_head(weights, torch.device("cpu"))
    assert head(torch.full((1, 4), 2.0)).item() == 8.0
    assert not head.weight.requires_grad
    with pytest.raises(UserError, match="score head"):
        score_head({"base_model.model.other.weight": torch.ones(4, 4)}, torch.device("cpu"))
    with pytest.raises(UserError, match="score head"):
        score_head({"score.weight": torch.ones(2, 4)}, torch.device("cpu"))
