"""The built-in world: writes a small pretrained Llama with its tokenizer, and rows for every later stage."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from data.artifacts import publish_folder
from data.rows import Text
from data.toy import World
from stages.core import attention
from stages.core.context import Interrupted, StageContext, StageResult
from stages.core.models import default_device
from stages.toy.config import ToyConfig
from stages.toy.model import build_model, build_tokenizer
from stages.toy.pretrain import pretrain, token_batches

TOKENIZER_DOCUMENTS = 4000
EVAL_PAIRS = 1000


def run(context: StageContext[ToyConfig]) -> StageResult:
    """A base model in `context.out/weights` and the world's rows beside it.

    Raises Interrupted; there is no checkpoint, the stage is short and starts over.
    """
    config, max_length = context.config, context.shared.max_length
    context.metrics.rewind(0)
    torch.manual_seed(context.shared.seed)
    attention.register()
    world = World.build(seed=context.shared.seed, prompts=config.prompts, eval_prompts=config.eval_prompts)
    _write_rows(world, config, context.out)
    texts = (document for document in world.documents(TOKENIZER_DOCUMENTS) if isinstance(document, str))
    tokenizer = build_tokenizer(texts, max_length=max_length)
    model = build_model(config, tokenizer, max_length=max_length).to(default_device())
    model.set_attn_implementation(attention.NAME)
    context.metrics.say(f"a village of {len(world.train_tasks)} prompts; {model.num_parameters():,} parameters")
    context.metrics.start(config.pretrain_steps, "step")
    last = pretrain(
        model,
        token_batches(_tokens(world, tokenizer)),
        steps=config.pretrain_steps,
        peak=config.learning_rate,
        metrics=context.metrics,
        check_stop=lambda: _check_stop(context),
    )
    publish_folder(context.out / "weights", lambda folder: _write_weights(folder, model, tokenizer))
    return StageResult("policy", metrics=last)


def _check_stop(context: StageContext[ToyConfig]) -> None:
    if context.should_stop():
        raise Interrupted("toy: stopped; it is short and will start over")


def _write_rows(world: World, config: ToyConfig, folder: Path) -> None:
    rows: Mapping[str, Iterable[Mapping[str, Any]]] = {
        "prompts.jsonl": (task.row() for task in world.train_tasks),
        "eval_prompts.jsonl": (task.row() for task in world.eval_tasks),
        "demonstrations.jsonl": world.demonstrations(config.demonstrations),
        "preferences.jsonl": world.preferences(config.preferences, label_noise=config.label_noise),
        "eval_pairs.jsonl": world.true_pairs(EVAL_PAIRS),
    }
    for name, lines in rows.items():
        with (folder / name).open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(line)}\n" for line in lines)


def _tokens(world: World, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Token ids of documents without end."""
    while True:
        texts = [_marked(document, tokenizer) for document in world.documents(256)]
        yield from tokenizer(texts, add_special_tokens=False)["input_ids"]


def _marked(document: Text, tokenizer: PreTrainedTokenizerFast) -> str:
    """A document between BOS and EOS; a conversation by the chat template, which marks it too."""
    if isinstance(document, str):
        return f"{tokenizer.bos_token}{document}{tokenizer.eos_token}"
    return str(tokenizer.apply_chat_template(document, tokenize=False))


def _write_weights(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
