"""`launch serve`: a policy behind vLLM's OpenAI-compatible server, with a token, to this machine alone unless told."""

import os
import secrets
import socket
import sys
from dataclasses import dataclass
from typing import NoReturn

from data.chat import TEMPLATES, load_tokenizer
from data.errors import UserError
from launch.policy import FoundPolicy, find_policy
from stages.core.models import resolve_model
from stages.core.rollout.choice import choose_engine
from stages.core.rollout.config import EngineConfig
from stages.core.rollout.policy_files import served_form
from stages.core.rollout.server import ENTRY, NOT_PASSED_ON, Vllm, find_vllm
from stages.core.rollout.vllm_servers import BASE, GIB, room_for, whole_prompts
from stages.core.trunk import read_adapter

NAME = "policy"  # the model's name for clients
# Answers by a JSON schema have no whitespace between their parts: small models lose themselves in it.
COMPACT_JSON = ("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}')


@dataclass(frozen=True)
class ServeOptions:
    """How a policy is served."""

    policy: str
    host: str = "127.0.0.1"
    port: int = 8000
    token_env: str | None = None


def serve(options: ServeOptions) -> NoReturn:
    """Becomes the server: signals and the exit status are its own. Raises UserError where it cannot be started."""
    found = find_policy(options.policy)
    _check_address(options)
    choice = choose_engine(EngineConfig(engine="vllm"), "serve")
    vllm = find_vllm()
    if choice.problems or vllm is None:
        raise UserError("launch serve: vLLM is not installed; run `make vllm`", *choice.problems[1:])
    token = _token(options)
    environment = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    environment |= {"VLLM_API_KEY": token, "VLLM_NO_USAGE_STATS": "1"}
    if vllm.is_cpu:
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"} | environment
    command = [vllm.python, "-P", "-m", ENTRY, *arguments(found, options, vllm)]
    print(f"http://{options.host}:{options.port}/v1, model {NAME}", file=sys.stderr, flush=True)
    os.execve(vllm.python, command, environment)


def arguments(found: FoundPolicy, options: ServeOptions, vllm: Vllm) -> list[str]:
    """The server's command line: the base with the policy's adapter on it, or the whole model."""
    model = resolve_model(found.source)
    common = [
        *("--host", options.host, "--port", str(options.port)),
        *("--dtype", found.shared.dtype, "--max-model-len", str(found.shared.max_length)),
        # Tokenizer and chat template as they were in training; answers as they are sampled, with nothing cut.
        *("--tokenizer", model.folder, *_template(model.folder), *COMPACT_JSON, "--generation-config", "vllm"),
        *(cpu_arguments(found.shared.max_length) if vllm.is_cpu else []),
    ]
    if model.adapter is None:
        return ["--model", model.base, "--served-model-name", NAME, *common]
    config, _, _ = read_adapter(model.adapter)
    if served_form(config, "float32") != "adapter":
        raise UserError(f"{options.policy}: vLLM cannot serve this adapter; merge it into its base first")
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    return [
        *("--model", model.base, "--served-model-name", BASE, *common),
        *("--enable-lora", "--max-lora-rank", str(room_for(rank)), "--lora-modules", f"{NAME}={model.adapter}"),
    ]


def _template(folder: str) -> list[str]:
    """The built-in chat template, for a tokenizer that has none: vLLM would refuse to chat."""
    simple = TEMPLATES["simple"]
    return ["--chat-template", simple] if load_tokenizer(folder).chat_template == simple else []


def cpu_arguments(max_length: int) -> list[str]:
    """What a server without a GPU needs: a bounded cache, no compiler, and prompts in one piece."""
    return ["--enforce-eager", "--kv-cache-memory-bytes", str(GIB), *whole_prompts(max_length)]


def _check_address(options: ServeOptions) -> None:
    """Raises UserError where the server could not listen: it would find out half a minute later, with a traceback."""
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((options.host, options.port), family=family).close()
    except OSError as error:
        raise UserError(
            f"--host {options.host} --port {options.port}: cannot be listened on ({error.strerror or error}); "
            "give another"
        ) from error


def _token(options: ServeOptions) -> str:
    """The token that clients must send: the environment variable's, else one that is shown once."""
    if options.token_env is not None:
        token = os.environ.get(options.token_env)
        if not token:
            raise UserError(f"--token-env {options.token_env}: this environment variable is not set; set it")
        return token
    token = secrets.token_urlsafe(32)
    print(f"token: {token}", file=sys.stderr, flush=True)
    return token
