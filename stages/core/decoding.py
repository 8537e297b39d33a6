"""Decoding: one token for each unfinished sequence at a time, some hundred times over.

A step takes so few tokens through every layer that much of its time goes into starting operations. So the Llama family
on a CPU has a step of its own, with a third of transformers' operations, on copies of the weights that are laid out for
small products. Any other model and device steps by transformers' forward pass.

Legend: B sequences, D hidden size, H heads (queries and keys side by side), E head size, F feed-forward size,
V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, silu
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from stages.core.attention import Layout
from stages.core.blocks import FastBlock, parts_of
from stages.core.kv_cache import DecodeStep, KvCache
from stages.core.lora import part_of
from stages.core.models import backbone
from stages.core.products import PackedLinears, Part

FAMILY = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)


class Decoder(Protocol):
    """Takes the sequences of a cache on by a token each, by the weights of the time it was made."""

    def step(self, tokens_B: Tensor, cache: KvCache) -> Tensor:
        """Last hidden states BD after one more token for each sequence of a cache, which it joins."""
        ...

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """Logits BV of the token after."""
        ...


def decoder_of(model: PreTrainedModel, *, autocast: bool = False) -> Decoder:
    """The fastest there is for a model as it stands now, its active adapter included.

    `autocast`: its float32 weights are lowered to bfloat16, where it is transformers that runs them.
    """
    if model.device.type == "cpu" and (blocks := _packed_blocks(model)) is not None:
        return PackedDecoder(model, blocks)
    return ModelDecoder(model, autocast=autocast)


def _head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    head = model.get_output_embeddings()
    # Other devices have fast small products and no memory to spare.
    part = part_of(head) if model.device.type == "cpu" else None
    return head if part is None else PackedLinears([part])


class ModelDecoder:
    """Steps by the model's own forward pass; it follows the weights, its head on a CPU does not."""

    def __init__(self, model: PreTrainedModel, *, autocast: bool) -> None:
        self.body, self.logits, self.device, self.autocast = backbone(model), _head(model), model.device, autocast

    def step(self, tokens_B: Tensor, cache: KvCache) -> Tensor:
        """Last hidden states BD after one more token for each sequence of a cache, which it joins."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            hidden_1BD = self.body(
                input_ids=tokens_B[None],
                position_ids=cache.lengths_B[None],
                layout=Layout(step=DecodeStep(cache)),
                use_cache=False,
            ).last_hidden_state
        cache.advance()
        return hidden_1BD[0].float() if self.autocast else hidden_1BD[0]


class PackedDecoder:
    """Steps of the Llama family on packed weights; later changes of the weights do not reach it."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence["PackedBlock"]) -> None:
        body: Any = backbone(model)
        self.embed, self.rotary, self.blocks, self.norm = body.embed_tokens, body.rotary_emb, blocks, Norm(body.norm)
        self.logits = _head(model)

    def step(self, tokens_B: Tensor, cache: KvCache) -> Tensor:
        """Last hidden states BD after one more token for each sequence of a cache, which it joins."""
        step = DecodeStep(cache)
        x_BD = self.embed(tokens_B)
        angles = _angles(*self.rotary(x_BD, cache.lengths_B[None]), self.blocks[0].heads)
        for layer, block in enumerate(self.blocks):
            x_BD = block(x_BD, angles, step, layer)
        cache.advance()
        return self.norm(x_BD)


class Norm:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019), in few operations and float32."""

    def __init__(self, *norms: Any, repeats: Sequence[int] = (1,)) -> None:
        """One norm; or one for each of several groups of heads that stand side by side, `repeats` heads each."""
        size = norms[0].weight.shape[0]
        weights = [each.weight.float().expand(count, -1) for each, count in zip(norms, repeats, strict=True)]
        self.weight = torch.cat(weights).mul(math.sqrt(size)).squeeze(0)  # D, or HE
        self.floor = torch.tensor(math.sqrt(norms[0].variance_epsilon * size))

    def __call__(self, x: Tensor) -> Tensor:
        """The normed vectors, in x's dtype."""
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).hypot_(self.floor)
        return (wide / length).mul_(self.weight).to(x.dtype)


