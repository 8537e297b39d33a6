"""PPO on shortest paths: the best score is known to be 1, and the critic must know where a walk is worth something.

The score alone proves little: a run with an explained variance of -5 has reached 0.98 of it. Learning rates, the value
loss's weight and the critic's head are the defaults.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pytest

from tests.ppo_runs import character_tokenizer, ppo_context, run_ppo, save_model
from tests.walks import LONGEST, NODES, random_graph, reward, walker

UPDATES = 40


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that walks at random."""
    return save_model(walker(random_graph()), character_tokenizer(NODES), tmp_path_factory.mktemp("walker"))


@dataclass(frozen=True)
class Outcome:
    """Score at the start; score and explained variance over the last ten updates."""

    start: float
    score: float
    explained_variance: float


def train(folder: Path, base: Path, critic: str, seed: int) -> Outcome:
    """Runs PPO from every node that the goal can be reached from."""
    graph = random_graph()
    metrics = run_ppo(
        ppo_context(
            folder,
            base,
            [{"prompt": node} for node in graph.starts],
            reward(graph),
            seed=seed,
            critic=critic,
            updates=UPDATES,
            rollout_batch_size=128,
            minibatch_size=32,
            response_length=LONGEST,
        )
    )
    last = metrics[-10:]
    return Outcome(
        start=metrics[0]["score/mean"],
        score=fmean(line["score/mean"] for line in last),
        explained_variance=fmean(line["value/explained_variance"] for line in last),
    )


EVERY = [(critic, seed) for critic in ("adapter", "shared", "model") for seed in range(4)]
SOON = {("adapter", 0), ("shared", 0)}  # the others are for `make soak`


@pytest.mark.slow
@pytest.mark.parametrize(
    ("critic", "seed"), [pytest.param(*case, marks=[] if case in SOON else pytest.mark.soak) for case in EVERY]
)
def test_ppo_walks_the_shortest_path_and_its_critic_knows_where(
    tmp_path: Path, base: Path, critic: str, seed: int
) -> None:
    outcome = train(tmp_path, base, critic, seed)
    print(f"{critic} seed {seed}: {outcome}")
    assert outcome.start < 0.3
    assert outcome.score > 0.8
    assert outcome.explained_variance > 0.2
