"""What a model is asked, as one value; its content key stands for everything that can change the answer."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from data.rows import Message, Text
from stages.core.judge.config import JudgeConfig, Mode
from stages.core.judge.ledger import content_key
from stages.core.judge.prompts import Wording, render, schema
from stages.core.judge.verdict import Unusable, read_verdict


@dataclass(frozen=True)
class Question:
    """One question to one judge. `responses` stand in the order shown, A first; pointwise has one."""

    mode: Mode
    model: str
    prompt: Text
    responses: tuple[str, ...]
    rubric: str
    principles: tuple[str, ...] = ()
    reasoning: bool = False
    constrained: bool = True
    by_label: bool = False
    temperature: float = 0.0
    max_tokens: int = 256

    @cached_property
    def key(self) -> str:
        """Hex sha256 of the model, how it samples, and every word that it is sent, but for the marker."""
        sent = render(self._wording, marker="")
        return content_key({"model": self.model, "options": self.options(), "messages": sent})

    @property
    def marker(self) -> str:
        """The delimiter of this question: no text in it can hold it, because it is a hash of that text."""
        return hashlib.sha256(f"marker {self.key}".encode()).hexdigest()[:16]

    def messages(self) -> list[Message]:
        """What the judge is sent; the same for the same question, in every run."""
        return render(self._wording, marker=self.marker)

    def options(self) -> dict[str, Any]:
        """Temperature, length, and the schema of the answer where the endpoint takes one."""
        options: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.constrained:
            answer = schema(self.mode, reasoning=self.reasoning)
            named = {"name": "verdict", "strict": True, "schema": answer}
            options["response_format"] = {"type": "json_schema", "json_schema": named}
        return options

    def read(self, text: str) -> str | float:
        """The verdict in an answer. Raises Unusable."""
        return read_verdict(text, self.mode)

    def content(self) -> dict[str, Any]:
        """The question as the ledger keeps it."""
        return asdict(self)

    @property
    def _wording(self) -> Wording:
        return Wording(
            self.mode, self.prompt, self.responses, self.rubric, self.principles, self.reasoning, self.by_label
        )


@dataclass(frozen=True)
class Request:
    """Words asked of a model: a response to a conversation, drawn as sample number `sample`."""

    model: str
    conversation: tuple[Message, ...]
    temperature: float
    max_tokens: int
    sample: int = 0

    @cached_property
    def key(self) -> str:
        """Hex sha256 of the model, the conversation, how it is sampled, and which sample it is."""
        return content_key(self.content())

    def messages(self) -> list[Message]:
        """The conversation."""
        return list(self.conversation)

    def options(self) -> dict[str, Any]:
        """Temperature and length, and a seed for servers that know one."""
        seed = int(self.key[:8], 16) >> 1
        return {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": seed}

    def read(self, text: str) -> str:
        """The answer itself. Raises Unusable where it is blank."""
        if not text.strip():
            raise Unusable("empty answer")
        return text

    def content(self) -> dict[str, Any]:
        """The request as the ledger keeps it."""
        return asdict(self)


def ask(
    judge: JudgeConfig, model: str, prompt: Text, responses: Sequence[str], principles: Sequence[str] = ()
) -> Question:
    """The question that this judge is asked about the responses in this order; `model` is what `identity` says."""
    return Question(
        mode=judge.mode,
        model=model,
        prompt=prompt,
        responses=tuple(responses),
        rubric=judge.rubric,
        principles=tuple(principles),
        reasoning=judge.reasoning,
        constrained=judge.constrained,
        by_label=judge.local is not None,
        temperature=judge.temperature,
        max_tokens=judge.max_tokens,
    )


def draw_principles(judge: JudgeConfig, *, seed: int, item: str) -> tuple[str, ...]:
    """The principles for one item: all of them, or as many as `principles_per_pair`, by seed and item alone."""
    if judge.principles_per_pair is None:
        return tuple(judge.constitution)
    return tuple(random.Random(f"principles {seed} {item}").sample(judge.constitution, judge.principles_per_pair))
