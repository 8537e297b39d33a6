"""A judge in this process: its preference is read from the log-probabilities of the labels A and B.

As in RLAIF (Lee et al. 2023, arXiv 2309.00267, section 2.1): the softmax over the two labels' log-probabilities at the
place of the answer is the preference, so one forward pass a question does and nothing is decoded.

Legend: B questions, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data.chat import ChatEncoder
from data.rows import Message
from stages.core.bank import View
from stages.core.judge.asking import Unanswered
from stages.core.judge.ledger import Ledger, Verdict
from stages.core.judge.question import Question
from stages.core.sequences import PackedBatch, split_by_budget

BATCH_TOKENS = 16384
TOO_LONG = "longer than the model reads"


@dataclass(frozen=True)
class LocalJudge:
    """A model that is asked for A or B, under its name in the ledger."""

    view: View
    encoder: ChatEncoder
    source: str
    ledger: Ledger

    async def answer(self, question: Question) -> Verdict | Unanswered:
        """The verdict on a question, which is the probability of A; or why the model cannot read it."""
        self.answer_all([question])
        return self.ledger.standing(question.key, self.source) or Unanswered(TOO_LONG)

    def answer_all(self, questions: Sequence[Question]) -> None:
        """Enters a verdict on each question that has none yet; one that is too long is quarantined."""
        asked: list[tuple[Question, list[int], tuple[int, int]]] = []
        for question in questions:
            if self.ledger.standing(question.key, self.source) is not None:
                continue
            self.ledger.ask(question.key, question.content())
            tokens, labels = self._tokens(question)
            limit = getattr(self.view.trunk.model.config, "max_position_embeddings", None)
            if limit is not None and len(tokens) > limit:
                self.ledger.quarantine(question.key, self.source, f"{TOO_LONG}: {len(tokens)} tokens, it reads {limit}")
                continue
            asked.append((question, tokens, labels))
        for group in split_by_budget([len(tokens) for _, tokens, _ in asked], BATCH_TOKENS):
            members = [asked[place] for place in group]
            preferences = self._preferences([(tokens, labels) for _, tokens, labels in members])
            for (question, tokens, _), preference in zip(members, preferences, strict=True):
                usage = {"prompt_tokens": float(len(tokens))}
                self.ledger.record(question.key, self.source, preference, usage=usage)

    def _tokens(self, question: Question) -> tuple[list[int], tuple[int, int]]:
        """The ids of a question up to where its answer's labels differ, and the two ids there."""
        prompt = _prompt_ids(self.encoder, question.messages())
        words = [self.encoder.response_tokens(_joined(question.messages()), label, finished=False) for label in "AB"]
        common = 0
        while words[0][common] == words[1][common]:
            common += 1
        return [*prompt, *words[0][:common]], (words[0][common], words[1][common])

    @torch.no_grad()
    def _preferences(self, asked: Sequence[tuple[list[int], tuple[int, int]]]) -> list[float]:
        """P(A) / (P(A) + P(B)) at the end of each sequence."""
        trunk = self.view.trunk
        packed = PackedBatch.of([tokens for tokens, _ in asked], trunk.device)
        hidden_BD = trunk.hidden_at(packed, self.view.adapter, packed.last_B)
        logits_BV = trunk.lm_head(hidden_BD).float()
        labels_B2 = torch.tensor([labels for _, labels in asked], device=logits_BV.device)
        return logits_BV.gather(1, labels_B2).softmax(1)[:, 0].tolist()


def _prompt_ids(encoder: ChatEncoder, messages: list[Message]) -> list[int]:
    return encoder.prompt_tokens(_joined(messages))


def _joined(messages: list[Message]) -> list[Message]:
    """One user turn: not every chat template has a place for a system turn."""
    return [Message(role="user", content="\n\n".join(message["content"] for message in messages))]
