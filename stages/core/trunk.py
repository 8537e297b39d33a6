"""One base model in memory, with the LoRA adapters that stand on it.

Legend: B sequences, N packed tokens, M response tokens, D hidden size, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from data.errors import UserError
from stages.core import lora
from stages.core.attention import Layout
from stages.core.decoding import packed_weights
from stages.core.models import backbone
from stages.core.sequences import PackedBatch
from stages.core.trim import trimmed

HEAD_PROBE_TOKENS = 8
COMPILED_MULTIPLE = 128


class Trunk:
    """A base model whose forward pass runs under a chosen adapter, or under none.

    Every parameter is frozen but those named to `train`. Switching adapters never changes which parameters train:
    peft's `set_adapter` freezes all others, so it is undone here.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, *, autocast: bool = False) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        self.autocast = autocast  # bfloat16 products over float32 weights: full fine-tuning keeps master weights
        # On a CPU each new size of a bfloat16 product is compiled (0.8 ms, 0.7 MB): passes take a multiple of tokens.
        lowered = autocast or model.dtype == torch.bfloat16
        self.multiple = COMPILED_MULTIPLE if device.type == "cpu" and lowered else 1
        self.peft: PeftModel | None = None
        self.trainable: list[nn.Parameter] = []
        self._tuner_layers: list[BaseTunerLayer] = []
        self._active: str | None = None

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

    def train(self, parameters: Iterable[nn.Parameter]) -> None:
        """Names the parameters that train, in addition to those named before."""
        self.trainable.extend(parameters)
        for parameter in self.trainable:
            parameter.requires_grad_(True)

    def use(self, adapter: str | None) -> None:
        """Makes `adapter` the one that the next forward passes run under; None is the bare base."""
        if adapter == self._active:
            return
        for layer in self._tuner_layers:
            layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter(adapter)
        self.model.requires_grad_(False)
        for parameter in self.trainable:
            parameter.requires_grad_(True)
        self._active = adapter

    def decoding(self, adapter: str | None) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """For decoding under `adapter`: on a CPU a copy of the weights makes its small products cheap while it is open.

        Gives the head, hidden states BD to logits BV.
        """
        self.use(adapter)
        return packed_weights(self.model)

    def hidden(self, packed: PackedBatch, adapter: str | None) -> Tensor:
        """Last hidden states ND of packed sequences under an adapter."""
        return self.step(packed.tokens_1N, packed.position_ids_1N, packed.layout, adapter)

    def hidden_at(self, packed: PackedBatch, adapter: str | None, places_M: Tensor) -> Tensor:
        """Last hidden states MD at `places_M` of packed sequences, each place once: `hidden` for less."""
        with trimmed(self.backbone, self._rounded_up(places_M, packed.tokens_1N.shape[1])):
            return self.hidden(packed, adapter).index_select(0, places_M)

    def _rounded_up(self, places_M: Tensor, tokens: int) -> Tensor:
        """`places_M` and as many others as make their number one that the device knows already."""
        missing = -len(places_M) % self.multiple
        if missing == 0:
            return places_M
        unread = torch.ones(tokens, dtype=torch.bool, device=places_M.device)
        unread[places_M] = False
        return torch.cat([places_M, unread.nonzero()[:missing, 0]])

    def step(self, tokens_1N: Tensor, position_ids_1N: Tensor, layout: Layout, adapter: str | None) -> Tensor:
        """Last hidden states ND of tokens laid out as `layout` says (packed documents, or one decoding step)."""
        self.use(adapter)
        tokens = tokens_1N.shape[1]
        if layout.step is None and (missing := -tokens % self.multiple):
            tokens_1N, position_ids_1N = pad(tokens_1N, (0, missing)), pad(position_ids_1N, (0, missing))
        with self._precision():
            output = self.backbone(input_ids=tokens_1N, position_ids=position_ids_1N, layout=layout, use_cache=False)
        hidden_ND = output.last_hidden_state[0, :tokens]
        return hidden_ND.float() if self.autocast else hidden_ND

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

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
        packed = PackedBatch.of([list(range(1, 1 + HEAD_PROBE_TOKENS))], self.device)
        with torch.no_grad(), self._precision():
            whole = self.model(
                input_ids=packed.tokens_1N, position_ids=packed.position_ids_1N, layout=packed.layout, use_cache=False
            ).logits[0]
            ours = self.lm_head(self.hidden(packed, self._active))
        if not torch.allclose(whole.float(), ours.float(), rtol=1e-3, atol=1e-3):
            raise UserError(
                f"{type(self.model).__name__}: its logits are scaled or capped after the head, which is not supported; "
                "use another architecture"
            )

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
