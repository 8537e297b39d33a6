"""The Llama family's transformer block, written out: transformers' modules, parameters and files, our arithmetic.

A block of transformers runs some sixty small operations, and autograd keeps what each of them returns. Here the norm
with the projections after it, and the whole feed-forward part, are one function each whose gradient is written out:
about half the memory, fewer passes over it, one product for what adapters of the same input share. Attention stays the
packed one.

Legend: N packed tokens, D hidden size, H heads (queries and keys each have their number), E head size, F feed-forward
size, M tokens that are read.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from stages.core.attention import Layout, packed_attention
from stages.core.lora import part_of
from stages.core.products import TENSORS, Part, parts_from, project, project_back

FAMILY = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019), and 1 / rms(x) in float32."""
    wide, size = x.float(), x.shape[-1]
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # float32 under autocast too, unlike a dot product
    scale = norm.square_().add_(epsilon * size).rsqrt_().mul_(math.sqrt(size))
    return _normed(x, scale, weight), scale


def _normed(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return (x.float() * scale).to(x.dtype) * weight


def rms_norm_back(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and, where it trains, of weight."""
    wide = x.float()
    grad_weight = None
    if weight.requires_grad:
        grad_weight = (grad * wide).mul_(scale).flatten(0, -2).sum(0).to(weight.dtype)
    grad_scaled = grad.float() * weight
    inner = torch.linalg.vecdot(grad_scaled, wide)[..., None].div_(-x.shape[-1]).mul_(scale.pow(3))
    return grad_scaled.mul_(scale).addcmul_(wide, inner).to(x.dtype), grad_weight


class Spec(NamedTuple):
    """What is not a tensor of a function below."""

    epsilon: float  # of the norm
    scalings: tuple[float, ...]  # of the parts


class Rotary(torch.autograd.Function):
    """Rotary embedding of tokens NHE, first half of E with second (Su et al. 2021, 2104.09864)."""

    @staticmethod
    def forward(ctx: Any, x_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
        """The rotated heads NHE."""
        ctx.save_for_backward(cos_NE, sin_NE)
        return _rotate(x_NHE, cos_NE, *_halves(sin_NE), turn=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHE: Tensor) -> tuple[Tensor, None, None]:
        """The transpose: the halves of the sines change places and sign."""
        cos_NE, sin_NE = ctx.saved_tensors
        return _rotate(grad_NHE, cos_NE, *reversed(_halves(sin_NE)), turn=-1), None, None


def _rotate(x_NHE: Tensor, cos_NE: Tensor, sin_1_N1e: Tensor, sin_2_N1e: Tensor, *, turn: int) -> Tensor:
    """The halves e of E, turned into each other: by the sines, or (-1) against them."""
    (first, second), (cos_1_N1e, cos_2_N1e) = x_NHE.chunk(2, 2), _halves(cos_NE)
    out_NHE = torch.empty_like(x_NHE, memory_format=torch.contiguous_format)
    out_1, out_2 = out_NHE.chunk(2, 2)
    torch.mul(first, cos_1_N1e, out=out_1).addcmul_(second, sin_1_N1e, value=-turn)
    torch.mul(second, cos_2_N1e, out=out_2).addcmul_(first, sin_2_N1e, value=turn)
    return out_NHE


def _halves(angles_NE: Tensor) -> tuple[Tensor, ...]:
    return angles_NE[:, None].chunk(2, 2)


class NormedProjections(torch.autograd.Function):
    """The norm of tokens ND and the linear layers that read it: their outputs NO."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, x_ND: Tensor, norm_D: Tensor, *flat: Tensor | None) -> tuple[Tensor, ...]:
        """One output a part."""
        normed_ND, scale_N1 = rms_norm(x_ND, norm_D, spec.epsilon)
        outs, low_NR = project(normed_ND, parts_from(flat, spec.scalings))
        ctx.save_for_backward(x_ND, scale_N1, norm_D, low_NR, *flat)
        ctx.spec = spec
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of the norm and of the parts' tensors, those that are asked for."""
        x_ND, scale_N1, norm_D, low_NR, *flat = ctx.saved_tensors
        _, x_needed, norm_needed, *needs = ctx.needs_input_grad
        parts = parts_from(flat, ctx.spec.scalings)
        normed_ND = _normed(x_ND, scale_N1, norm_D)
        grad_normed, grad_parts = project_back(
            normed_ND, low_NR, grads, parts, needs, input_needed=x_needed or norm_needed
        )
        grad_x = grad_norm = None
        if grad_normed is not None:
            grad_x, grad_norm = rms_norm_back(grad_normed, x_ND, scale_N1, norm_D)
        return None, grad_x, grad_norm, *grad_parts


class FeedForward(torch.autograd.Function):
    """x + down(silu(gate(n)) * up(n)) for n = norm(x), tokens ND (Shazeer 2020, 2002.05202, SwiGLU)."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, x_ND: Tensor, norm_D: Tensor, *flat: Tensor | None) -> Tensor:
        """The block's output ND."""
        *wide_parts, down_part = parts_from(flat, spec.scalings)
        normed_ND, scale_N1 = rms_norm(x_ND, norm_D, spec.epsilon)
        (gate_NF, up_NF), low_NR = project(normed_ND, wide_parts)
        (out_ND,), down_low_Nr = project(silu(gate_NF).mul_(up_NF), [down_part])
        ctx.save_for_backward(x_ND, scale_N1, norm_D, low_NR, gate_NF, up_NF, down_low_Nr, *flat)
        ctx.spec = spec
        return out_ND.add_(x_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of the norm and of the parts' tensors, those that are asked for."""
        x_ND, scale_N1, norm_D, low_NR, gate_NF, up_NF, down_low_Nr, *flat = ctx.saved_tensors
        *wide_parts, down_part = parts_from(flat, ctx.spec.scalings)
        needs = ctx.needs_input_grad[3:]
        wide_needs, down_needs = needs[: 2 * TENSORS], needs[2 * TENSORS :]
        active_NF = silu(gate_NF)
        grad_F, grad_down = project_back(
            active_NF * up_NF, down_low_Nr, [grad_ND], [down_part], down_needs, input_needed=True
        )
        assert grad_F is not None
        grad_up_NF = active_NF.mul_(grad_F)
        grad_gate_NF = torch.ops.aten.silu_backward(grad_F.mul_(up_NF), gate_NF)
        grad_normed, grad_parts = project_back(
            _normed(x_ND, scale_N1, norm_D),
            low_NR,
            [grad_gate_NF, grad_up_NF],
            wide_parts,
            wide_needs,
            input_needed=True,
        )
        assert grad_normed is not None
        grad_x, grad_norm = rms_norm_back(grad_normed, x_ND, scale_N1, norm_D)
        return None, grad_x.add_(grad_ND), grad_norm, *grad_parts, *grad_down


class FastBlock(nn.Module):
    """The forward pass of a block of `FAMILY`, mixed into its class."""

    reads_M: Tensor | None = None  # the tokens whose output anybody reads, where a caller named them

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """What `forward` gives; a block computed anew in the backward pass reads the tokens that it read before."""
        return super().__call__(*inputs, reads_M=self.reads_M, **options)

    def forward(self, hidden_states: Tensor, reads_M: Tensor | None = None, **options: Any) -> Tensor:
        """The block's output 1ND. Unpacked tokens, and layers that we cannot run, run as they always do."""
        layout = options.get("layout")
        if not isinstance(layout, Layout):
            return super().forward(hidden_states, **options)
        x_ND = hidden_states.squeeze(0)  # not [0], whose gradient is a copy among zeros
        read_MD = x_ND if reads_M is None else x_ND.index_select(0, reads_M)
        asking_M = reads_M if layout.takes_spans(self._dropout) else None
        angles = [each_1NE[0] for each_1NE in options["position_embeddings"]]
        inputs = self._attention_inputs(x_ND, None if asking_M is None else (read_MD, asking_M), angles)
        if inputs is None:
            mixed_MD = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)[0].squeeze(0)
        else:
            mixed_MD = self._attend(inputs, layout, asking_M).to(x_ND.dtype)
        if reads_M is not None and (inputs is None or asking_M is None):  # all tokens asked
            mixed_MD = mixed_MD.index_select(0, reads_M)
        if inputs is not None:
            mixed_MD = self.self_attn.o_proj(mixed_MD)
        out_MD = self._feed_forward(read_MD + mixed_MD)
        if reads_M is None:
            return out_MD[None]
        return out_MD.new_zeros(hidden_states.shape[1:]).index_copy(0, reads_M, out_MD)[None]

    @property
    def window(self) -> int | None:
        """Of sliding-window attention. Mistral has it in the config, Qwen a layer's own."""
        attention = self.self_attn
        return getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))

    @property
    def _dropout(self) -> float:
        return self.self_attn.attention_dropout if self.self_attn.training else 0.0

    def _attend(self, inputs: tuple[Tensor, Tensor, Tensor], layout: Layout, asking_M: Tensor | None) -> Tensor:
        attention = self.self_attn
        mixed_1NHE, _ = packed_attention(
            attention,
            *(each_NHE.transpose(0, 1)[None] for each_NHE in inputs),
            None,
            scaling=attention.scaling,
            sliding_window=self.window,
            dropout=self._dropout,
            layout=layout,
            asking_M=asking_M,
        )
        return mixed_1NHE.squeeze(0).flatten(1)

    def _attention_inputs(
        self, x_ND: Tensor, asking: tuple[Tensor, Tensor] | None, angles: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Query MHE, key and value NHE; `asking`, MD and M, are the tokens with a query where not all have one."""
        attention = self.self_attn
        parts = parts_of(attention.q_proj, attention.k_proj, attention.v_proj)
        if parts is None or parts[0].weight_OI.dtype != x_ND.dtype:
            return None
        if asking is None:
            query, key, value = self._heads(x_ND, parts)
            query_angles = angles
        else:
            asking_MD, asking_M = asking
            (query,), (key, value) = self._heads(asking_MD, parts[:1]), self._heads(x_ND, parts[1:])
            query_angles = [each_NE.index_select(0, asking_M) for each_NE in angles]
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        return Rotary.apply(query, *query_angles), Rotary.apply(key, *angles), value

    def _heads(self, x_ND: Tensor, parts: Sequence[Part]) -> list[Tensor]:
        """NHE of each part."""
        norm = self.input_layernorm
        outs = NormedProjections.apply(_spec(norm, parts), x_ND, norm.weight, *_tensors(parts))
        return [_attended(out_NO.unflatten(1, (-1, self.self_attn.head_dim))) for out_NO in outs]

    def _feed_forward(self, x_ND: Tensor) -> Tensor:
        norm, mlp = self.post_attention_layernorm, self.mlp
        parts = parts_of(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        if parts is None or parts[0].weight_OI.dtype != x_ND.dtype:
            return x_ND + mlp(norm(x_ND))
        return FeedForward.apply(_spec(norm, parts), x_ND, norm.weight, *_tensors(parts))


def _attended(heads_NHE: Tensor) -> Tensor:
    """In the dtype of attention and of what comes between: float32 on a CPU, where it is the faster one."""
    return heads_NHE.float() if heads_NHE.device.type == "cpu" else heads_NHE


def _spec(norm: Any, parts: Sequence[Part]) -> Spec:
    return Spec(norm.variance_epsilon, tuple(part.scaling for part in parts))


def _tensors(parts: Sequence[Part]) -> list[Tensor | None]:
    return [tensor for part in parts for tensor in part.tensors]


def parts_of(*modules: nn.Module) -> list[Part] | None:
    """The linear layers as they stand; None where one of them can only be run by itself."""
    parts = [part for part in map(part_of, modules) if part is not None]
    return parts if len(parts) == len(modules) else None


def speed_up(model: nn.Module) -> None:
    """Gives the blocks of `FAMILY` in a model the arithmetic above."""
    for module in model.modules():
        if type(module) in FAMILY and isinstance(module.mlp.act_fn, nn.SiLU | SiLUActivation):
            module.__class__ = FAST[type(module)]


FAST = {plain: type(f"Fast{plain.__name__}", (FastBlock, plain), {}) for plain in FAMILY}
