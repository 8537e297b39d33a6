"""LoRA layers that cost little more than their base: peft's modules, parameters and files, our arithmetic.

peft adds `B(A(x)) * scaling` to the base's output in four separate passes over it and keeps what autograd asks for. The
function below adds the low-rank product in place and writes the backward pass out, which on a CPU takes a third off
the time of a narrow layer (see benchmarks/README.md).

Legend: N tokens, I inputs and O outputs of a layer, r rank.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class FastLinear(Linear):
    """peft's LoRA layer on a frozen nn.Linear, with at most one adapter active and no dropout."""

    folded: Tensor | None = None  # the base's weight plus the adapter, while a caller holds `folded` open

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus scaling * B A x under the active adapter; what only peft can do is left to peft."""
        base = self.base_layer
        casts = torch.is_autocast_enabled(x.device.type) and base.weight.dtype == torch.float32
        if args or kwargs or self.merged or casts or self._drops_out():
            return super().forward(x, *args, **kwargs)
        name = self._adapter()
        if name is None:
            return linear(x, base.weight, base.bias)
        if self.folded is not None:
            return linear(x, self.folded, base.bias)
        return LowRankLinear.apply(
            x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )

    def _adapter(self) -> str | None:
        if self.disable_adapters:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        assert len(active) <= 1, active
        return active[0] if active else None

    def _drops_out(self) -> bool:
        return self.training and any(isinstance(each, nn.Dropout) for each in self.lora_dropout.values())

    def fold(self) -> None:
        """Makes a copy of the weight with the active adapter in it."""
        name = self._adapter()
        if name is not None:
            low, high = self.lora_A[name].weight, self.lora_B[name].weight
            self.folded = torch.addmm(self.base_layer.weight, high, low, alpha=self.scaling[name])


class LowRankLinear(torch.autograd.Function):
    """x W' + bias + scaling * (x A') B' for a frozen W: gradients of x, A and B (Hu et al. 2021, 2106.09685, eq. 3).

    Products run in W's dtype; gradients of A and B come in theirs.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, low_rI: Tensor, high_Or: Tensor, scaling: float
    ) -> Tensor:
        """Output [..., O] for x [..., I]."""
        x_NI = x.reshape(-1, x.shape[-1]).to(weight_OI.dtype)
        low_Nr = x_NI @ low_rI.to(x_NI.dtype).T
        out_NO = linear(x_NI, weight_OI, bias_O).addmm_(low_Nr, high_Or.to(x_NI.dtype).T, alpha=scaling)
        ctx.save_for_backward(x_NI, low_Nr, weight_OI, low_rI, high_Or)
        ctx.scaling, ctx.dtype, ctx.shape = scaling, x.dtype, x.shape
        return out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        """Gradients of x, A and B, those that are asked for."""
        x_NI, low_Nr, weight_OI, low_rI, high_Or = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_Nr = (grad_NO @ high_Or.to(grad_NO.dtype)).mul_(ctx.scaling)
        grad_x = grad_low = grad_high = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_NO @ weight_OI).addmm_(grad_Nr, low_rI.to(grad_NO.dtype)).to(ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[3]:
            grad_low = (grad_Nr.T @ x_NI).to(low_rI.dtype)
        if ctx.needs_input_grad[4]:
            # r rows of O is the faster way round for a product this thin.
            grad_high = (low_Nr.T @ grad_NO).T.to(high_Or.dtype).mul(ctx.scaling)
        return grad_x, None, None, grad_low, grad_high, None


def speed_up(model: nn.Module) -> list[FastLinear]:
    """Gives the plain LoRA layers of a peft model the arithmetic above; the layers that have it now.

    Others (DoRA and its like, embeddings, quantised or transposed bases) keep peft's.
    """
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and not module.lora_variant:
            module.__class__ = FastLinear
    return [module for module in model.modules() if isinstance(module, FastLinear)]


@contextmanager
def folded(layers: Iterable[FastLinear]) -> Generator[None]:
    """While it is open, the layers run with their active adapter added to a copy of the weight.

    Exact to rounding in float32. In bfloat16 the sum would lose most of a small adapter, so nothing is folded there.
    """
    changed = [layer for layer in layers if layer.base_layer.weight.dtype == torch.float32]
    try:
        for layer in changed:
            layer.fold()
        yield
    finally:
        for layer in changed:
            layer.folded = None
