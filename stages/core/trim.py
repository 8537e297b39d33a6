"""The last block on the tokens that somebody reads, as far as it can be.

A reward model reads one token a sequence; policy and critic read those before response tokens. Attention needs keys and
values of all tokens in the last block, and nothing after it mixes tokens: the feed-forward part runs on the tokens that
are read, and in the Llama family on a CPU their queries are the only ones.

Legend: N packed tokens, M of them read, D hidden size.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from stages.core.blocks import FastBlock


def last_block(backbone: nn.Module) -> nn.Module | None:
    """The last of the backbone's blocks, or None where it has none that is known."""
    blocks = getattr(backbone, "layers", getattr(backbone, "h", None))
    return blocks[-1] if isinstance(blocks, nn.ModuleList) else None


@contextmanager
def trimmed(backbone: nn.Module, places_M: Tensor) -> Generator[None]:
    """While it is open, hidden states are right at `places_M`, each named once; those of other tokens mean nothing."""
    block = last_block(backbone)
    mlp = None if _is_recomputed(block) else getattr(block, "mlp", None)
    if isinstance(block, FastBlock):
        block.reads_M = places_M.sort().values
        try:
            yield
        finally:
            block.reads_M = None
    elif isinstance(mlp, nn.Module) and type(mlp).__name__.endswith("MLP"):  # known to treat each token by itself
        with _narrowed(mlp, places_M):
            yield
    else:
        yield


def _is_recomputed(block: nn.Module | None) -> bool:
    """Whether the backward pass runs the block again, when the hooks below are gone."""
    return bool(getattr(block, "gradient_checkpointing", False)) and block is not None and block.training


@contextmanager
def _narrowed(mlp: nn.Module, places_M: Tensor) -> Generator[None]:
    wide: list[Tensor] = []

    def narrow(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        (x_1ND,) = inputs
        wide.append(x_1ND)
        return (x_1ND.index_select(1, places_M),)

    def widen(module: nn.Module, inputs: tuple[Any, ...], out_1MD: Tensor) -> Tensor:
        x_1ND = wide.pop()
        return out_1MD.new_zeros(1, x_1ND.shape[1], out_1MD.shape[2]).index_copy(1, places_M, out_1MD)

    hooks = [mlp.register_forward_pre_hook(narrow), mlp.register_forward_hook(widen)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
