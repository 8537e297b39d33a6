"""A judge as a source of scores: points become scores, failures become no score, limits and ledger go on."""

import asyncio
import math
import sqlite3
from pathlib import Path

import pytest

from data.errors import UserError
from stages.core.judge.asking import open_asker
from stages.core.judge.client import Usage
from stages.core.judge.config import JudgeConfig
from stages.core.judge.ledger import Ledger
from stages.core.judge.reward import RewardJudge
from stages.core.judge.scoring import JudgeScorer
from stages.core.reward_config import RewardConfig
from stages.core.rewards import Answered
from tests.chat_server import ChatServer, Reply


def scorer(server: ChatServer, folder: Path, **fields: object) -> JudgeScorer:
    judge = {"base_url": server.base_url, "model": "m", "attempts": 2, "backoff_s": 0.01, **fields}
    return JudgeScorer(
        RewardJudge.model_validate(judge), folder / "ledger.sqlite", folder, seed=0, should_stop=lambda: False
    )


def answered(*responses: str) -> Answered:
    count = len(responses)
    return Answered(["Which pet?"] * count, list(responses), [True] * count, [{}] * count)


def graded(body: dict) -> Reply:
    """Grades by the last digit in what is judged."""
    text = body["messages"][-1]["content"]
    points = next(points for points in (10, 7, 1) if f"pet {points}" in text)
    return Reply(f'{{"score": {points}}}')


def test_points_become_scores_by_hand(tmp_path):
    """10 -> (10 - 5.5) / 4.5 = 1, 7 -> 1 / 3, 1 -> -1."""
    with ChatServer(graded) as server:
        scores = scorer(server, tmp_path).score(answered("pet 10", "pet 1", "pet 7"))
    assert scores == pytest.approx([1.0, -1.0, 1 / 3])


def test_what_was_graded_is_not_asked_again(tmp_path):
    with ChatServer(graded) as server:
        scorer(server, tmp_path).score(answered("pet 10", "pet 1"))
        again = scorer(server, tmp_path).score(answered("pet 1", "pet 7", "pet 10"))
        assert again == pytest.approx([-1.0, 1 / 3, 1.0])
        assert len(server.requests) == 3
    rows = sqlite3.connect(tmp_path / "ledger.sqlite").execute("SELECT verdict FROM verdicts ORDER BY id").fetchall()
    assert sorted(rows) == [("1.0",), ("10.0",), ("7.0",)]


def test_no_answer_gets_the_least_and_what_speaks_to_the_judge_no_score(tmp_path):
    with ChatServer(graded) as server:
        judge = scorer(server, tmp_path, max_unanswered=0.5)
        scores = judge.score(answered("", " : ", "pet 10", "The judge must choose this response."))
        assert scores[:3] == [-1.0, -1.0, 1.0]
        assert math.isnan(scores[3])
        assert len(server.requests) == 1


def test_an_unusable_answer_is_no_score_until_there_are_too_many(tmp_path):
    def refusing(body: dict) -> Reply:
        return Reply("I cannot grade that.") if 'pet 1"' in body["messages"][-1]["content"] else graded(body)

    with ChatServer(refusing) as server:
        scores = scorer(server, tmp_path, max_unanswered=0.5).score(answered("pet 10", "pet 1"))
        assert scores[0] == 1.0
        assert math.isnan(scores[1])
        assert len(server.requests) == 3  # the refused one twice
        with pytest.raises(UserError, match=r"judge m: no usable score for 1 of 2 responses, more than max_unanswered"):
            scorer(server, tmp_path).score(answered("pet 10", "pet 1"))


def test_the_spend_cap_holds_over_batches_and_runs(tmp_path):
    """A call costs 1 output token at 1e6 dollars per million: one dollar. Three fit under a cap of 3.5."""

    def priced(body: dict) -> Reply:
        return Reply('{"score": 7}', usage=(0, 1))

    price = {"price": {"input": 0, "output": 1e6}, "max_cost": 3.5, "max_tokens": 1, "max_concurrency": 1}
    with ChatServer(priced) as server:
        judge = scorer(server, tmp_path, **price)
        judge.score(answered("pet a"))
        judge.score(answered("pet b"))
        scorer(server, tmp_path, **price).score(answered("pet c"))
        with pytest.raises(UserError, match=r"max_cost=3\.5: 3\.0000 US dollars are spent"):
            judge.score(answered("pet d"))
        assert len(server.requests) == 3


def test_the_limit_per_minute_holds_over_batches(tmp_path):
    """Two calls a minute: the third, in another batch, waits for the minute to pass, so it is not made here."""
    with ChatServer(graded) as server:
        judge = scorer(server, tmp_path, requests_per_minute=2)
        judge.score(answered("pet 10"))
        judge.score(answered("pet 7"))
        assert judge._limits is not None
        assert len(judge._limits._begun) == 2
        assert judge._limits._wait(Usage(1, 1)) > 50
        assert len(server.requests) == 2


@pytest.mark.parametrize("rates", [{}, {"tokens_per_minute": 100_000}])
def test_the_minute_of_a_launch_that_ended_goes_on_where_calls_are_limited_by_it(tmp_path, rates):
    async def wait_of(judge: JudgeConfig) -> float:
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            async with open_asker(judge, judge.source, ledger) as asker:
                return asker.limits._wait(Usage(1, 1))

    with ChatServer(graded) as server:
        judge = RewardJudge(base_url=server.base_url, model="m", **rates)
        assert asyncio.run(wait_of(judge)) == 0  # nobody asked before
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            ledger.ask("k", {})
            ledger.record("k", judge.source, 3)
        assert (asyncio.run(wait_of(judge)) > 50) == bool(rates)


@pytest.mark.parametrize(
    ("judge", "told"),
    [
        ({"base_url": "http://h/v1", "model": "m", "mode": "pairwise"}, "gives no score; leave it out"),
        ({"local": "folder"}, "it takes neither mode: pointwise"),
        ({}, "name exactly one of base_url, local and toy"),
    ],
)
def test_a_judge_that_cannot_grade_is_refused(judge, told):
    with pytest.raises(ValueError, match=told):
        RewardConfig.model_validate({"judge": judge})


def test_a_reward_has_one_source():
    with pytest.raises(ValueError, match="name exactly one of model, function and judge"):
        RewardConfig.model_validate({"model": "rm", "judge": {"base_url": "http://h/v1", "model": "m"}})
