"""One OpenAI-compatible /chat/completions over HTTP: a call has one deadline, and every way to fail has a name."""

import asyncio
import email.utils
import ipaddress
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2

from data.errors import UserError
from data.rows import Message
from stages.core.judge.config import Endpoint, missing_key

MOST_BYTES = 4 << 20  # of an answer's body
_AGAIN = {408, 409, 425, 429}  # and every 5xx: the same call may work later
_NOT_SERVED = {401, 402, 403, 404, 405}  # and every 3xx: no call will work before somebody mends something


@dataclass(frozen=True)
class Usage:
    """Tokens that one call took, as the server told, else the most that it can have taken."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Reply:
    """What a model answered."""

    text: str
    finish: str  # stop | length | content_filter | …
    refused: bool
    usage: Usage | None


class CallFailed(Exception):
    """A call without an answer. `billed` is whether the server may have worked for it; `wait` what it told to wait."""

    def __init__(self, cause: str, *, again: bool = True, billed: bool = False, wait: float | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.again = again
        self.billed = billed
        self.wait = wait


class ChatClient:
    """Calls to one endpoint; an async context manager. Raises UserError where its key is not in the environment."""

    def __init__(self, endpoint: Endpoint, *, base_url: str | None = None, token: str | None = None) -> None:
        self.endpoint = endpoint
        self.url = (base_url or endpoint.base_url or "").rstrip("/") + "/chat/completions"
        self._token = token or read_key(endpoint)
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=None,  # the deadline is of the whole call
            limits=httpx2.Limits(max_connections=endpoint.max_concurrency),
            trust_env=not is_loopback(self.url),  # no proxy stands before this machine
        )

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._http.__aexit__(*error)

    async def complete(self, messages: Sequence[Message], **options: Any) -> Reply:
        """One answer. Raises CallFailed, and UserError where no call will be served."""
        body = {"model": self.endpoint.model or "toy", "messages": list(messages), **options}
        try:
            async with asyncio.timeout(self.endpoint.timeout_s):
                status, headers, content = await self._post(body)
        except TimeoutError:
            raise CallFailed(f"no answer within {self.endpoint.timeout_s:g} s", billed=True) from None
        except httpx2.ConnectError as error:
            raise CallFailed(f"cannot connect: {_one_line(str(error)) or 'refused'}") from error
        except httpx2.TransportError as error:
            raise CallFailed(f"connection lost ({type(error).__name__})", billed=True) from error
        if status != 200:
            self._raise_for(status, headers, content)
        return read_reply(content)

    async def _post(self, body: Mapping[str, Any]) -> tuple[int, httpx2.Headers, bytes]:
        async with self._http.stream("POST", self.url, json=body) as response:
            parts: list[bytes] = []
            async for part in response.aiter_bytes():
                parts.append(part)
                if sum(map(len, parts)) > MOST_BYTES:
                    raise CallFailed(f"an answer of more than {MOST_BYTES} bytes", billed=True)
            return response.status_code, response.headers, b"".join(parts)

    def _raise_for(self, status: int, headers: httpx2.Headers, content: bytes) -> None:
        reason = self._reason(content)
        if status in _NOT_SERVED or 300 <= status < 400:
            raise UserError(f"judge at {self.url}: status {status}, {reason}; check base_url, model and api_key_env")
        again = status in _AGAIN or status >= 500
        raise CallFailed(f"status {status}: {reason}", again=again, wait=retry_after(headers.get("retry-after")))

    def _reason(self, content: bytes) -> str:
        """What the server says is wrong, on one line, without the key."""
        try:
            error = json.loads(content).get("error")
            message = error.get("message") if isinstance(error, dict) else error
        except (ValueError, AttributeError):
            message = None
        text = _one_line(str(message or content[:200].decode(errors="replace")))[:200]
        return text.replace(self._token, "***") if self._token else text


def read_key(endpoint: Endpoint) -> str | None:
    """The key in the environment variable that the config names. Raises UserError where it is not set."""
    if problem := missing_key(endpoint.api_key_env):
        raise UserError(problem)
    return os.environ[endpoint.api_key_env] if endpoint.api_key_env else None


def read_reply(content: bytes) -> Reply:
    """The answer in a body. Raises CallFailed where it is not one."""
    try:
        answer = json.loads(content)
        choice = answer["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
        finish = str(choice.get("finish_reason") or "stop")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise CallFailed("a body that is no chat completion", billed=True) from error
    if text is not None and not isinstance(text, str):
        raise CallFailed("a message that is no text", billed=True)
    return Reply(text or "", finish, bool(refusal) or finish == "content_filter", _usage(answer))


def _usage(answer: Mapping[str, Any]) -> Usage | None:
    told = answer.get("usage")
    if not isinstance(told, dict):
        return None
    prompt, completion = told.get("prompt_tokens"), told.get("completion_tokens")
    if not (isinstance(prompt, int) and isinstance(completion, int)) or min(prompt, completion) < 0:
        return None
    return Usage(prompt, completion)


def retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, in seconds or as a date; None where there is none that can be read."""
    if value is None:
        return None
    try:
        return max(0.0, float(value)) if float(value) < float("inf") else None
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _one_line(text: str) -> str:
    return " ".join(text.split())
