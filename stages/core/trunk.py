"""One base model in memory, with the LoRA adapters that stand on it.

Legend: B sequences, N packed tokens, M response tokens, D hidden size, V vocabulary.
"""

import copy
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.errors import UserError
from stages.core import lora
from stages.core.decoding import Decoder, decoder_of
from stages.core.models import backbone
from stages.core.passes import check_head, packed_hidden, packed_hidden_at, tokens_multiple
from stages.core.sequences import PackedBatch


class Trunk:
    """A base model whose forward pass runs under a chosen adapter, or under none.

    Every parameter is frozen but those named to `train`, whichever adapter is active: peft's own `set_adapter` would
    freeze all others, and asks every parameter of every layer, 9 ms for six layers with three adapters.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, *, autocast: bool = False) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        self.autocast = autocast  # bfloat16 products over float32 weights: full fine-tuning keeps master weights
        self.multiple = tokens_multiple(device, lowered=autocast or model.dtype == torch.bfloat16)
        self.peft: PeftModel | None = None
        self.trainable: list[nn.Parameter] = []
        self._tuner_layers: list[BaseTunerLayer] = []
        self._active: str | None = None
        self._recomputed: list[nn.Module] = []

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters on this base."""
        return [] if self.peft is None else list(self.peft.peft_config)

    def add_adapter(self, name: str, config: LoraConfig, weights: Mapping[str, Tensor] | None = None) -> None:
        """Puts a LoRA adapter on the base: fresh (its output is zero), or with the given weights."""
        if config.bias != "none":
            raise UserError(
                f"adapter {name}: LoRA bias={config.bias!r} changes the base itself; train it with bias none"
            )
        if self.peft is None:
            self.peft = PeftModel(self.model, config, adapter_name=name)
        else:
            self.peft.add_adapter(name, config)
        if weights is not None:
            result = set_peft_model_state_dict(self.peft, dict(weights), adapter_name=name)
            if result.unexpected_keys:
                raise UserError(f"adapter {name}: does not fit this base (no {result.unexpected_keys[0]} in it)")
        self._tuner_layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        lora.speed_up(self.model)
        self.model.requires_grad_(False)
        self.train(())
        self._active = name
        self.use(None)

    def clone_adapter(self, name: str, clone: str) -> None:
        """Adds an adapter with another's config and weights."""
        assert self.peft is not None
        weights = get_peft_model_state_dict(self.peft, adapter_name=name)
        self.add_adapter(clone, copy.copy(self.peft.peft_config[name]), weights)

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of one adapter, in a fixed order."""
        return [
            parameter
            for layer in self._tuner_layers
            for part in layer.adapter_layer_names
            for adapter, module in getattr(layer, part).items()
            if adapter == name
            for parameter in (module.parameters() if isinstance(module, nn.Module) else [module])
        ]

    def train(self, parameters: Iterable[nn.Parameter], *, recompute: bool = False) -> None:
        """Names the parameters that train, in addition to those named before.

        `recompute`: blocks keep no activations, and are run again in the backward pass.
        """
        if recompute:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self._recomputed = [each for each in self.model.modules() if getattr(each, "gradient_checkpointing", False)]
        self.trainable.extend(parameters)
        for parameter in self.trainable:
            parameter.requires_grad_(True)

    def use(self, adapter: str | None) -> None:
        """Makes `adapter` the one that the next forward passes run under; None is the bare base."""
        if adapter == self._active:
            return
        for layer in self._tuner_layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        self._active = adapter

    def decoder(self, adapter: str | None) -> Decoder:
        """For decoding under `adapter` with the weights as they are now, until anything else is asked of this trunk."""
        self.use(adapter)
        return decoder_of(self.model, autocast=self.autocast)

    def hidden(self, packed: PackedBatch, adapter: str | None) -> Tensor:
        """Last hidden states ND of packed sequences under an adapter."""
        self.use(adapter)
        with self._precision(), self._recomputing():
            hidden_ND = packed_hidden(self.backbone, packed, multiple=self.multiple)
        return hidden_ND.float() if self.autocast else hidden_ND

    def hidden_at(self, packed: PackedBatch, adapter: str | None, places_M: Tensor) -> Tensor:
        """Last hidden states MD at `places_M` of packed sequences under an adapter: `hidden` for less."""
        self.use(adapter)
        with self._precision(), self._recomputing():
            hidden_MD = packed_hidden_at(self.backbone, packed, places_M, multiple=self.multiple)
        return hidden_MD.float() if self.autocast else hidden_MD

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    @contextmanager
    def _recomputing(self) -> Generator[None]:
        """While gradients are asked for, blocks are in training mode, which is what transformers goes by.

        What is inside them is not: PPO trains without dropout.
        """
        blocks = self._recomputed if torch.is_grad_enabled() else []
        for block in blocks:
            block.training = True
        try:
            yield
        finally:
            for block in blocks:
                block.training = False

    @property
    def backbone(self) -> nn.Module:
        """The transformer without its head."""
        return backbone(self.model)

    @property
    def width(self) -> int:
        """D, the size of a hidden state."""
        return self.model.config.get_text_config().hidden_size

    @property
    def lm_head(self) -> nn.Module:
        """The head that turns hidden states into logits."""
        return self.model.get_output_embeddings()

    def check_head(self) -> None:
        """Raises UserError where the model's logits are more than its head applied to the last hidden state."""
        with self._precision():
            check_head(self.model)

    def save_adapter(self, name: str, folder: Path, base: str) -> None:
        """Writes one adapter in PEFT format; `base` is where a loader finds the base model."""
        assert self.peft is not None
        state = get_peft_model_state_dict(self.peft, adapter_name=name)
        save_file(
            {key: tensor.contiguous().cpu() for key, tensor in state.items()}, folder / "adapter_model.safetensors"
        )
        config = copy.copy(self.peft.peft_config[name])
        config.base_model_name_or_path, config.inference_mode = base, True
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)  # the same adapter is the same bytes
        config.save_pretrained(str(folder))


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor], dict[str, Tensor]]:
    """A saved LoRA adapter: its config, its adapter weights, and the weights of a head saved with it."""
    config = LoraConfig.from_pretrained(str(folder))
    head_names = tuple(config.modules_to_save or ())
    config.modules_to_save = None
    state = load_file(folder / "adapter_model.safetensors")
    head = {key: value for key, value in state.items() if any(f".{name}." in key for name in head_names)}
    return config, {key: value for key, value in state.items() if key not in head}, head
