"""Which engine a config comes to on this machine, and what it lacks. Imports torch only to look for a GPU."""

import os
from dataclasses import dataclass

from data.errors import UserError
from stages.core.rollout.config import EngineConfig, EngineName
from stages.core.rollout.server import Vllm, find_vllm


@dataclass(frozen=True)
class Choice:
    """The engine that will run, why, and what stands in its way, one line each."""

    engine: EngineName
    why: str
    problems: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The engine and why, in one line."""
        return f"{self.engine}: {self.why}"


def choose_engine(config: EngineConfig, section: str, *, staleness: int = 0) -> Choice:
    """What `section` (as in `ppo.rollout`) comes to here; nothing is started and no server is asked."""
    if config.engine == "native":
        return Choice("native", "in this process")
    if config.engine == "vllm-server" and config.servers:
        return Choice("vllm-server", f"at {', '.join(config.servers)}", _token_problems(config, section))
    name = "vllm-server" if config.engine == "vllm-server" else "vllm"
    try:
        vllm = find_vllm(config.vllm_python)
    except UserError as error:
        return Choice(name, "not usable", tuple(f"{section}: {problem}" for problem in error.problems))
    gpu = has_gpu()
    if config.engine == "auto" and not (vllm and gpu):
        missing = [what for what, found in (("vLLM", vllm), ("GPU", gpu)) if not found]
        return _native(section, f"in this process, no {' and no '.join(missing)} here", staleness)
    if vllm is None:
        mend = f"run `make vllm`, set {section}.vllm_python, or use engine=native"
        return Choice(name, "not installed", (f"{section}.engine={config.engine}: vLLM is not installed; {mend}",))
    return Choice(name, _started(config, vllm), () if gpu else _idle(config, section))


def _native(section: str, why: str, staleness: int) -> Choice:
    """What `auto` comes to where it cannot be vLLM; the policy itself cannot sample while it is trained."""
    if not staleness:
        return Choice("native", why)
    problem = (
        f"{section}.staleness={staleness}: engine=auto is native here ({why}), which cannot sample while the update "
        "runs; use 0, or engine=vllm"
    )
    return Choice("native", why, (problem,))


def _started(config: EngineConfig, vllm: Vllm) -> str:
    servers = f"{config.server_count} servers" if config.server_count > 1 else "a server"
    return f"{servers} of vllm {vllm.version} ({vllm.python})"


def _idle(config: EngineConfig, section: str) -> tuple[str, ...]:
    return tuple(f"{section}.{each}: no effect, there is no GPU here; take it out" for each in config.gpu_keys)


def _token_problems(config: EngineConfig, section: str) -> tuple[str, ...]:
    if config.token_env is None or os.environ.get(config.token_env):
        return ()
    return (
        f"{section}.token_env={config.token_env}: this environment variable is not set; set it to the servers' token",
    )


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()
