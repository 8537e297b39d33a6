"""PPO against a judge behind HTTP: the policy learns what it is graded for, and a judge that fails costs no update."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from data.errors import UserError
from pipeline.metrics import read_metrics
from stages.core.context import StageContext
from stages.core.judge.ledger import Ledger
from stages.core.reward_config import RewardConfig
from stages.ppo.config import PpoConfig
from stages.ppo.stage import run
from tests.chat_server import ChatServer, Reply
from tests.ppo_runs import character_tokenizer, ppo_context, save_model, small_llama

pytestmark = pytest.mark.slow
LETTERS = "abcdefgh"
SETTINGS: dict[str, object] = {
    "response_length": 3,
    "updates": 12,
    "rollout_batch_size": 64,
    "minibatch_size": 32,
    "epochs": 2,
    "learning_rate": 1e-2,
    "tuning": {"method": "full"},
    "advantage": "rloo",
    "samples_per_prompt": 8,
    "kl": {"coef": 0.02},
    "eval_prompts": 8,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = character_tokenizer(LETTERS)
    return save_model(small_llama(len(tokenizer)), tokenizer, tmp_path_factory.mktemp("base"))


def judged(body: dict[str, Any]) -> str:
    """The response in a question."""
    return json.loads(body["messages"][-1]["content"].splitlines()[1])["response"]


def likes_a(body: dict[str, Any]) -> Reply:
    return Reply(json.dumps({"score": 1 + 3 * judged(body).count("a")}))


def context_of(folder: Path, base: Path, server: ChatServer, **judge: object) -> StageContext[PpoConfig]:
    context = ppo_context(folder, base, [{"prompt": letter} for letter in LETTERS], "", **SETTINGS)
    settings = {"base_url": server.base_url, "model": "m", "attempts": 1, "backoff_s": 0.01, **judge}
    reward = RewardConfig.model_validate({"judge": settings})
    return replace(context, config=context.config.model_copy(update={"reward": reward}))


def test_the_policy_learns_what_it_is_graded_for(base: Path, tmp_path: Path) -> None:
    """Random letters hold 'a' about once in eight; the score of no 'a' is -1, of three 1, and that is learned."""
    with ChatServer(likes_a) as server:
        run(context_of(tmp_path, base, server))
        asked = [judged(body) for body in server.requests]
    metrics = read_metrics(tmp_path / "ppo")
    scores = [line["score/mean"] for line in metrics]
    assert scores[0] < -0.5
    assert fmean(scores[-3:]) > 0.9
    with Ledger(tmp_path / "ppo" / "ledger.sqlite") as ledger:
        verdicts = ledger.verdicts("judge:m")
    # One question an answer and prompt: nothing that was graded is asked again.
    assert len(verdicts) == len(asked) == len({json.dumps(body["messages"]) for body in server.requests})
    assert sorted(verdict.value for verdict in verdicts) == sorted(1 + 3 * text.count("a") for text in asked)


def test_responses_without_a_score_train_nothing(base: Path, tmp_path: Path) -> None:
    """The judge refuses what holds 'b': such responses are counted, and no score is made up for them."""

    def refusing(body: dict[str, Any]) -> Reply:
        return Reply("I will not grade that.") if "b" in judged(body) else likes_a(body)

    with ChatServer(refusing) as server:
        run(context_of(tmp_path, base, server, max_unanswered=1.0))
    metrics = read_metrics(tmp_path / "ppo")
    assert metrics[0]["score/missing"] >= 5
    assert all(-1 <= line["score/mean"] <= 1 for line in metrics)
    assert fmean(line["score/mean"] for line in metrics[-3:]) > 0.9
    assert "score/missing" not in metrics[-1]
    samples = (tmp_path / "ppo" / "samples.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in samples


def test_a_judge_that_dies_costs_no_update(base: Path, tmp_path: Path) -> None:
    """It fails in the middle; what was learned before is saved, and a second run ends as a whole one does."""
    folders = {name: tmp_path / name for name in ("whole", "broken")}
    with ChatServer(likes_a) as server:
        run(context_of(folders["whole"], base, server))
        left = 0

        def dying(body: dict[str, Any]) -> Reply:
            nonlocal left
            left -= 1
            return likes_a(body) if left > 0 else Reply("overloaded", status=503)

        left, server.answer = len(server.requests) // 2, dying
        context = context_of(folders["broken"], base, server)
        with pytest.raises(UserError, match=r"judge m: no usable score for \d+ of 64 responses"):
            run(context)
        saved = [path.name for path in (folders["broken"] / "ppo" / "checkpoints").glob("step-*")]
        assert len(saved) == 1
        before, server.answer = len(server.requests), likes_a
        run(context)
        assert len(server.requests) > before
    whole, broken = (read_metrics(folder / "ppo") for folder in folders.values())
    for name in ("score/mean", "kl/ref_mean", "policy/loss"):
        assert [line[name] for line in broken] == [line[name] for line in whole]
