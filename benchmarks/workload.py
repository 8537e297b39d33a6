"""What both contestants are given: one checkpoint, one reward model, one set of prompts, saved once in a folder.

`eos` lengths: the end token's output row is fitted so that every step ends with about the same probability, the one
that makes the mean response half the budget. `fixed`: it is fitted so low that no response ever ends. Both contestants
read the same weights, so both sample from the same distribution, and nothing but the weights says when to stop.

Run as a worker: `python -m benchmarks.workload SPEC RESULT`. Legend: B sequences, R response, N states, D hidden size.
"""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.common import ROOT, read_spec, write_result
from data.chat import TEMPLATES, ChatEncoder, load_tokenizer

SHARED = ROOT.parent / "shared"
STORIES = SHARED / "data" / "tinystories-1000" / "tinystories_1000.json"
# hidden, intermediate, layers, heads, key-value heads, vocabulary
RANDOM = {
    "random-tiny": (32, 64, 2, 4, 2, 300),
    "random-35m": (384, 1024, 6, 6, 6, 32000),
    "random-90m": (640, 1728, 10, 10, 10, 32000),
    "random-0.5b": (896, 4864, 24, 14, 2, 151936),
    "random-1.5b": (1536, 8960, 28, 12, 2, 151936),
}
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
NEVER = -30.0  # log-odds of a token that must not be sampled
SAMPLED = 48  # sequences from which the rows of special tokens are fitted
RIDGE = 1e-4


