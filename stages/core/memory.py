"""How much memory a stage will take, from a model's config alone. Formulas only: no torch, no weights.

Estimates count what must be held at once and leave out the framework's own few hundred MB. Activations follow the
tensors a Llama block saves for its backward pass (compare Korthikanti et al. 2022, arXiv 2205.05198, sec. 4.1, for
GPT); attention is assumed to save no score matrix, as fused kernels do not. On a CPU it does, up to KEPT_KEYS numbers
for each query and head (stages.core.span_attention), which is left out: estimates are for GPUs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.core.config import Tuning

BYTES = {"float32": 4, "bfloat16": 2}
WRITTEN_OUT = ("llama", "mistral", "qwen2", "qwen3")  # stages.core.blocks.FAMILY
GRADIENT_BYTES = 4  # trained parameters are float32
ADAM_BYTES = 8  # two float32 moments
BUCKET_BYTES = 64 * 2**20  # stages.core.engines sums so much of the gradients at a time
ZERO_BUCKET = 50_000_000  # elements that DeepSpeed reduces at a time, and gathers ahead
ZERO_LIVE = 100_000_000  # elements that ZeRO-3 holds gathered at a time
CHUNK_LOGITS = 2**26  # stages.core.logprobs holds at most this many at once on a GPU, fewer on a CPU


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

    def activation_bytes(self, tokens: int, bytes_each: int, *, checkpointing: bool = False) -> int:
        """What the blocks save for the backward pass over `tokens` packed tokens.

        With gradient checkpointing each keeps its input alone, and one block at a time the rest.
        """
        norms = (2 if self.written_out else 4) * self.hidden  # inputs of two norms; else their outputs too
        attention = 3 * self.query_width + 2 * self.kv_width  # its inputs, its output padded and packed
        feed_forward = (2 if self.written_out or not self.gated else 4) * self.intermediate
        block = norms + attention + feed_forward
        values = self.layers * self.hidden + block if checkpointing else self.layers * block
        return values * tokens * bytes_each


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


@dataclass(frozen=True)
class Training:
    """The sizes that decide what training one model takes."""

    tuning: Tuning
    dtype: str
    tokens: int  # packed tokens of one forward and backward pass
    logits: int  # logits held at once in that pass; 0 for a model with a score head
    checkpointing: bool = False  # gradient checkpointing


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
        "activations": shape.activation_bytes(
            training.tokens, BYTES[training.dtype], checkpointing=training.checkpointing
        ),
        "logits": 3 * training.logits * 4,  # logits, their softmax, their gradient
    }


@dataclass(frozen=True)
class Spread:
    """How a stage is spread: the strategy of `distributed:`, over how many ranks, how many of them on one machine."""

    strategy: str = "none"
    offload: str = "none"
    ranks: int = 1
    ranks_per_node: int = 1

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.ranks // self.ranks_per_node)

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 where every rank holds everything."""
        return int(self.strategy[-1]) if self.strategy.startswith("zero") else 0


def share_bytes(part: str, size: int, spread: Spread) -> int:
    """What one device holds of a part that all ranks together hold once under ZeRO (1910.02054, sec. 5).

    Stage 1 shares the optimizer, 2 the gradients too, 3 the weights too.
    """
    first_stage = {"optimizer": 1, "gradients": 2, "weights": 3, "adapters": 3}.get(part)
    if part == "optimizer" and spread.offload != "none":
        return 0
    if part in ("weights", "adapters") and spread.offload == "parameters":
        return 0
    is_shared = first_stage is not None and spread.stage >= first_stage
    return -(-size // spread.ranks) if is_shared else size
