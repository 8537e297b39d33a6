"""How much memory a stage will take, from a model's config alone. Formulas only: no torch, no weights.

Estimates count what must be held at once and leave out the framework's own few hundred MB. Activations follow the
tensors a Llama block saves for its backward pass (compare Korthikanti et al. 2022, arXiv 2205.05198, sec. 4.1, for
GPT); attention is assumed to save no score matrix, as fused kernels do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.core.config import Tuning

BYTES = {"float32": 4, "bfloat16": 2}
WRITTEN_OUT = ("llama", "mistral", "qwen2", "qwen3")  # stages.core.blocks.FAMILY
GRADIENT_BYTES = 4  # trained parameters are float32
ADAM_BYTES = 8  # two float32 moments
CHUNK_LOGITS = 2**26  # stages.core.logprobs holds at most this many at once on a GPU, fewer on a CPU

# Dimensions of models that recipes name, so that they are estimated before anything is downloaded.
_KNOWN: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a decoder-only transformer."""

    hidden: int
    intermediate: int
    layers: int
    query_width: int  # heads x head size
    kv_width: int  # key-value heads x head size
    vocabulary: int
    tied: bool
    gated: bool  # a third matrix in the feed-forward part, as in Llama
    written_out: bool  # stages.core.blocks runs the blocks, and keeps less for the backward pass

    @property
    def linear_shapes(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one block."""
        up = [(self.hidden, self.intermediate)] * (2 if self.gated else 1)
        attention = [
            (self.hidden, self.query_width),
            *[(self.hidden, self.kv_width)] * 2,
            (self.query_width, self.hidden),
        ]
        return [*attention, *up, (self.intermediate, self.hidden)]

    @property
    def trunk_parameters(self) -> int:
        """Parameters without embedding and head; biases are left out, norms counted."""
        block = sum(inputs * outputs for inputs, outputs in self.linear_shapes) + 2 * self.hidden
        return self.layers * block + self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding and, where it is not the same matrix, the head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.trunk_parameters + self.embedding_parameters

    def lora_parameters(self, rank: int) -> int:
        """Parameters of a LoRA adapter on every linear layer of every block: rank x (inputs + outputs) each."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.linear_shapes)

    def kv_cache_bytes(self, tokens: int, bytes_each: int) -> int:
        """Keys and values of `tokens` tokens in all layers."""
        return 2 * self.layers * self.kv_width * tokens * bytes_each

    def activation_bytes(self, tokens: int, bytes_each: int) -> int:
        """What the blocks save for the backward pass over `tokens` packed tokens."""
        norms = (2 if self.written_out else 4) * self.hidden  # inputs of two norms; else their outputs too
        attention = 3 * self.query_width + 2 * self.kv_width  # its inputs, its output padded and packed
        feed_forward = (2 if self.written_out or not self.gated else 4) * self.intermediate
        return self.layers * (norms + attention + feed_forward) * tokens * bytes_each


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """The dimensions in a Hugging Face config.json. Raises KeyError naming what it lacks."""
    text: Mapping[str, Any] = config.get("text_config", config)

    def first(*names: str) -> Any:
        for name in names:
            if text.get(name) is not None:
                return text[name]
        raise KeyError(names[0])

    hidden, heads = first("hidden_size", "n_embd"), first("num_attention_heads", "n_head")
    head_size = text.get("head_dim") or hidden // heads
    gpt2 = "n_embd" in text
    return ModelShape(
        hidden=hidden,
        intermediate=text.get("n_inner") or 4 * hidden if gpt2 else first("intermediate_size"),
        layers=first("num_hidden_layers", "n_layer"),
        query_width=heads * head_size,
        kv_width=(text.get("num_key_value_heads") or heads) * head_size,
        vocabulary=first("vocab_size"),
        tied=text.get("tie_word_embeddings", gpt2),
        written_out=text.get("model_type") in WRITTEN_OUT,
        gated=not gpt2 and text.get("model_type") not in ("gpt_neox", "opt", "phi"),
    )


def known_config(hub_id: str) -> Mapping[str, Any] | None:
    """The dimensions of a model that a bundled recipe names, or None."""
    return _KNOWN.get(hub_id)


@dataclass(frozen=True)
class Training:
    """The sizes that decide what training one model takes."""

    tuning: Tuning
    dtype: str
    tokens: int  # packed tokens of one forward and backward pass
    logits: int  # logits held at once in that pass; 0 for a model with a score head


def base_bytes(shape: ModelShape, tuning: Tuning, dtype: str) -> int:
    """The weights: in `dtype` when frozen, float32 when trained."""
    return shape.parameters * (BYTES[dtype] if tuning.method == "lora" else 4)


def trained_parameters(shape: ModelShape, tuning: Tuning) -> int:
    """How many parameters the tuning trains."""
    return shape.parameters if tuning.method == "full" else shape.lora_parameters(tuning.rank)


def training_bytes(shape: ModelShape, training: Training) -> dict[str, int]:
    """Part -> bytes of training one model, its base weights included."""
    trained = trained_parameters(shape, training.tuning)
    adapters = trained * 4 if training.tuning.method == "lora" else 0
    return {
        "weights": base_bytes(shape, training.tuning, training.dtype),
        "adapters": adapters,
        "gradients": trained * GRADIENT_BYTES,
        "optimizer": trained * ADAM_BYTES,
        "activations": shape.activation_bytes(training.tokens, BYTES[training.dtype]),
        "logits": 3 * training.logits * 4,  # logits, their softmax, their gradient
    }