def _angles(cos_1BE: Tensor, sin_1BE: Tensor, heads: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines BHE of rotary embedding for queries, keys and values, which do not turn.

    The first half of the sines is negative.
    """
    query_heads, groups = heads
    signs_E = torch.ones(sin_1BE.shape[-1], dtype=sin_1BE.dtype)
    signs_E[: len(signs_E) // 2] = -1
    turned = (each_1BE[0][:, None].expand(-1, query_heads + groups, -1) for each_1BE in (cos_1BE, sin_1BE * signs_E))
    cos_BHE, sin_BHE = (
        pad(each_BHE, (0, 0, 0, groups), value=rest) for each_BHE, rest in zip(turned, (1, 0), strict=True)
    )
    return cos_BHE, sin_BHE


class PackedBlock:
    """One block of the family, its weights copied."""

    def __init__(self, block: Any, groups: Sequence[Sequence[Part]]) -> None:
        attention = block.self_attn
        self.size, self.scale, self.window = attention.head_dim, attention.scaling, block.window
        self.heads = attention.q_proj.out_features // self.size, attention.k_proj.out_features // self.size
        self.attention_norm, self.feed_forward_norm = Norm(block.input_layernorm), Norm(block.post_attention_layernorm)
        self.heads_norm: Norm | None = None
        if hasattr(attention, "q_norm"):
            self.heads_norm = Norm(attention.q_norm, attention.k_norm, repeats=self.heads)
        self.inputs, self.output, self.wide, self.down = map(PackedLinears, groups)

    def __call__(self, x_BD: Tensor, angles: tuple[Tensor, Tensor], step: DecodeStep, layer: int) -> Tensor:
        """The block's output BD."""
        # Attention is worked out in float32: the faster one on a CPU.
        heads_BHE = self.inputs(self.attention_norm(x_BD)).float().view(len(x_BD), -1, self.size)
        if self.heads_norm is not None:
            both_BHE, value_BGE = heads_BHE.split([sum(self.heads), self.heads[1]], 1)
            heads_BHE = torch.cat([self.heads_norm(both_BHE), value_BGE], 1)
        cos_BHE, sin_BHE = angles
        rotated_BHE = (heads_BHE * cos_BHE).addcmul_(heads_BHE.roll(self.size // 2, -1), sin_BHE)
        query_BHE, new_BHE = rotated_BHE.split([self.heads[0], 2 * self.heads[1]], 1)
        mixed_BHE = step.attend(layer, query_BHE, new_BHE.unflatten(1, (2, -1)), scale=self.scale, window=self.window)
        x_BD = self.output(mixed_BHE.flatten(1), x_BD)
        gate_BF, up_BF = self.wide(self.feed_forward_norm(x_BD)).chunk(2, 1)
        return self.down(silu(gate_BF).mul_(up_BF), x_BD)


def _packed_blocks(model: PreTrainedModel) -> list[PackedBlock] | None:
    """The model's blocks; None where some layer can only be run by the model itself."""
    body: Any = backbone(model)
    if type(body) not in FAMILY:
        return None
    packed: list[PackedBlock] = []
    for block in body.layers:
        if not isinstance(block, FastBlock):
            return None
        attention, mlp = block.self_attn, block.mlp
        groups = [
            parts_of(attention.q_proj, attention.k_proj, attention.v_proj),
            parts_of(attention.o_proj),
            parts_of(mlp.gate_proj, mlp.up_proj),
            parts_of(mlp.down_proj),
        ]
        whole = [group for group in groups if group is not None]
        if len(whole) < len(groups):
            return None
        packed.append(PackedBlock(block, whole))
    return packed
