"""LoRA layers that cost little more than their base: peft's modules, parameters and files, our arithmetic.

peft adds `B(A(x)) * scaling` to the base's output in four separate passes over it and keeps what autograd asks for. The
function below adds the low-rank product in place and writes the backward pass out, which on a CPU takes a third off
the time of a narrow layer (see benchmarks/README.md).

Legend: N tokens, I inputs and O outputs of a layer, r rank.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from stages.core.products import Part, parts_from, project, project_back


class FastLinear(Linear):
    """peft's LoRA layer on a frozen nn.Linear, with at most one adapter active and no dropout."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus scaling * B A x under the active adapter; what only peft can do is left to peft."""
        part = None if args or kwargs else part_of(self)
        if part is None:
            return super().forward(x, *args, **kwargs)
        if part.low_rI is None:
            return linear(x, part.weight_OI, part.bias_O)
        return LowRankLinear.apply(x, part.scaling, *part.tensors)

    def part(self) -> Part | None:
        """The layer as it stands; None where only peft can run it."""
        base, name = self.base_layer, self._adapter()
        if self.merged or self._drops_out() or _is_lowered(base.weight):
            return None
        if name is None:
            return Part(base.weight, base.bias)
        return Part(base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])

    def _adapter(self) -> str | None:
        if self.disable_adapters:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        assert len(active) <= 1, active
        return active[0] if active else None

    def _drops_out(self) -> bool:
        return self.training and any(isinstance(each, nn.Dropout) for each in self.lora_dropout.values())


class LowRankLinear(torch.autograd.Function):
    """x W' + bias + scaling * (x A') B': the gradients that are asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: float, *tensors: Tensor | None) -> Tensor:
        """Output [..., O] for x [..., I]."""
        (part,) = parts_from(tensors, [scaling])
        x_NI = x.reshape(-1, x.shape[-1]).to(part.weight_OI.dtype)
        (out_NO,), low_Nr = project(x_NI, [part])
        ctx.save_for_backward(x_NI, low_Nr, *tensors)
        ctx.scaling, ctx.dtype, ctx.shape = scaling, x.dtype, x.shape
        return out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the part's tensors."""
        x_NI, low_Nr, *tensors = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        parts = parts_from(tensors, [ctx.scaling])
        input_needed, _, *needs = ctx.needs_input_grad
        grad_x, grad_parts = project_back(x_NI, low_Nr, [grad_NO], parts, needs, input_needed=input_needed)
        return None if grad_x is None else grad_x.to(ctx.dtype).view(ctx.shape), None, *grad_parts


def part_of(module: nn.Module) -> Part | None:
    """A linear layer as it stands, its active adapter included; None where only the module itself can run it.

    So it is where autocast lowers float32 weights: it remembers what it has cast, which pays more than what we save.
    """
    if type(module) is nn.Linear and not _is_lowered(module.weight):
        return Part(module.weight, module.bias)
    return module.part() if isinstance(module, FastLinear) else None


def _is_lowered(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and torch.is_autocast_enabled(weight.device.type)


def speed_up(model: nn.Module) -> list[FastLinear]:
    """Gives the plain LoRA layers of a peft model the arithmetic above; the layers that have it now.

    Others (DoRA and its like, embeddings, quantised or transposed bases) keep peft's.
    """
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and not module.lora_variant:
            module.__class__ = FastLinear
    return [module for module in model.modules() if isinstance(module, FastLinear)]
