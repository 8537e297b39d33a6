"""A tiny random Llama with a byte-level tokenizer, built in a second: for tests that need a model, not its skill."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TEXT = ["the cat sat on the mat", "a dog ran to the red house", "say yes or no", "user: hello assistant: good day"]
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges; `<s>` is 0 and put first, `</s>` is 1, `<pad>` is 2; no chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def tiny_llama(*, seed: int = 0, vocabulary: int = 300, hidden: int = 32, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama with grouped queries (4 heads on 2 key/value heads), in float32."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    """A random GPT-2 (learned positions, biases, tied head), in float32."""
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128, attn_implementation="sdpa")
    return _random(GPT2LMHeadModel, config)


def tiny_mistral(window: int = 8) -> MistralForCausalLM:
    """A random Mistral whose attention reaches `window` tokens back, in float32."""
    config = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=window,
        attn_implementation="sdpa",
    )
    return _random(MistralForCausalLM, config)


def tiny_qwen2() -> Qwen2ForCausalLM:
    """A random Qwen2 (biases on queries, keys and values), in float32."""
    return _random(Qwen2ForCausalLM, Qwen2Config(**QWEN))


def tiny_qwen3() -> Qwen3ForCausalLM:
    """A random Qwen3 (norms on the heads of queries and keys, heads wider than the hidden size says), in float32."""
    return _random(Qwen3ForCausalLM, Qwen3Config(**QWEN, head_dim=16))


QWEN = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attn_implementation": "sdpa",
}


def _random(kind: type[PreTrainedModel], config: object) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
        for parameter in model.parameters():  # biases start at zero, which would hide a forgotten one
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def tiny_model_folder(folder: Path, *, seed: int = 0, layers: int = 2) -> Path:
    """`folder` with a tiny model and its tokenizer, as from_pretrained reads them."""
    tokenizer = tiny_tokenizer()
    tiny_llama(seed=seed, vocabulary=len(tokenizer), layers=layers).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_adapter_folder(folder: Path, base: Path, *, head: str = "lm", seed: int = 1, rank: int = 4) -> Path:
    """`folder` with a random LoRA adapter on the model in `base`, as the sft ("lm") or rm ("score") stage saves it."""
    score = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    options = score if head == "score" else {"task_type": "CAUSAL_LM"}
    kind = LlamaForSequenceClassification if head == "score" else LlamaForCausalLM
    classes = {"num_labels": 1} if head == "score" else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", **options)
        model = get_peft_model(kind.from_pretrained(base, **classes), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_reward_folder(folder: Path, *, seed: int = 0) -> Path:
    """`folder` with a tiny full reward model (no adapter) and its tokenizer."""
    tokenizer = tiny_tokenizer()
    config = tiny_llama(vocabulary=len(tokenizer)).config
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
