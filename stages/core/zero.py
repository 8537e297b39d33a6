"""DeepSpeed's ZeRO behind the training engine; the one file that imports DeepSpeed.

Everything that trains is one module, whose forward pass is whatever a pass computes: so DeepSpeed sees every parameter
in one engine, and gathers and releases them around the modules that are run inside.
"""

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed import zero
from deepspeed.utils import (
    logger,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn.functional import pad

from stages.core import ranks
from stages.core.blocks import FastBlock
from stages.core.config import Distributed
from stages.core.deepspeed_json import deepspeed_json
from stages.core.engine import MOMENTS, STEP, Training, adam_state
from stages.core.lora import FastLinear

logger.setLevel(logging.ERROR)
# It would be compiled at the first start, by a compiler that may not be there, to speed up sums of bfloat16 on a CPU.
deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)


class Whole(nn.Module):
    """All that trains; its forward pass is whatever it is given."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives."""
        return compute()


class ZeroEngine:
    """Ranks share optimizer state (stage 1), gradients (2) and parameters (3)."""

    def __init__(self, training: Training, distributed: Distributed) -> None:
        self.training = training
        self.stage = int(distributed.strategy[-1])
        self.world_size = ranks.current().world_size
        self.group_of = {
            id(parameter): place
            for place, group in enumerate(training.optimizer.param_groups)
            for parameter in group["params"]
        }
        ranks.require_group()
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists, with one process too
        whole = Whole(training.modules)
        # These read weights of layers inside them without running the layers, which is what DeepSpeed waits for.
        fast = [module for module in whole.modules() if isinstance(module, FastBlock | FastLinear)]
        self.fast = [(module, type(module)) for module in fast] if self.stage == 3 else []
        self._slow_down()
        if self.stage == 3:
            for parameter in training.read_directly:
                zero.register_external_parameter(whole, parameter)
        self.coordinators: dict[str, Any] = {}  # kind of pass -> DeepSpeed's memory of the order of its modules
        self.deepspeed, *_ = deepspeed.initialize(
            model=whole,
            optimizer=training.optimizer,
            config=deepspeed_json(distributed, max_grad_norm=training.max_grad_norm),
            dist_init_required=False,
        )

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """torch's, whose learning rates count."""
        return self.training.optimizer

    @property
    def sharded(self) -> Any:
        """DeepSpeed's optimizer around it."""
        return self.deepspeed.optimizer

    def passes(self, count: int) -> int:
        """The most that any rank needs: ranks meet in every pass."""
        return max(ranks.gather_lists([count]))

    def backward(self, compute: Callable[[], Tensor], kind: str = "") -> Tensor:
        """The loss. DeepSpeed takes the mean over ranks where we want the sum."""
        if self.stage == 3:
            self._expect(kind)
        loss = self.deepspeed(compute)
        if loss.requires_grad:
            self.deepspeed.backward(loss * self.world_size, scale_wrt_gas=False)
        return loss.detach()

    def _expect(self, kind: str) -> None:
        """Stage 3: has DeepSpeed gather ahead, and keep, by the order in which the last pass of this kind ran modules.

        It remembers one order alone. Where passes of policy and critic take turns it would find each other's wrong,
        throw away what it gathered ahead, and gather every module when it is run, and again in the backward pass.
        """
        offload = self.sharded.parameter_offload
        if self.coordinators and kind not in self.coordinators:
            new = copy.copy(offload.param_coordinator)  # shares with the others what is under way
            if not new.is_invalid_trace():
                new._invalidate_trace()
            new._clear_trace_structures()
            self.coordinators[kind] = new
        offload.param_coordinator = self.coordinators.setdefault(kind, offload.param_coordinator)

    def discard(self) -> None:
        """Forgets the gradients."""
        self.sharded.zero_grad(set_to_none=True)
        if self.stage == 3:
            self.sharded.micro_step_id = 0
            self.sharded.grad_partitions_flat_buffer.zero_()
        else:
            for place in list(self.sharded.averaged_gradients):
                self.sharded.averaged_gradients[place] = None
            for place in list(self.sharded.all_grad_tensors):
                self.sharded.all_grad_tensors[place] = None

    def step(self, idle: Sequence[int] = ()) -> float:
        """DeepSpeed reduces, clips and steps, or leaves the step out where the norm is not finite."""
        self.deepspeed.step()
        norm = float(self.sharded._global_grad_norm)
        for place in idle:  # a zero gradient moved nothing, but was counted
            for flat in self._flats(place):
                self.optimizer.state[flat][STEP].zero_()
        return norm if not self.sharded.overflow else float("nan")

    def _flats(self, group: int) -> list[Tensor]:
        """The flat tensors that the optimizer steps for a parameter group: this rank's part of it."""
        if self.stage == 3:
            return [
                flat
                for place, flat in enumerate(self.sharded.fp32_partitioned_groups_flat)
                if self.sharded.sub_group_to_group_id[place] == group
            ]
        return [self.sharded.single_partition_of_fp32_groups[group]]

    @contextlib.contextmanager
    def gathered(self) -> Generator[None]:
        """Stage 3: gathers all parameters at once, and keeps DeepSpeed from releasing them module by module."""
        if self.stage != 3:
            yield
            return
        offload = self.sharded.parameter_offload
        with zero.GatheredParameters(list(self.deepspeed.module.parameters())):
            for parameter in self.deepspeed.module.parameters():
                parameter.ds_active_sub_modules.clear()
            for hook in [*offload.forward_hooks, *offload.backward_hooks]:
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            for module, kind in self.fast:
                module.__class__ = kind
            try:
                yield
            finally:
                self._slow_down()
                offload._register_deepspeed_module(offload.module)
                self.coordinators = {}  # modules are numbered anew

    @contextlib.contextmanager
    def rewriting(self, parameters: Sequence[nn.Parameter]) -> Generator[None]:
        """What is written goes into the copies too that DeepSpeed steps; both are float32, so nothing is lost."""
        with zero.GatheredParameters(list(parameters), modifier_rank=0, enabled=self.stage == 3):
            yield
        self.sharded.refresh_fp32_params()

    def _slow_down(self) -> None:
        """Gives the modules that read others' weights the forward pass of their libraries."""
        for module, kind in self.fast:
            module.__class__ = next(base for base in kind.__bases__ if base is not FastBlock)

    def moments(self) -> dict[str, Tensor]:
        """Adam's state, put together from every rank's part."""
        found: dict[str, Tensor] = {}
        self._link_moments()
        for name, parameter in self.training.parameters.items():
            flat = self._flats(self.group_of[id(parameter)])[0]
            if STEP not in self.optimizer.state.get(flat, {}):
                continue
            for key in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, key)
                found[f"{name}/{key}"] = whole.detach().cpu().clone().view(_shape(parameter))
            found[f"{name}/{STEP}"] = self.optimizer.state[flat][STEP].detach().cpu().clone()
        return found

    def _link_moments(self) -> None:
        """Makes DeepSpeed look again where the moments are: it does so after the step of the first group alone."""
        if self.stage < 3:
            self.sharded._hp_optimizer_states_linked = False
            self.sharded._lazy_init_hp_params_optimizer_state()

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Every rank takes its part."""
        steps = {
            self.group_of[id(parameter)]: moments[f"{name}/{STEP}"]
            for name, parameter in self.training.parameters.items()
            if f"{name}/{STEP}" in moments
        }
        if not steps:
            return
        for place, group in enumerate(self.optimizer.param_groups):
            for flat in self._flats(place):
                zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
                step = steps.get(place, torch.zeros(()))
                self.optimizer.state[flat] = adam_state(flat, group, zeros | {STEP: step})
        self._link_moments()
        for name, parameter in self.training.parameters.items():
            if f"{name}/{STEP}" in moments:
                for key in MOMENTS:
                    self._take_part(parameter, key, moments[f"{name}/{key}"])

    def _take_part(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Puts this rank's part of a moment in its place."""
        value = value.to(parameter.device)
        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        size, rank = parameter.partition_numel(), ranks.current().rank
        padded = pad(value.flatten(), (0, size * self.world_size - value.numel()))
        safe_set_local_optimizer_state(parameter, padded[rank * size : (rank + 1) * size], key)

    def close(self) -> None:
        """Makes every parameter whole again and takes DeepSpeed off."""
        if self.stage == 3:
            parameters = list(self.deepspeed.module.parameters())
            with self.gathered():
                whole = [each.detach().clone() for each in parameters]
            offload = self.sharded.parameter_offload
            for hook in [*offload.forward_hooks, *offload.backward_hooks]:
                hook.remove()
            for parameter, value in zip(parameters, whole, strict=True):
                parameter.data = value
            for module, kind in self.fast:
                module.__class__ = kind
        self.deepspeed.destroy()


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
