"""The benchmarks' arithmetic, worked by hand; their processes are run by tests/e2e/test_benchmarks.py."""

import pytest

from benchmarks.common import Quiet, Run, spread, table
from benchmarks.floors import Shape, Tokens, phase_floors
from benchmarks.ppo import ARMS, Reached, algorithm_of, reach
from benchmarks.ppo_ours import records

SHAPE = Shape(trunk=100, head=20, lora=10, layers=2, hidden=4, kv_width=2)
TOKENS = Tokens(prompt=6, response=4, sequences=2, epochs=3)
QUIET = Quiet(pressure_before=0.0, pressure_after=0.0, stalled_share=0.0, other_cores=0.0)


def test_floors_by_hand():
    # T = 10 tokens in sequences of 5. Attention 2*2*4*5*10 = 800, trunk 2*100*10 = 2000, head 2*20*4 = 160.
    floors = phase_floors(SHAPE, TOKENS, {"float32": 10.0, "copy": 1e9}, "float32")
    assert floors["rollout"] == pytest.approx((2000 + 800 + 160) / 10)
    assert floors["scoring"] == pytest.approx((2 * (2000 + 800) + 160) / 10)
    # An epoch: trunk twice 2000, adapter 6*10*10 = 600, head twice 160, attention three times 800.
    assert floors["update"] == pytest.approx(3 * (4000 + 600 + 320 + 2400) / 10)


@pytest.mark.parametrize(
    ("arm", "update", "scoring"),
    [
        ("ours-shared", 4000 + 600 + 320 + 2400, 2),
        ("ours-adapter", 2 * (4000 + 600 + 2400) + 320, 3),
        # All weights of a trunk: three times 2000, no adapter; a head that trains, three times 160.
        ("trl-default", (4000 + 600 + 2400) + (6000 + 2400) + 320, 3),
        ("ours-full", 2 * (6000 + 2400) + 480, 3),
    ],
)
def test_an_arm_has_the_floor_of_what_it_trains(arm: str, update: float, scoring: int):
    floors = phase_floors(SHAPE, TOKENS, {"float32": 10.0, "copy": 1e9}, "float32", algorithm_of(ARMS[arm]))
    assert floors["update"] == pytest.approx(3 * update / 10)
    assert floors["scoring"] == pytest.approx((scoring * (2000 + 800) + 160) / 10)


def test_a_rollout_cannot_beat_the_memory_that_it_must_read():
    # 2 steps read 120 weights; each of 4 tokens sees 4 cached ones of 2 (K, V) * 2 layers * 2 values: 128 in all.
    floors = phase_floors(SHAPE, TOKENS, {"bfloat16": 1e9, "copy": 2.0}, "bfloat16")
    assert floors["rollout"] == pytest.approx(2 * (2 * 120 + 128) / 2.0)


@pytest.mark.parametrize(
    ("before", "after", "others", "disturbed"),
    [
        (0.0, 0.0, 0.0, False),
        (1.5, 0.0, 0.0, True),  # others pressed before we began
        (0.0, 5.0, 0.0, False),  # only we were there
        (0.0, 5.0, 0.4, True),
        (0.0, 5.0, None, True),  # nobody can say that it was ours
        (None, None, None, False),  # no such files on this system
    ],
)
def test_only_pressure_that_others_made_disturbs(
    before: float | None, after: float | None, others: float | None, disturbed: bool
):
    assert Quiet(before, after, None, others).disturbed is disturbed


def test_seconds_until_the_mean_of_three_scores_reaches_the_target():
    updates = [{"score": score, "total": 2.0, "cpu": 1.5} for score in (0.0, 0.9, 0.0, 0.0, 0.6, 0.6)]
    run = Run("arm", 0, {"updates": updates}, 12.0, 12.0, QUIET)
    assert reach(run, 0.39) == Reached(12.0, 9.0, 6)  # (0 + 0.6 + 0.6) / 3; one lucky update before does not count
    assert reach(run, 0.5) is None


def test_cells_and_columns():
    assert spread([1.0, 3.0, 2.0]) == "2 [1-3]"
    assert spread([0.12345]) == "0.123 [0.123-0.123]"
    assert spread([1234.5]) == "1234 [1234-1234]"
    assert table(["a", "bb"], [["ccc", "d"]]).splitlines() == ["| a   | bb |", "|-----|----|", "| ccc | d  |"]


@pytest.mark.parametrize(("samples", "prompt_tokens"), [(1, [40.0, 48.0]), (4, [10.0, 12.0])])
def test_a_prompt_counts_once_however_many_samples(samples: int, prompt_tokens: list[float]) -> None:
    """Eight responses of 5 tokens, then of 6; the stage's own count has a prompt for each, and adds up."""
    row = dict.fromkeys(
        ("time/rollout_s", "time/score_s", "time/update_s", "seconds", "cpu_s", "score/mean", "kl/ref_mean"), 1.0
    ) | {"value/explained_variance": 0.0, "response/eos_fraction": 1.0}
    rows = [row | {"response/length_mean": 5.0, "tokens": 80.0}, row | {"response/length_mean": 6.0, "tokens": 176.0}]
    updates = records(rows, batch=8, samples=samples)
    assert [update["prompt_tokens"] for update in updates] == prompt_tokens
    assert [update["response_tokens"] for update in updates] == [40.0, 48.0]
