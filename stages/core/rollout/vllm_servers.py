"""The vLLM servers of one engine: ours, started as the policy needs, or the user's; and what each must prove first."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import UserError
from stages.core.rollout.client import WHOLE_DISTRIBUTION, Client, ServerError
from stages.core.rollout.server import SERIES, OwnServer, Vllm, find_vllm

if TYPE_CHECKING:
    from stages.core.rollout.policy_files import PolicyFiles

BASE = "base"  # the name that a server of ours gives its base model
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the sizes that vLLM has room for
STEP_TOKENS = 4096  # most prompt tokens that a step takes, unless one prompt is longer
GIB = 2**30


@dataclass(frozen=True)
class VllmOptions:
    """How servers are started, or which are used, and how long they may take."""

    max_length: int  # prompt + response, tokens
    batch_size: int = 256  # most responses that a server decodes at a time
    timeout_s: float = 600.0  # of each call; a response is one call
    start_timeout_s: float = 600.0
    server_count: int = 1  # servers that we start
    urls: tuple[str, ...] = ()  # servers that run already, in place of ours
    token: str | None = None  # theirs
    python: str | None = None  # an interpreter with vLLM; default: `find_vllm`
    memory_share: float = 0.4  # of a GPU, for weights and KV cache of a server
    memory_gb: float = 1.0  # KV cache of a server on a CPU
    devices: tuple[str, ...] = ()  # CUDA_VISIBLE_DEVICES of each server that we start; none: as the trainer's
    sleep: bool = False  # the GPU's memory is given back between rollouts
    compile: bool | None = None  # default: on a GPU


@dataclass
class Server:
    """One server: how to call it, and the process where it is ours."""

    name: str
    client: Client
    own: OwnServer | None = None
    model: str = BASE  # the name of its weights without an adapter


def open_servers(policy: "PolicyFiles", options: VllmOptions, folder: Path) -> list[Server]:
    """The servers that the options ask for, ours starting and not yet waited for, with their logs in `folder`.

    Raises UserError where vLLM is not installed, or cannot have this policy.
    """
    if options.urls:
        if policy.form == "full":
            raise UserError(
                "rollout engine vllm-server: whole weights are only replaced on servers that ppo starts; "
                "leave out ppo.rollout.servers, or use tuning.method=lora"
            )
        return [
            Server(url, Client(url.rstrip("/"), token=options.token, timeout_s=options.timeout_s))
            for url in options.urls
        ]
    vllm = find_vllm(options.python)
    if vllm is None:
        raise UserError(
            "rollout engine vllm: not installed; run `make vllm`, or use ppo.rollout.engine=native, which needs nothing"
        )
    arguments = own_arguments(policy, options, vllm)
    servers: list[Server] = []
    try:
        for place in range(options.server_count):
            own = OwnServer(f"vllm-{place}", folder / f"vllm-{place}.log", timeout_s=options.timeout_s)
            servers.append(Server(own.name, own.client, own))
            own.start(vllm, arguments, own_variables(policy, options, vllm, place))
    except BaseException:
        stop_servers(servers)
        raise
    return servers


def stop_servers(servers: Sequence[Server]) -> None:
    """Stops those that are ours, all at once."""
    own = [server.own for server in servers if server.own is not None]
    if own:
        with ThreadPoolExecutor(len(own)) as pool:
            list(pool.map(OwnServer.stop, own))


def own_arguments(policy: "PolicyFiles", options: VllmOptions, vllm: Vllm) -> list[str]:
    """The command line of a server of ours, after the address."""
    base = str(Path(policy.base).resolve()) if Path(policy.base).is_dir() else policy.base
    arguments = [
        *("--model", base, "--served-model-name", BASE, "--dtype", policy.dtype),
        *("--max-model-len", str(options.max_length), "--max-num-seqs", str(options.batch_size)),
        # After the temperature: those of what was sampled from.
        *("--logprobs-mode", "processed_logprobs"),
        # A prompt prefilled in parts winds its seed back by a guess; a CPU's generator cannot, which ends the server.
        *("--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(STEP_TOKENS, options.max_length))),
        *("--generation-config", "vllm", "--skip-tokenizer-init", "--disable-uvicorn-access-log"),
    ]
    if policy.form == "adapter":
        arguments += ["--enable-lora", "--max-lora-rank", str(room_for(policy.rank))]
    if vllm.is_cpu:
        arguments += ["--kv-cache-memory-bytes", str(int(options.memory_gb * GIB))]
    else:
        arguments += ["--gpu-memory-utilization", str(options.memory_share)]
        arguments += ["--enable-sleep-mode"] if options.sleep else []
    return arguments if _compiles(options, vllm) else [*arguments, "--enforce-eager"]


def whole_prompts(max_length: int) -> tuple[str, ...]:
    """Arguments for prompts in one piece.

    One prefilled in parts winds its seed back by a guess; a CPU's generator cannot: it ends the server.
    """
    return "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(STEP_TOKENS, max_length))


def own_variables(policy: "PolicyFiles", options: VllmOptions, vllm: Vllm, place: int) -> dict[str, str]:
    """Environment variables of the server number `place`; what it serves beyond completions is decided here."""
    variables: dict[str, str] = {}
    if policy.form == "adapter":
        variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if policy.form == "full" or options.sleep:
        variables["VLLM_SERVER_DEV_MODE"] = "1"
    if options.devices:
        variables["CUDA_VISIBLE_DEVICES"] = options.devices[place % len(options.devices)]
    if vllm.is_cpu:
        # Bound threads of two servers, or of a server and the trainer, would share the same cores.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if not _compiles(options, vllm):
            variables["TORCHDYNAMO_DISABLE"] = "1"  # else the first request compiles for 20 s
    return variables


def _compiles(options: VllmOptions, vllm: Vllm) -> bool:
    return not vllm.is_cpu if options.compile is None else options.compile


def room_for(rank: int) -> int:
    """The size to start a server with for adapters of this rank. Raises UserError for one that vLLM has no room for."""
    room = next((size for size in ADAPTER_RANKS if size >= rank), None)
    if room is None:
        raise UserError(f"rollout engine vllm: LoRA rank {rank}; vllm serves at most {ADAPTER_RANKS[-1]}")
    return room


def check_server(server: Server, options: VllmOptions, try_policy: Callable[[Server], None]) -> None:
    """Raises UserError, with its own words, where a server cannot do what a run will ask of it."""
    try:
        version = server.client.get("/version").get("version")
        if not str(version).startswith(f"{SERIES}."):
            raise ServerError(f"has vllm {version}; {SERIES}.* is needed")
        _check_model(server, options.max_length)
        if server.own is None:
            _check_logprobs(server)
        try_policy(server)
    except ServerError as error:
        raise UserError(f"rollout engine vllm: {server.name}: {error}; {_mend(server)}") from error


def _mend(server: Server) -> str:
    own = server.own
    if own is None:
        return (
            "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank RANK "
            "--no-enable-chunked-prefill --logprobs-mode processed_logprobs, on a machine that sees the run folder"
        )
    return f"its log says: {own.first_error()}; see {own.log}, or use ppo.rollout.engine=native"


def _check_model(server: Server, max_length: int) -> None:
    """Notes what the server calls its base model, and that it takes sequences as long as ours."""
    models: list[dict[str, Any]] = server.client.get("/v1/models").get("data") or []
    base = next((model for model in models if model.get("parent") is None), None)
    if base is None:
        raise ServerError("serves no model")
    server.model = str(base.get("id"))
    found = base.get("max_model_len")
    if not isinstance(found, int) or found < max_length:
        raise ServerError(f"takes sequences of {found} tokens, and max_length is {max_length}; give it --max-model-len")


def _check_logprobs(server: Server) -> None:
    """Raises ServerError where log-probabilities are those before the temperature: PPO's ratios would be wrong."""
    highest = [_highest_logprob(server, temperature) for temperature in (1.0, 2.0)]
    if highest[0] == highest[1]:
        raise ServerError("its log-probabilities leave the temperature out")


def _highest_logprob(server: Server, temperature: float) -> float:
    body: dict[str, Any] = {"model": server.model, "prompt": [1], "max_tokens": 1, "temperature": temperature}
    body |= {"logprobs": 1, "return_tokens_as_token_ids": True}
    reply = server.client.post("/v1/completions", body | WHOLE_DISTRIBUTION)
    try:
        return max(reply["choices"][0]["logprobs"]["top_logprobs"][0].values())
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ServerError("an answer without log-probabilities") from error
