"""Shortest paths on a random graph, after trlX's `randomwalks` example: a task whose best score is known.

A prompt is a node, a response the walk from there: one character a node, `</s>` to stop. A walk along edges that stops
at the goal scores shortest / walked edges, every other walk 0: the best policy scores 1 on every prompt. The model has
seen random walks only.
"""

from dataclasses import dataclass
from functools import lru_cache
from string import ascii_letters, digits

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from tests.ppo_runs import NUM_SPECIAL, small_llama

NODES = (ascii_letters + digits)[:40]
GOAL = NODES[0]
LONGEST = 10
EDGES_PER_NODE = 3


@dataclass(frozen=True)
class Graph:
    """Edges by node, and the edges of the shortest path from each node to the goal."""

    edges: dict[str, list[str]]
    shortest: dict[str, int]

    @property
    def starts(self) -> list[str]:
        return sorted(node for node, steps in self.shortest.items() if 0 < steps <= LONGEST)


@lru_cache
def random_graph(seed: int = 0) -> Graph:
    """Every node with three edges to others, drawn at random; the goal has none, so that walks end there."""
    generator = torch.Generator().manual_seed(seed)
    edges = {}
    for node in NODES:
        others = [each for each in NODES if each != node]
        picks = torch.randperm(len(others), generator=generator)[:EDGES_PER_NODE].tolist()
        edges[node] = [others[pick] for pick in picks]
    shortest = {GOAL: 0}
    for _ in NODES:
        for node in NODES:
            known = [shortest[each] + 1 for each in edges[node] if each in shortest]
            if node != GOAL and known:
                shortest[node] = min([*known, shortest.get(node, len(NODES))])
    return Graph(edges, shortest)


def walks(graph: Graph, count: int, seed: int) -> list[str]:
    """Random walks from random nodes, of at most LONGEST + 1 nodes, that stop at the goal where they come by."""
    generator = torch.Generator().manual_seed(seed)
    paths = []
    for _ in range(count):
        path = NODES[int(torch.randint(1, len(NODES), (), generator=generator))]
        for pick in torch.randint(EDGES_PER_NODE, (LONGEST - 1,), generator=generator).tolist():
            if path[-1] == GOAL:
                break
            path += graph.edges[path[-1]][pick]
        paths.append(path)
    return paths


def walker(graph: Graph, *, hidden: int = 64, steps: int = 300, seed: int = 0) -> LlamaForCausalLM:
    """A small Llama that has learned random walks: `<s>`, nodes, `</s>`."""
    model = small_llama(NUM_SPECIAL + len(NODES), hidden=hidden, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 * (64 / hidden) ** 0.5)
    for step in range(steps):
        tokens_BS = torch.full((64, LONGEST + 2), 2)
        for row, path in enumerate(walks(graph, 64, seed=1000 * seed + step)):
            tokens = [0, *(NUM_SPECIAL + NODES.index(node) for node in path), 1]
            tokens_BS[row, : len(tokens)] = torch.tensor(tokens)
        logits = model(input_ids=tokens_BS[:, :-1]).logits
        loss = cross_entropy(logits.transpose(1, 2), tokens_BS[:, 1:], ignore_index=2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


REWARD = """
EDGES, SHORTEST, GOAL = {edges!r}, {shortest!r}, {goal!r}

def score(prompts, responses, rows):
    return [walk_score(prompt + response) for prompt, response in zip(prompts, responses)]

def walk_score(path):
    along = all(there in EDGES.get(here, ()) for here, there in zip(path, path[1:]))
    return SHORTEST[path[0]] / (len(path) - 1) if along and len(path) > 1 and path[-1] == GOAL else 0.0
"""


def reward(graph: Graph) -> str:
    """The source of the reward function."""
    return REWARD.format(edges=graph.edges, shortest=graph.shortest, goal=GOAL)
