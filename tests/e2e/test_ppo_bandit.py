"""PPO against its exact optimum: responses of up to three tokens, all of them enumerated.

With a score r(y) and the penalty beta * KL, the best policy is pi*(y) = pi_ref(y) * exp(r(y) / beta) / Z, and what it
reaches is J* = beta * log Z, whatever the algorithm (Ziegler et al. 2019, arXiv 1909.08593, sec. 2). The score of a
response depends on pairs of its letters, so that credit must be passed from the last token to those before it.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from stages.core.bank import PolicyBank
from stages.core.sequences import ResponseBatch
from stages.ppo.stage import build, train_loop
from tests.ppo_runs import EOS_ID, character_tokenizer, ppo_context, run_ppo, save_model, small_llama

LETTERS = "abcdefgh"
LONGEST = 3
PROMPT = "abc"
REWARD = """
FIRST = dict(zip("abcdefgh", (0.4, -0.2, 0.7, 0.1, -0.6, 0.9, -0.3, 0.2)))

def score(prompts, responses, rows):
    return [word_score(response) for response in responses]

def word_score(word):
    rising = sum(here < there for here, there in zip(word, word[1:]))
    return sum(FIRST[letter] for letter in word[:1]) + 0.8 * rising - 0.3 * word.count("d")
"""
SETTINGS: dict[str, object] = {
    "response_length": LONGEST,
    "updates": 60,
    "rollout_batch_size": 256,
    "samples_per_prompt": 256,
    "minibatch_size": 64,
    "epochs": 2,
    "learning_rate": 3e-3,
    "schedule": "linear",
}


@dataclass(frozen=True)
class Words:
    """Every response W of up to three tokens."""

    tokens: list[list[int]]
    score_W: Tensor
    reference_W: Tensor  # probabilities
    temperature: float

    @classmethod
    def of(cls, base: Path, temperature: float) -> "Words":
        tokenizer = character_tokenizer(LETTERS)
        others = [token for token in range(len(tokenizer)) if token != EOS_ID]
        tokens = [[*word, EOS_ID] for length in range(LONGEST) for word in product(others, repeat=length)]
        tokens += [list(word) for word in product(others, repeat=LONGEST)]
        names: dict[str, object] = {}
        exec(REWARD, names)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        score_W = torch.tensor([names["word_score"](text) for text in texts], dtype=torch.float64)
        reference = AutoModelForCausalLM.from_pretrained(base)
        return cls(tokens, score_W, probabilities(reference, tokens, temperature), temperature)

    def optimum(self, beta: float) -> tuple[Tensor, float]:
        """pi* W and J*."""
        weight_W = self.reference_W * (self.score_W / beta).exp()
        return weight_W / weight_W.sum(), beta * float(weight_W.sum().log())

    def objective(self, policy_W: Tensor, beta: float) -> float:
        """J: the expected score less beta * KL(policy || reference)."""
        return float((policy_W * (self.score_W - beta * (policy_W / self.reference_W).log())).sum())


@torch.no_grad()
def probabilities(model: PreTrainedModel, tokens: list[list[int]], temperature: float) -> Tensor:
    """The probability W of each response, by plain transformers, in float64."""
    prompt = character_tokenizer(LETTERS).encode(PROMPT)
    longest = len(prompt) + LONGEST
    tokens_WS = torch.tensor([[*prompt, *each, *[EOS_ID] * (LONGEST - len(each))] for each in tokens])
    mask_WR = torch.arange(LONGEST) < torch.tensor([len(each) for each in tokens])[:, None]
    logits_WRV = model(input_ids=tokens_WS).logits[:, len(prompt) - 1 : longest - 1].double() / temperature
    logprobs_WR = logits_WRV.log_softmax(2).gather(2, tokens_WS[:, len(prompt) :, None])[..., 0]
    return torch.where(mask_WR, logprobs_WR, 0.0).sum(1).exp()


def bandit_model(folder: Path) -> Path:
    """A random model whose first answers are far from uniform."""
    tokenizer = character_tokenizer(LETTERS)
    model = small_llama(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return save_model(model, tokenizer, folder)


@dataclass(frozen=True)
class Outcome:
    """How near a run came."""

    variation: float  # total variation between the policy and pi*
    start_variation: float
    share: float  # J / J*
    gained: float  # (J - J_ref) / (J* - J_ref)
    explained_variance: float  # mean of the last ten updates


def train(folder: Path, beta: float, temperature: float, **settings: object) -> Outcome:
    """Runs PPO on the words and compares what it found with the optimum."""
    base = bandit_model(folder / "base")
    metrics = run_ppo(
        ppo_context(
            folder,
            base,
            [{"prompt": PROMPT}],
            REWARD,
            **SETTINGS | {"rollout": {"temperature": temperature}, "kl": {"coef": beta}} | settings,
        )
    )
    words = Words.of(base, temperature)
    best_W, best = words.optimum(beta)
    policy_W = probabilities(
        AutoPeftModelForCausalLM.from_pretrained(folder / "ppo" / "weights"), words.tokens, temperature
    )
    start = words.objective(words.reference_W, beta)
    reached = words.objective(policy_W, beta)
    return Outcome(
        variation=0.5 * float((policy_W - best_W).abs().sum()),
        start_variation=0.5 * float((words.reference_W - best_W).abs().sum()),
        share=reached / best,
        gained=(reached - start) / (best - start),
        explained_variance=fmean(each["value/explained_variance"] for each in metrics[-10:]),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("beta", "temperature", "variation", "share"),
    [(0.3, 1.0, 0.16, 0.95), (1.0, 1.0, 0.07, 0.95), (2.0, 0.7, 0.06, 0.9)],
)
def test_ppo_reaches_the_kl_regularised_optimum(
    tmp_path: Path, beta: float, temperature: float, variation: float, share: float
) -> None:
    """Total variation to the optimum at most `variation`, of which the reference is at least twice as far."""
    outcome = train(tmp_path, beta, temperature)
    assert outcome.start_variation > 2 * variation
    assert outcome.variation < variation
    assert outcome.share > share
    assert outcome.gained > 0.8
    assert outcome.explained_variance > 0.5


@torch.no_grad()
def prefix_values(words: Words, critic: PolicyBank) -> tuple[Tensor, Tensor, Tensor]:
    """Of every state before a token: how probable it is under the reference, its expected score, and what critic says.

    The expected score of a prefix is the mean score of the responses that begin with it, by their probabilities.
    """
    weight: dict[tuple[int, ...], float] = defaultdict(float)
    total: dict[tuple[int, ...], float] = defaultdict(float)
    for tokens, probability, score in zip(
        words.tokens, words.reference_W.tolist(), words.score_W.tolist(), strict=True
    ):
        for length in range(len(tokens)):
            weight[tuple(tokens[:length])] += probability
            total[tuple(tokens[:length])] += probability * score
    prefixes = list(weight)
    prompt = character_tokenizer(LETTERS).encode(PROMPT)
    # The value before a token does not depend on that token: any will do.
    batch = ResponseBatch.of([prompt] * len(prefixes), [[*prefix, EOS_ID] for prefix in prefixes], torch.device("cpu"))
    last = torch.tensor([len(prefix) + 1 for prefix in prefixes]).cumsum(0) - 1
    weight_W, total_W = (torch.tensor([each[prefix] for prefix in prefixes]) for each in (weight, total))
    return weight_W, total_W / weight_W, critic.values(batch)[last]


@pytest.mark.slow
def test_a_critic_of_a_fixed_policy_learns_its_exact_values(tmp_path: Path) -> None:
    """The policy never trains, so the value of a prefix is its mean score: known by enumeration, without the noise."""
    base = bandit_model(tmp_path / "base")
    settings = SETTINGS | {"updates": 40, "critic_warmup": 40, "gae_lambda": 1.0}
    ppo = build(ppo_context(tmp_path, base, [{"prompt": PROMPT}], REWARD, **settings))
    train_loop(ppo)
    weight_W, exact_W, values_W = prefix_values(Words.of(base, 1.0), ppo.collector.bank)
    centred_W = exact_W - (weight_W * exact_W).sum() / weight_W.sum()
    explained = 1 - float((weight_W * (values_W - exact_W).square()).sum() / (weight_W * centred_W.square()).sum())
    assert explained > 0.9
