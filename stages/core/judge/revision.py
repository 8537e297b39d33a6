"""Critique and revision of a response by a principle: the words, and one round of it.

Bai et al. 2022, "Constitutional AI" (arXiv 2212.08073), section 3.1: the model names what is wrong with its answer in
the light of a principle, then rewrites it; the next round starts from what came out.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from data.rows import Message, Text
from stages.core.judge.ledger import content_key
from stages.core.judge.question import Request
from stages.core.judge.verdict import Unusable

_CRITIQUE = (
    "Name every way in which your last answer falls short of this principle:\n{principle}\n"
    "Be specific and brief. If it falls short in nothing, say so."
)
_REVISION = (
    "Rewrite your answer to my earlier message so that it keeps to this principle:\n{principle}\n"
    "Leave in what is right. Mention neither the principle nor that you rewrote anything. "
    'Answer with a JSON object {{"revision": "the whole rewritten answer"}} and nothing else.'
)
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"revision": {"type": "string"}},
    "required": ["revision"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Revise:
    """A conversation that ends in a request to rewrite; the answer is JSON, so nothing around it gets in."""

    request: Request
    constrained: bool = True

    @cached_property
    def key(self) -> str:
        """Hex sha256 of the request and of the form that it asks for."""
        return content_key(self.content())

    def messages(self) -> list[Message]:
        """The conversation."""
        return self.request.messages()

    def options(self) -> dict[str, Any]:
        """Temperature, length and seed, and the schema where the endpoint takes one."""
        if not self.constrained:
            return self.request.options()
        form = {"type": "json_schema", "json_schema": {"name": "revision", "strict": True, "schema": _SCHEMA}}
        return self.request.options() | {"response_format": form}

    def read(self, text: str) -> str:
        """The rewritten answer. Raises Unusable where there is none, or only a part of it."""
        begin, end = text.find("{"), text.rfind("}")
        try:
            found: Any = json.loads(text[begin : end + 1]) if begin >= 0 else None
        except (ValueError, RecursionError):
            found = None
        revision = cast(dict[str, Any], found).get("revision") if isinstance(found, dict) else None
        if not isinstance(revision, str):
            raise Unusable("truncated answer" if begin >= 0 and end < begin else "no revision in the answer")
        if not revision.strip():
            raise Unusable("empty revision")
        return revision.strip()

    def content(self) -> dict[str, Any]:
        """The request as the ledger keeps it."""
        return {"asked": "revision", "constrained": self.constrained, **self.request.content()}


def conversation(prompt: Text, response: str) -> list[Message]:
    """The prompt's turns and the response as the assistant's last one."""
    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
    return [*turns, Message(role="assistant", content=response)]


def ask_critique(principle: str) -> Message:
    """The turn that asks what is wrong with the last answer."""
    return Message(role="user", content=_CRITIQUE.format(principle=principle))


def ask_revision(principle: str) -> Message:
    """The turn that asks for the answer anew."""
    return Message(role="user", content=_REVISION.format(principle=principle))


def with_critique(turns: Sequence[Message], principle: str, critique: str) -> list[Message]:
    """The conversation with the critique that was given."""
    return [*turns, ask_critique(principle), Message(role="assistant", content=critique)]
