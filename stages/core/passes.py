"""A pass of a transformer over packed tokens: what it is called with, rounded up where that is cheaper, and cut short.

Legend: N packed tokens, M of them read, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from data.errors import UserError
from stages.core.models import backbone
from stages.core.sequences import PackedBatch
from stages.core.trim import trimmed

COMPILED_MULTIPLE = 128
PROBE = range(1, 9)  # tokens that show whether logits are the head's alone


def tokens_multiple(device: torch.device, *, lowered: bool) -> int:
    """The multiple of tokens that passes should take; `lowered`: products run in bfloat16.

    On a CPU each new size of such a product is compiled: 0.8 ms and 0.7 MB.
    """
    return COMPILED_MULTIPLE if device.type == "cpu" and lowered else 1


def packed_inputs(packed: PackedBatch, *, multiple: int = 1) -> dict[str, Any]:
    """What a transformer is called with for packed sequences; tokens that belong to none make up the multiple."""
    missing = (0, -packed.tokens_1N.shape[1] % multiple)
    return {
        "input_ids": pad(packed.tokens_1N, missing),
        "position_ids": pad(packed.position_ids_1N, missing),
        "layout": packed.layout,
        "use_cache": False,
    }


def rounded_up(places_M: Tensor, packed: PackedBatch, *, multiple: int = 1) -> Tensor:
    """`places_M` and, behind them, as many other places as make their number a multiple, or all there are."""
    missing = -len(places_M) % multiple
    if missing == 0:
        return places_M
    unread_N = torch.ones(packed.tokens_1N.shape[1], dtype=torch.bool, device=places_M.device)
    unread_N[places_M] = False
    return torch.cat([places_M, unread_N.nonzero()[:missing, 0]])


def packed_hidden(body: nn.Module, packed: PackedBatch, *, multiple: int = 1) -> Tensor:
    """Last hidden states ND."""
    output = body(**packed_inputs(packed, multiple=multiple))
    return output.last_hidden_state[0, : packed.tokens_1N.shape[1]]


def packed_hidden_at(body: nn.Module, packed: PackedBatch, places_M: Tensor, *, multiple: int = 1) -> Tensor:
    """Last hidden states MD at `places_M`: `packed_hidden` for less."""
    # Responses that share a prompt read its last token more than once, and a trimmed pass takes each token once.
    with trimmed(body, rounded_up(places_M.unique(), packed, multiple=multiple)):
        return packed_hidden(body, packed, multiple=multiple).index_select(0, places_M)


def check_head(model: PreTrainedModel, *, packing: bool = True) -> None:
    """Raises UserError where the model's logits are more than its head applied to the last hidden state."""
    tokens = PackedBatch.of([list(PROBE)], model.device)
    inputs = packed_inputs(tokens) if packing else {"input_ids": tokens.tokens_1N, "use_cache": False}
    with torch.no_grad():
        whole = model(**inputs).logits
        ours = model.get_output_embeddings()(backbone(model)(**inputs).last_hidden_state)
    if not torch.allclose(whole.float(), ours.float(), rtol=1e-3, atol=1e-3):
        raise UserError(
            f"{type(model).__name__}: its logits are scaled or capped after the head, which is not supported; "
            "use another architecture"
        )
