"""Which engine samples responses, and how it is reached. Imports no torch."""

import json
import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from data.paths import ConfigPath
from stages.core.config import Section

EngineName = Literal["native", "vllm", "vllm-server"]
_ADDRESS = re.compile(r"https?://[^/\s:@?#]+(:\d{1,5})?/?")

_GPU_KEYS = ("gpu_memory_share", "devices", "sleep")
_STARTED = ("vllm_python", *_GPU_KEYS)  # keys of servers that are started here
_ASKED = ("timeout_s",)  # keys of every server that is asked over HTTP


class EngineConfig(Section):
    """Where responses are sampled. A key that the chosen engine does not read is refused."""

    # Keys of a subclass that need another program than this one to sample.
    external_keys: ClassVar[tuple[str, ...]] = ()

    engine: Literal["auto", "native", "vllm", "vllm-server"] = Field(
        default="auto",
        description="native: in this process; vllm: a vLLM server beside it, started and stopped here; vllm-server: "
        "several, started here or elsewhere; auto: vllm where it is installed and a GPU is there, else native",
    )
    servers: list[str] = Field(
        default=[],
        description="vllm-server: addresses (http://host:port) of `vllm serve` processes started elsewhere; they read "
        "new weights from this run's folder, so it must be theirs too. Default: server_count of them are started here",
    )
    server_count: Annotated[int, Field(ge=1)] = Field(
        default=1, description="vllm-server: servers to start here, requests spread over them"
    )
    token_env: str | None = Field(
        default=None, description="environment variable that holds the token of `servers`; those started here get one"
    )
    timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=600.0,
        description="seconds that a server may take for one response, or to load a policy; then it is lost",
    )
    vllm_python: ConfigPath | None = Field(
        default=None, description="Python interpreter that has vLLM; default: `vllm` beside the one that runs this"
    )

    gpu_memory_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.4,
        description="share of a GPU's memory that a server started here may take; the trainer needs the rest",
    )
    devices: list[str] = Field(
        default=[],
        description="GPUs (as in CUDA_VISIBLE_DEVICES) of each server started here; default: the trainer's own",
    )
    sleep: bool = Field(
        default=False, description="a server started here gives its GPU memory back while the policy is trained"
    )

    @property
    def gpu_keys(self) -> list[str]:
        """What is set for a GPU, as key=value."""
        fields = type(self).model_fields
        given = [name for name in _GPU_KEYS if getattr(self, name) != fields[name].default]
        return [f"{name}={show(getattr(self, name))}" for name in given]

    @field_validator("servers")
    @classmethod
    def _addresses(cls, value: list[str]) -> list[str]:
        for address in value:
            if not _ADDRESS.fullmatch(address):
                raise ValueError("an address is http://host:port, without user, password or path; mend it")
        if len(set(value)) < len(value):
            raise ValueError("names a server twice; name each once")
        return value

    @model_validator(mode="after")
    def _a_server_has_its_devices(self) -> Self:
        if self.devices and len(self.devices) != self.server_count:
            raise ValueError(
                f"devices={show(self.devices)}: one entry a server is needed, and there are {self.server_count}; "
                "write '0,1' for a server on two"
            )
        return self

    @model_validator(mode="after")
    def _engine_uses_its_keys(self) -> Self:
        keys = ("servers", "server_count", "token_env", *_STARTED, *_ASKED, *self.external_keys)
        idle, why = self._idle_keys(keys)
        fields = type(self).model_fields
        given = [f"{name}={show(getattr(self, name))}" for name in idle if getattr(self, name) != fields[name].default]
        if given:
            raise ValueError(f"{', '.join(given)}: no effect with {why}")
        return self

    def _idle_keys(self, keys: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
        """Keys that this engine never reads, and why with what to do."""
        if self.engine == "native":
            return keys, "engine=native, which samples in this process; take out, or use another engine"
        if self.engine == "vllm-server" and self.servers:
            return ("server_count", *_STARTED), "servers, which are started elsewhere; take out one or the other"
        if self.engine == "vllm-server":
            return ("token_env",), "servers started here, which get a token of their own; take out, or give servers"
        mend = "take out, or use engine=vllm-server"
        return ("servers", "server_count", "token_env"), f"engine={self.engine}, which starts one server; {mend}"


def show(value: object) -> str:
    """A value as it stands in YAML, on one line."""
    return value if isinstance(value, str) else json.dumps(value)
