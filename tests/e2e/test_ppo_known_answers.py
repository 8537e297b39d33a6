"""PPO where the best policy can be worked out: it must come within a stated distance of it.

With one-token responses, a score r(a) and the penalty beta * KL, the best policy is
pi*(a) = pi_ref(a) * exp(r(a) / beta) / Z, whatever the algorithm (Ziegler et al. 2019, arXiv 1909.08593, sec. 2).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.metrics import MetricsLog, read_metrics
from stages.core.config import SharedConfig
from stages.core.context import StageContext
from stages.ppo.config import PpoConfig
from stages.ppo.stage import run
from tests.tiny import tiny_llama, tiny_tokenizer

TABLE = {"a": 1.0, "b": 0.5, "c": 0.0, "d": -1.0, "e": 1.5, "f": -0.5}
OTHERWISE = -1.5
REWARDS = f"""
def table(prompts, responses, rows):
    return [{TABLE!r}.get(response, {OTHERWISE}) for response in responses]

def opposite(prompts, responses, rows):
    return [float(response == row["wanted"]) for response, row in zip(responses, rows)]
"""
PROMPTS = ["the cat", "a dog ran"]


class Quiet:
    """A view that nobody watches."""

    def start(self, total_steps: int, unit: str, done: int) -> None: ...
    def step(self, step: int, values: Mapping[str, float]) -> None: ...
    def say(self, message: str) -> None: ...


def letters_model(folder: Path) -> Path:
    """A tiny model that answers PROMPTS with a letter of TABLE or with one token more, and rarely with another."""
    tokenizer, model = tiny_tokenizer(), tiny_llama(vocabulary=len(tiny_tokenizer()))
    likely = [*(tokenizer.encode(letter, add_special_tokens=False)[0] for letter in TABLE), tokenizer.eos_token_id]
    head_VD = model.lm_head.weight
    with torch.no_grad():
        last = [
            model.model(input_ids=torch.tensor([tokenizer.encode(each)])).last_hidden_state[0, -1] for each in PROMPTS
        ]
        towards_D = torch.stack(last).mean(0)
        letters = 0.15 * torch.randn(len(likely), model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        head_VD.copy_((-10 / towards_D.square().sum()) * towards_D)
        head_VD[likely] = letters
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(folder: Path, rows: Sequence[Mapping[str, Any]], function: str, **settings: object) -> Path:
    """Runs the stage on a tiny model and returns its folder."""
    base, out = letters_model(folder / "base"), folder / "ppo"
    out.mkdir()
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = PpoConfig.model_validate(
        {
            "prompts": [{"path": str(folder / "prompts.jsonl")}],
            "holdout": 0,
            "reward": {"function": f"{folder / 'rewards.py'}:{function}"},
            "response_length": 1,
            "gae_lambda": 1.0,
            "schedule": "linear",
            "eval_every": 1000,
            **settings,
        }
    )
    shared = SharedConfig(base_model=str(base), checkpoint_every=1000, max_length=32)
    metrics = MetricsLog(out, view=Quiet())
    inputs = {"policy": str(base), "reward.0": f"{folder / 'rewards.py'}:{function}"}
    context = StageContext(
        "ppo", out, folder, folder, shared, config, inputs=inputs, key="k", metrics=metrics, should_stop=lambda: False
    )
    run(context)
    return out


@torch.no_grad()
def next_token(model: PreTrainedModel, prompt: str, temperature: float = 1.0) -> Tensor:
    """The distribution V of the token after the prompt, by plain transformers, in float64."""
    tokens = torch.tensor([tiny_tokenizer().encode(prompt)])
    return (model(input_ids=tokens).logits[0, -1].double() / temperature).softmax(0)


def scores_of_tokens() -> Tensor:
    """The score V of each token, by the text that it decodes to."""
    tokenizer = tiny_tokenizer()
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(tokenizer))]
    return torch.tensor([TABLE.get(text, OTHERWISE) for text in texts], dtype=torch.float64)


@pytest.mark.parametrize(("beta", "temperature", "bound"), [(0.4, 1.0, 0.1), (1.0, 1.0, 0.04), (2.0, 0.7, 0.04)])
def test_a_bandit_reaches_the_kl_regularised_optimum(
    tmp_path: Path, beta: float, temperature: float, bound: float
) -> None:
    """Total variation to the optimum at the end within `bound`; the reference is at least three times as far."""
    out = train(
        tmp_path,
        [{"prompt": PROMPTS[0]}],
        "table",
        updates=40,
        rollout_batch_size=256,
        samples_per_prompt=256,
        minibatch_size=128,
        epochs=2,
        learning_rate=1e-2,
        kl={"coef": beta},
        rollout={"temperature": temperature},
        critic="shared",
    )
    reference_V = next_token(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PROMPTS[0], temperature)
    policy_V = next_token(AutoPeftModelForCausalLM.from_pretrained(out / "weights"), PROMPTS[0], temperature)
    weight_V = reference_V * (scores_of_tokens() / beta).exp()
    best_V = weight_V / weight_V.sum()
    assert 0.5 * float((reference_V - best_V).abs().sum()) > 3 * bound
    assert 0.5 * float((policy_V - best_V).abs().sum()) < bound


def test_two_contexts_learn_opposite_tokens(tmp_path: Path) -> None:
    rows = [{"prompt": PROMPTS[0], "wanted": "a"}, {"prompt": PROMPTS[1], "wanted": "b"}]
    out = train(
        tmp_path,
        rows,
        "opposite",
        updates=30,
        rollout_batch_size=128,
        samples_per_prompt=64,
        minibatch_size=64,
        epochs=2,
        learning_rate=1e-2,
        kl={"coef": 0.02},
    )
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(out / "weights"), tiny_tokenizer()
    for row in rows:
        (wanted,) = tokenizer.encode(row["wanted"], add_special_tokens=False)
        assert float(next_token(model, row["prompt"])[wanted]) > 0.9
    metrics = read_metrics(out)
    assert metrics[0]["score/mean"] < 0.2
    assert metrics[-1]["score/mean"] > 0.9
