"""Dimensions of well-known models, so that a plan needs no download. From their config.json."""

from collections.abc import Mapping
from typing import Any


def _qwen(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int = 152064) -> Any:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": vocabulary == 151936,  # the small ones
    }


def _llama(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool = False) -> Any:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": tied,
    }


_KNOWN: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen2.5-0.5B": _qwen(896, 4864, 24, 14, 2, 151936),
    "Qwen/Qwen2.5-1.5B": _qwen(1536, 8960, 28, 12, 2, 151936),
    "Qwen/Qwen2.5-3B": _qwen(2048, 11008, 36, 16, 2, 151936),
    "Qwen/Qwen2.5-7B": _qwen(3584, 18944, 28, 28, 4),
    "Qwen/Qwen2.5-14B": _qwen(5120, 13824, 48, 40, 8),
    "Qwen/Qwen2.5-32B": _qwen(5120, 27648, 64, 40, 8),
    "Qwen/Qwen2.5-72B": _qwen(8192, 29568, 80, 64, 8),
    "meta-llama/Llama-3.2-1B": _llama(2048, 8192, 16, 32, tied=True),
    "meta-llama/Llama-3.2-3B": _llama(3072, 8192, 28, 24, tied=True),
    "meta-llama/Llama-3.1-8B": _llama(4096, 14336, 32, 32),
    "meta-llama/Llama-3.1-70B": _llama(8192, 28672, 80, 64),
    "meta-llama/Llama-3.3-70B": _llama(8192, 28672, 80, 64),
}


def known_config(hub_id: str) -> Mapping[str, Any] | None:
    """The dimensions of a well-known model, its base or its instruct version; None for others."""
    return _KNOWN.get(hub_id.removesuffix("-Instruct"))
