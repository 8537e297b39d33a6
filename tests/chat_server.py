"""An OpenAI-compatible chat server that answers as a test tells it to, and remembers what it was asked."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

from tests.stub_server import serving


@dataclass(frozen=True)
class Reply:
    """An answer, or with another status a failure."""

    text: str
    status: int = 200
    usage: tuple[int, int] | None = None  # tokens of prompt and answer


class ChatServer:
    """`answer` is given the body of each request."""

    def __init__(self, answer: Callable[[dict[str, Any]], Reply]) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.base_url = self._stack.enter_context(serving(self._answer)) + "/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        assert path == "/v1/chat/completions"
        self.requests.append(body)
        reply = self.answer(body)
        if reply.status != 200:
            return reply.status, {"error": {"message": reply.text}}
        answer: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": reply.text}}]}
        if reply.usage is not None:
            answer["usage"] = dict(zip(("prompt_tokens", "completion_tokens"), reply.usage, strict=True))
        return 200, answer
