"""One vLLM server as seen over HTTP: completions as token ids, adapters and weights by version. Imports no torch.

Every call has a deadline of its own; whatever goes wrong is a `ServerError` that says so in one line.
"""

import contextlib
import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stages.core.rollout.protocol import Completion, Sampling

CHUNK_BYTES = 1 << 16


class ServerError(Exception):
    """A call that failed: the server is gone, hangs, refuses, or answers what cannot be used."""


@dataclass(frozen=True)
class Request:
    """One response to draw."""

    prompt: tuple[int, ...]
    seed: int


class Client:
    """Calls to one server at `address`: the path of a Unix socket, or http(s)://host:port."""

    def __init__(self, address: str, *, token: str | None, timeout_s: float) -> None:
        self.address = address
        self.token = token
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()  # of calls under way
        self._hung_up = False

    def hang_up(self) -> None:
        """Ends the calls under way in other threads, with a ServerError each; none is made from here on."""
        with self._lock:
            self._hung_up = True
            for sock in self._open:
                with contextlib.suppress(OSError):  # the server was first
                    sock.shutdown(socket.SHUT_RDWR)

    def complete(self, model: str, request: Request, sampling: Sampling, version: int) -> Completion:
        """One response by the weights that the server knows as `model`, the policy of `version`.

        Raises ServerError where another model answered, or where the answer is not exactly what was asked for.
        """
        body = {
            "model": model,
            "prompt": request.prompt,
            "seed": request.seed,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "stop_token_ids": sampling.end_token_ids,
            "ignore_eos": True,  # the end tokens above are all there are, for every engine
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **WHOLE_DISTRIBUTION,
        }
        reply = self.post("/v1/completions", body)
        if reply.get("model") != model:
            raise ServerError(f"asked for {model}, and {reply.get('model')!r} answered")
        return read_completion(reply, request, sampling, version)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Makes the adapter in `folder` answer to `name`."""
        self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload_adapter(self, name: str) -> None:
        """Forgets the adapter `name`."""
        self.post("/v1/unload_lora_adapter", {"lora_name": name})

    def load_weights(self, name: str, folder: Path) -> None:
        """Replaces every weight by those in `folder`, and what was computed with the old ones; notes `name`."""
        self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        if self.post("/reset_prefix_cache").get("success") is not True:
            raise ServerError("its prefix cache could not be cleared after new weights")
        self.post("/update_weight_version", {"new_version": name})

    def check_weights(self, name: str) -> None:
        """Raises ServerError unless the weights in use are those that were loaded as `name`."""
        found = self.get("/weight_info").get("weight_version")
        if found != name:
            raise ServerError(f"asked for weights {name}, and it has {found!r}")

    def wake(self) -> None:
        """Takes back the GPU's memory."""
        self.post("/wake_up")

    def doze(self) -> None:
        """Gives back the GPU's memory: weights wait in the host's, what was computed with them is forgotten."""
        self.post("/sleep?level=1")

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`; an empty one where the answer has no body."""
        return self.call("GET", path, None)

    def post(self, path: str, body: object = None) -> dict[str, Any]:
        """The JSON object that answers `body`; an empty one where the answer is not JSON."""
        return self.call("POST", path, body)

    def call(self, method: str, path: str, body: object, *, timeout_s: float | None = None) -> dict[str, Any]:
        """One exchange over a connection of its own: a kept one may be closed by the server at any time."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        connection = self._connection(limit)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            with self._connected(connection) as sock:
                text = None if body is None else json.dumps(body)
                connection.request(method, path, text, headers)
                response = connection.getresponse()
                content = _read(sock, response, limit)
        except TimeoutError as error:
            raise ServerError(f"{path}: no answer within {limit:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{path}: {str(error) or type(error).__name__}") from error
        finally:
            connection.close()
        answer = _parse(content)
        if response.status != 200:
            raise ServerError(f"{path}: status {response.status}, {_reason(answer, content)}")
        return answer

    @contextlib.contextmanager
    def _connected(self, connection: http.client.HTTPConnection) -> Generator[socket.socket]:
        """The connection's socket, where `hang_up` finds it."""
        connection.connect()
        sock = connection.sock
        with self._lock:
            if self._hung_up:
                raise ServerError("nobody waits for its answers any more")
            self._open.add(sock)
        try:
            yield sock
        finally:
            with self._lock:
                self._open.discard(sock)

    def _connection(self, limit: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.address)
        if not parts.scheme:
            return UnixConnection(self.address, limit)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname or "", parts.port, timeout=limit)


# Sent with every request: a server's own defaults may cut or bend the distribution.
WHOLE_DISTRIBUTION = {
    "n": 1,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        """Opens the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def _read(sock: socket.socket, response: http.client.HTTPResponse, limit: float) -> bytes:
    """The whole body, within `limit` seconds however slowly it drips."""
    deadline = time.monotonic() + limit
    parts: list[bytes] = []
    while part := response.read1(CHUNK_BYTES):
        parts.append(part)
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)
    return b"".join(parts)


def _parse(content: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(content)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _reason(answer: dict[str, Any], content: bytes) -> str:
    """What the server says is wrong, on one line."""
    error = answer.get("error", answer.get("detail"))
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message or content[:200].decode(errors="replace")).split())


def read_completion(reply: dict[str, Any], request: Request, sampling: Sampling, version: int) -> Completion:
    """The one response in a reply of /v1/completions.

    Raises ServerError for a reply that is short, cut, or about another prompt: it holds its end token, and only at its
    end, or the most tokens; and a log-probability for each.
    """
    try:
        (choice,) = reply["choices"]
        tokens: list[int] = list(choice["token_ids"])
        logprobs: list[float] = list(choice["logprobs"]["token_logprobs"])
        finished, prompt = choice["finish_reason"] == "stop", choice["prompt_token_ids"]
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError(f"an answer without what was asked for ({type(error).__name__}: {error})") from error
    if not finished and choice["finish_reason"] != "length":
        raise ServerError(f"a response that ended by {choice['finish_reason']!r}")
    if prompt != list(request.prompt):
        raise ServerError("an answer to another prompt than was sent")
    if not tokens or len(tokens) != len(logprobs):
        raise ServerError(f"a short answer: {len(tokens)} tokens with {len(logprobs)} log-probabilities")
    if not finished and len(tokens) != sampling.max_new_tokens:
        raise ServerError(f"a short answer: {len(tokens)} of {sampling.max_new_tokens} tokens, and no end token")
    if [place for place, token in enumerate(tokens) if token in sampling.end_token_ids] != (
        [len(tokens) - 1] if finished else []
    ):
        raise ServerError("a response whose end token is not at its end")
    if not all(isinstance(each, float) and math.isfinite(each) and each <= 1e-4 for each in logprobs):
        raise ServerError("log-probabilities that are none")
    return Completion(tuple(tokens), tuple(logprobs), finished, version=version)


def spread(requests: Sequence[int], parts: int) -> list[list[int]]:
    """`requests` dealt out in turn to `parts` hands."""
    return [list(requests[part::parts]) for part in range(parts)]
