"""Weights laid out for decoding: a step takes a few tokens through every layer, some hundred times over."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from stages.core.blocks import FastBlock
from stages.core.lora import FastLinear, part_of
from stages.core.products import PackedLinears


@contextmanager
def packed_weights(model: PreTrainedModel) -> Generator[Callable[[Tensor], Tensor]]:
    """While it is open, passes of the model on a CPU run on copies of its linear weights, as they are now.

    Gives the head, hidden states BD to logits BV. Other devices have fast small products and no memory to spare.
    """
    head = model.get_output_embeddings()
    if model.device.type != "cpu":
        yield head
        return
    blocks = [module for module in model.modules() if isinstance(module, FastBlock)]
    inside = {id(module) for block in blocks for module in block.modules()}
    layers = [module for module in model.modules() if isinstance(module, FastLinear) and id(module) not in inside]
    head_part = part_of(head)
    try:
        for block in blocks:
            block.packed = block.pack()
        for layer in layers:
            layer.packed = None if (part := layer.part()) is None else PackedLinears([part])
        packed_head = None if head_part is None else PackedLinears([head_part])
        yield packed_head or head
    finally:
        for each in [*blocks, *layers]:
            each.packed = None
