"""`launch chat`: a conversation with a policy in the terminal, sampled by the engines that training samples with."""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data.chat import ChatEncoder
from data.errors import UserError
from data.rows import Message
from launch.answer import Answer
from launch.policy import find_policy
from stages.core.answering import files_of, load_view
from stages.core.bank import BankBuilder
from stages.core.models import end_tokens, open_encoder
from stages.core.rollout.choice import choose_engine
from stages.core.rollout.config import EngineConfig
from stages.core.rollout.native import NativeEngine
from stages.core.rollout.protocol import RolloutEngine, Sampling, rollout_seed
from stages.core.rollout.start import start_engine

MOST_TOKENS = 256  # of an answer where nobody says


@dataclass(frozen=True)
class ChatOptions:
    """How a conversation is held."""

    policy: str
    engine: Literal["auto", "native", "vllm"] = "auto"
    temperature: float = 1.0
    max_tokens: int | None = None  # of one answer; None: see longest_answer
    seed: int = 0
    plain: bool = False


@dataclass
class Conversation:
    """What has been said; with `plain`, each line stands by itself and no chat template is around it."""

    encoder: ChatEncoder
    room: int  # tokens that a prompt may have
    plain: bool
    messages: list[Message] = field(default_factory=list[Message])

    def prompt(self, line: str) -> list[int]:
        """The tokens that the answer to `line` follows; the oldest turns go where they no longer fit.

        Raises UserError where the line alone is too long.
        """
        if self.plain:
            tokens = self.encoder.prompt_tokens(line)
        else:
            self.messages.append({"role": "user", "content": line})
            tokens = self.encoder.prompt_tokens(self.messages)
            while len(tokens) > self.room and len(self.messages) > 1:
                del self.messages[:2]
                tokens = self.encoder.prompt_tokens(self.messages)
        if len(tokens) > self.room:
            self.messages.clear()
            raise UserError(f"that is {len(tokens)} tokens, and there is room for {self.room}; say it in fewer words")
        return tokens

    def answered(self, tokens: list[int]) -> str:
        """The answer's text, which is part of the conversation from here on."""
        text = self.encoder.decode_response(tokens).strip()
        self.messages.append({"role": "assistant", "content": text})
        return text


def chat(options: ChatOptions) -> Answer:
    """Talks until the input ends. Raises UserError, EngineError."""
    found = find_policy(options.policy)
    shared = found.shared
    longest = longest_answer(options.max_tokens, shared.max_length)
    room = shared.max_length - longest
    encoder = open_encoder(found.source, shared)
    view = load_view(found.source, "policy", BankBuilder(shared))
    config = EngineConfig(engine=options.engine)
    with tempfile.TemporaryDirectory(prefix="rlhf-chat-") as folder:
        engine = start_engine(
            choose_engine(config, "--engine"),
            config,
            NativeEngine(view.trunk, view.adapter),
            lambda: files_of(found.source, view),
            max_length=shared.max_length,
            responses=1,
            folder=Path(folder),
        )
        with contextlib.closing(engine):
            engine.sync(0)
            ends = end_tokens(encoder, view.trunk.model)
            sampling = Sampling(longest, options.temperature, ends)
            turns = _talk(engine, sampling, Conversation(encoder, room, options.plain), options.seed)
    return Answer({"status": "done", "turns": turns}, lambda: None)


def longest_answer(asked: int | None, max_length: int) -> int:
    """Most tokens of an answer, so that some of `max_length` are left for the question. Raises UserError."""
    if asked is None:
        return min(MOST_TOKENS, max_length // 2)
    if asked >= max_length:
        raise UserError(f"--max-tokens {asked}: leaves no room for a question in max_length={max_length}; give fewer")
    return asked


def _talk(engine: RolloutEngine, sampling: Sampling, conversation: Conversation, seed: int) -> int:
    turns = 0
    for line in _lines():
        try:
            prompt = conversation.prompt(line)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        ((completion,),) = engine.generate([prompt], sampling, [[rollout_seed(seed, "chat", turns, 0, 0)]])
        print(conversation.answered(list(completion.tokens)), flush=True)
        turns += 1
    return turns


def _lines() -> Iterator[str]:
    """What is typed, line by line, until the input ends (Ctrl-D)."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
