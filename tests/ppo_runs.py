"""Runs of the real PPO stage in worlds small enough to know the answer: one character is one token."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.metrics import MetricsLog, read_metrics
from stages.core.config import SharedConfig
from stages.core.context import StageContext
from stages.ppo.config import PpoConfig
from stages.ppo.stage import run

BOS, EOS, PAD, UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"
EOS_ID = 1
NUM_SPECIAL = 4


class Quiet:
    """A view that nobody watches."""

    def start(self, total_steps: int, unit: str, done: int) -> None: ...
    def step(self, step: int, values: Mapping[str, float]) -> None: ...
    def say(self, message: str) -> None: ...


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are `<s>` (0, put first), `</s>` (1), `<pad>` (2), `<unk>` (3) and one a character."""
    names = [BOS, EOS, PAD, UNKNOWN, *characters]
    tokenizer = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN
    )


def small_llama(vocabulary: int, *, hidden: int = 32, layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama in float32; its head is small, so that answers begin near uniform."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """`folder`, with the model and its tokenizer as from_pretrained reads them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ppo_context(
    folder: Path, base: Path, rows: Sequence[Mapping[str, Any]], reward: str, *, seed: int = 0, **settings: object
) -> StageContext[PpoConfig]:
    """The context of a run of the stage on `base` in `folder`/ppo.

    `reward` is the source of a reward function of the name `score`.
    """
    out = folder / "ppo"
    out.mkdir(parents=True)
    function = f"{folder / 'rewards.py'}:score"
    (folder / "rewards.py").write_text(reward, encoding="utf-8")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = PpoConfig.model_validate(
        {
            "prompts": [{"path": str(folder / "prompts.jsonl")}],
            "holdout": 0,
            "reward": {"function": function},
            "eval_every": 1000,
            "eval_prompts": 1,
            **settings,
        }
    )
    shared = SharedConfig(base_model=str(base), checkpoint_every=1000, max_length=64, seed=seed)
    metrics = MetricsLog(out, view=Quiet())
    inputs = {"policy": str(base), "reward.0": function}
    return StageContext(
        "ppo", out, folder, folder, shared, config, inputs=inputs, key="k", metrics=metrics, should_stop=lambda: False
    )


def run_ppo(context: StageContext[PpoConfig]) -> list[dict[str, Any]]:
    """The metrics of a whole run of the stage, one line an update.

    Every run begins as it must: the policy is its reference, and what trains is what sampled.
    """
    run(context)
    metrics = read_metrics(context.out)
    assert metrics[0]["kl/ref_mean"] == pytest.approx(0, abs=1e-4)
    for line in metrics:
        assert line["policy/first_ratio_mean"] == pytest.approx(1, abs=1e-5)
    return metrics
