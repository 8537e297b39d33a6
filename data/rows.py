"""The three kinds of rows that stages train on. Field names are those of TRL and the hub."""

from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypedDict


class Message(TypedDict):
    """One turn of a conversation; the role is system, user, assistant or tool."""

    role: str
    content: str


Text: TypeAlias = str | list[Message]
"""Plain text, or the turns of a conversation."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response to imitate.

    In a multi-turn row `response` holds every turn from the first assistant turn on; the loss falls on its
    assistant turns only.
    """

    prompt: Text
    response: Text
    origin: str = ""  # file:line


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt, `chosen` the better with probability `p_chosen`.

    `margin` is the least score difference that the loss asks for (Llama 2, arXiv 2307.09288, eq. 2);
    `weight` scales the row's loss.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float = 0.0
    weight: float = 1.0
    p_chosen: float = 1.0
    origin: str = ""


@dataclass(frozen=True)
class Prompt:
    """A prompt to respond to; `extra` holds the row's other columns, for reward functions."""

    prompt: Text
    extra: dict[str, Any] = field(default_factory=dict[str, Any])
    origin: str = ""


Row: TypeAlias = Demonstration | Preference | Prompt


class RowError(ValueError):
    """Why one row cannot be used; becomes a Refusal with the row's origin."""


@dataclass(frozen=True)
class Refusal:
    """A row that was read and not used, as `quarantine.jsonl` holds it; `row` is its text, shortened."""

    origin: str
    reason: str
    row: str
