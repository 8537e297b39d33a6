"""A rollout engine with a copy of the policy of its own: real sampling, and nothing reaches it but by `sync`."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from stages.core.bank import PolicyBank
from stages.core.rollout.native import NativeEngine
from stages.core.rollout.protocol import Completion, EngineError, Sampling

Prompts = Sequence[Sequence[int]]
Tamper = Callable[[int, list[list[Completion]]], list[list[Completion]]]


class CopyEngine:
    """Samples from the policy as it was handed over last; keeps a diary of (version, prompts, seeds) asked for.

    `tamper` may change what the n-th answer (from 0) says, or raise. `drift` is added to every weight handed over.
    """

    def __init__(self, bank: PolicyBank, *, tamper: Tamper | None = None, drift: float = 0.0) -> None:
        self.bank, self.tamper, self.drift = bank, tamper, drift
        trunk = copy.deepcopy(bank.policy.trunk)
        self.copied = replace(bank.policy, trunk=trunk)
        self.native = NativeEngine(trunk, bank.policy.adapter)
        self.synced: list[int] = []
        self.diary: list[tuple[int, Prompts, Sequence[Sequence[int]]]] = []
        self.closed = False
        self.error: Exception | None = None  # that ended the run, for whoever looks

    @torch.no_grad()
    def sync(self, version: int) -> None:
        """Copies the weights."""
        for mine, theirs in zip(self.copied.parameters(), self.bank.policy.parameters(), strict=True):
            mine.copy_(theirs + self.drift)
        self.native.sync(version)
        self.synced.append(version)

    def generate(self, prompts: Prompts, sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[list[Completion]]:
        """Samples, and notes what was asked."""
        if self.closed:
            raise EngineError("copy engine: closed")
        self.diary.append((self.native.version, prompts, seeds))
        answer = self.native.generate(prompts, sampling, seeds)
        return answer if self.tamper is None else self.tamper(len(self.diary) - 1, answer)

    def close(self) -> None:
        """Answers nothing any more."""
        self.closed = True