def build(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Writes checkpoint, adapters, reward model and prompts; what the benchmarks need to know of them.

    `policy/`, `policy-lora/` and `policy-merged/` (for rollouts), `reward/` (LoRA on `policy/`) and `reward-full/` (the
    same, merged), `prompts.jsonl`.
    """
    torch.manual_seed(spec["seed"])
    model, tokenizer = open_model(spec["model"], spec["seed"])
    encoder = ChatEncoder(tokenizer, max_length=model.config.max_position_embeddings)
    texts = prompt_texts(spec["model"], encoder, count=spec["batch"], seed=spec["seed"])
    prompts = [encoder.prompt_tokens(text) for text in texts]
    model = _untied(model)
    expected = fit_ends(model, tokenizer, prompts, budget=spec["response_length"], lengths=spec["lengths"])
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    policy = folder / "policy"
    model.save_pretrained(policy)
    tokenizer.save_pretrained(str(policy))
    _save_reward(policy, folder, tokenizer, prompts, rank=spec["rank"])
    _save_policy_adapter(policy, folder, tokenizer, rank=spec["rank"])
    rows = [{"prompt": text, "tokens": tokens} for text, tokens in zip(texts, prompts, strict=True)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"shape": _shape(model, spec["rank"]), "parameters": model.num_parameters(), "expected_length": expected}


def open_model(name: str, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model in float32 and its tokenizer, with a pad token that is not the end token."""
    if name not in RANDOM:
        folder = str(SHARED / "models" / name)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(folder)
    hidden, intermediate, layers, heads, kv_heads, vocabulary = RANDOM[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    # One channel is the same for every token: without it no linear function of a random state is a constant.
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = config.initializer_range * math.sqrt(hidden)
    return model, word_tokenizer(vocabulary)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A word a token: the text of any response has exactly the response's tokens, whoever reads it."""
    words = {word: place for place, word in enumerate([*SPECIAL, "a"])}
    words |= {f"w{place}": place for place in range(len(words), vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unk, bos, eos, pad = SPECIAL
    words_only = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad
    )
    words_only.chat_template = TEMPLATES["simple"]
    return words_only


def prompt_texts(name: str, encoder: ChatEncoder, *, count: int, seed: int, longest: int = 64) -> list[str]:
    """So many prompts of a quarter of `longest` to `longest` tokens: story beginnings, or random words."""
    chance = random.Random(seed)
    lengths = [chance.randint(longest // 4, longest) for _ in range(count)]
    if name in RANDOM:
        vocabulary = len(encoder.tokenizer)
        return [" ".join(f"w{chance.randrange(5, vocabulary)}" for _ in range(length)) for length in lengths]
    stories = json.loads(STORIES.read_text(encoding="utf-8"))[:count]
    texts: list[str] = []
    for place, length in enumerate(lengths):
        tokens = encoder.tokenizer(stories[place % len(stories)], add_special_tokens=False)["input_ids"][:length]
        texts.append(encoder.tokenizer.decode(tokens).strip())
    return texts


def _untied(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a head of its own, so that the end token's output row can change and its embedding not."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return model


@torch.no_grad()
def fit_ends(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    *,
    budget: int,
    lengths: str,
) -> float:
    """Sets the head's rows of the special tokens; returns the mean response length to expect.

    A row is fitted by least squares to (log-sum-exp of all other logits) + constant, so the token's log-odds are the
    constant; for the end token a bisection then finds the constant whose mean length is half the budget.
    """
    special = sorted({tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id})
    states_BRD = _sampled_states(model, tokenizer, prompts[:SAMPLED], budget, special)
    states_ND = states_BRD.flatten(0, 1).double()
    head_VD = model.get_output_embeddings().weight
    others_V = torch.ones(len(head_VD), dtype=torch.bool)
    others_V[special] = False
    lse_N = torch.cat([(part_ND @ head_VD[others_V].double().T).logsumexp(1) for part_ND in states_ND.split(512)])
    targets_N2 = torch.stack([lse_N, torch.ones_like(lse_N)], 1)
    gram_DD = states_ND.T @ states_ND
    gram_DD += RIDGE * gram_DD.diagonal().mean() * torch.eye(len(gram_DD), dtype=torch.double)
    level_D, one_D = torch.linalg.solve(gram_DD, states_ND.T @ targets_N2).unbind(1)
    for token in special:
        head_VD[token] = (level_D + NEVER * one_D).float()

    def mean_length(odds: float) -> float:
        """Sum over places of the probability that the response was not over before."""
        ends_N = torch.sigmoid(states_ND @ (level_D + odds * one_D) - lse_N)
        survives_BR = (1 - ends_N.view(states_BRD.shape[:2])).cumprod(1)
        return float(1 + survives_BR[:, :-1].sum(1).mean())

    if lengths == "fixed":
        return float(budget)
    low, high = NEVER, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_length(middle) > budget / 2 else (low, middle)
    head_VD[tokenizer.eos_token_id] = (level_D + low * one_D).float()
    return mean_length(low)


def _sampled_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    budget: int,
    special: Sequence[int],
) -> Tensor:
    """Hidden states BRD from which each token of a full-length response was predicted."""
    tokenizer.padding_side = "left"
    batch = tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt")
    tokens_BS = model.generate(
        **batch,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=budget,
        min_new_tokens=budget,
        suppress_tokens=list(special),
        pad_token_id=tokenizer.pad_token_id,
    )
    mask_BS = torch.cat([batch["attention_mask"], torch.ones(len(prompts), budget, dtype=torch.long)], 1)
    positions_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
    output = model.base_model(input_ids=tokens_BS, attention_mask=mask_BS, position_ids=positions_BS)
    return output.last_hidden_state[:, -budget - 1 : -1]


def _save_policy_adapter(policy: Path, folder: Path, tokenizer: PreTrainedTokenizerFast, *, rank: int) -> None:
    """A policy that has moved a little from its base, for rollouts: `policy-lora/`, and merged, `policy-merged/`."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    _stir(peft_model, std=0.001)
    peft_model.save_pretrained(folder / "policy-lora", save_embedding_layers=False)
    peft_model.merge_and_unload().save_pretrained(folder / "policy-merged")
    for name in ("policy-lora", "policy-merged"):
        tokenizer.save_pretrained(str(folder / name))


@torch.no_grad()
def _stir(peft_model: PeftModel, *, std: float) -> None:
    """Gives every adapter's second matrix, zero at first, random values."""
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)


def _save_reward(
    policy: Path, folder: Path, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[list[int]], *, rank: int
) -> None:
    """A reward model as the rm stage saves one, and the same merged for who cannot share a base.

    Random, but a function of the whole text; its head is scaled so that scores of the prompts vary with deviation 1.
    """
    model = LlamaForSequenceClassification.from_pretrained(policy, num_labels=1, dtype=torch.float32)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
    )
    peft_model: PeftModel = get_peft_model(model, config).eval()
    _stir(peft_model, std=0.02)
    with torch.no_grad():
        head = peft_model.get_base_model().score.modules_to_save["default"].weight
        nn.init.normal_(head)
        scores = [float(peft_model(torch.tensor([tokens])).logits) for tokens in prompts[:SAMPLED]]
        head /= torch.tensor(scores).std()
    peft_model.save_pretrained(folder / "reward", save_embedding_layers=False)
    tokenizer.save_pretrained(str(folder / "reward"))
    merged = peft_model.merge_and_unload()
    merged.config.pad_token_id = tokenizer.pad_token_id
    merged.save_pretrained(folder / "reward-full")
    tokenizer.save_pretrained(str(folder / "reward-full"))


def _shape(model: PreTrainedModel, rank: int) -> dict[str, int]:
    """`benchmarks.floors.Shape` of the model, as JSON."""
    config = model.config
    linears = [module for module in model.base_model.layers.modules() if isinstance(module, nn.Linear)]
    return {
        "trunk": sum(linear.weight.numel() for linear in linears),
        "head": config.vocab_size * config.hidden_size,
        "lora": rank * sum(linear.in_features + linear.out_features for linear in linears),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "kv_width": config.num_key_value_heads * (config.head_dim or config.hidden_size // config.num_attention_heads),
    }


def read_prompts(folder: Path) -> list[dict[str, Any]]:
    """The prompts, each with its text and its tokens."""
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a saved model, padding on the left as generation wants it."""
    return AutoTokenizer.from_pretrained(str(folder), padding_side="left")


if __name__ == "__main__":
    instructions = read_spec()
    write_result(build(instructions, Path(instructions["folder"])))
