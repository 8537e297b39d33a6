"""Constitutional revision: a policy's answers, criticised and rewritten by sampled principles -> demonstrations.jsonl.

The first phase of Bai et al. 2022 (arXiv 2212.08073, section 3.1). Every critique and every rewritten answer is in the
ledger as soon as it is given, so a killed run goes on where it was.
"""

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from data.artifacts import sha256_json, write_atomically
from data.rows import Message, Prompt, Refusal
from data.sources import shortened
from stages.core.context import StageContext
from stages.core.judge.asking import Asker, Unanswered, for_each, open_asker
from stages.core.judge.ledger import Ledger
from stages.core.judge.question import Request
from stages.core.judge.revision import Revise, ask_critique, ask_revision, conversation, with_critique
from stages.label.candidates import read_prompts, sample_candidates
from stages.label.config import LabelConfig
from stages.label.judging import Opinion, Outcome
from stages.label.pairs import Pair, as_response
from stages.label.revision_config import RevisionConfig

DEMONSTRATIONS = "demonstrations.jsonl"


@dataclass(frozen=True)
class Revised:
    """One prompt with the policy's answer and what became of it; `cause` says why there is no rewritten one."""

    prompt: Prompt
    initial: str
    principles: tuple[str, ...]
    response: str | None = None
    ledger: tuple[int, ...] = ()
    cause: str = ""

    def row(self, source: str) -> dict[str, Any]:
        """The row of demonstrations.jsonl."""
        assert self.response is not None
        return {
            "prompt": self.prompt.prompt,
            "response": as_response(self.prompt.prompt, self.response),
            "initial": as_response(self.prompt.prompt, self.initial),
            "principles": list(self.principles),
            "source": source,
            "ledger_ids": list(self.ledger),
            "origin": self.prompt.origin,
        }

    def outcome(self, source: str) -> Outcome:
        """The rewritten answer preferred to the first one."""
        assert self.response is not None
        asked = self.prompt.prompt
        pair = Pair(asked, as_response(asked, self.response), as_response(asked, self.initial), self.prompt.origin)
        if self.response == self.initial:
            return Outcome(pair, None, source, "the rewritten answer is the same")
        return Outcome(pair, 1.0, source, opinions=(Opinion(1.0, self.ledger),))

    def refusal(self) -> Refusal:
        """The row of quarantine.jsonl."""
        row = {"prompt": self.prompt.prompt, "response": self.initial}
        return Refusal(self.prompt.origin, self.cause, shortened(row))


def revise_answers(context: StageContext[LabelConfig], config: RevisionConfig, ledger: Ledger) -> list[Revised]:
    """Every prompt's first answer, rewritten; demonstrations.jsonl is written. Raises UserError, Interrupted."""
    prompts, _ = read_prompts(context)
    candidates = sample_candidates(context, prompts)
    answers = [next((each.text for each in own if each.text.strip()), "") for own in candidates]
    found = asyncio.run(_revise_all(context, config, ledger, list(zip(prompts, answers, strict=True))))
    rows = [each.row(config.source) for each in found if each.response is not None]
    write_atomically(context.out / DEMONSTRATIONS, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    context.metrics.say(f"{len(rows)} of {len(found)} answers rewritten")
    return found


def draw(config: RevisionConfig, prompt: Prompt, *, seed: int) -> tuple[str, ...]:
    """A principle for each round, none twice; by seed and prompt alone."""
    rng = random.Random(f"revision {seed} {sha256_json(prompt.prompt)}")
    return tuple(rng.sample(config.constitution, config.rounds))


def revision_figures(found: Sequence[Revised]) -> dict[str, float]:
    """How many answers were rewritten, how many of them came out changed, and how their length (characters) changed."""
    done = [each for each in found if each.response is not None]
    figures = {"answers": float(len(found)), "rewritten": float(len(done))}
    if done:
        figures["changed"] = fmean(each.response != each.initial for each in done)
        figures["length_before"] = fmean(len(each.initial) for each in done)
        figures["length_after"] = fmean(len(each.response or "") for each in done)
    return figures


def revision_note(found: Sequence[Revised]) -> str:
    """The figures in words."""
    figures = revision_figures(found)
    text = f"{figures['rewritten']:.0f} of {figures['answers']:.0f} answers rewritten"
    if "changed" not in figures:
        return f"{text}."
    lengths = f"mean length from {figures['length_before']:.0f} to {figures['length_after']:.0f} characters"
    return f"{text}, {figures['changed']:.0%} of them changed, {lengths}."


async def _revise_all(
    context: StageContext[LabelConfig], config: RevisionConfig, ledger: Ledger, rows: Sequence[tuple[Prompt, str]]
) -> list[Revised]:
    found: dict[int, Revised] = {}
    async with open_asker(config, config.source, ledger, say=context.metrics.say) as asker:

        async def work(item: tuple[int, tuple[Prompt, str]]) -> None:
            place, (prompt, answer) = item
            principles = draw(config, prompt, seed=context.shared.seed)
            found[place] = await revise_one(asker, config, Revised(prompt, answer, principles))

        await for_each(enumerate(rows), work, at_a_time=config.max_concurrency, should_stop=context.should_stop)
    return [found[place] for place in range(len(rows))]


async def revise_one(asker: Asker, config: RevisionConfig, start: Revised) -> Revised:
    """The answer after a critique and a rewriting by each of its principles, or why there is none."""
    if not start.initial.strip():
        return Revised(start.prompt, start.initial, start.principles, cause="the policy's answer is empty")
    response, ledger = start.initial, list[int]()
    for principle in start.principles:
        turns = conversation(start.prompt.prompt, response)
        if config.critique:
            critique = await asker.answer(_request(config, [*turns, ask_critique(principle)]))
            if isinstance(critique, Unanswered):
                return _failed(start, f"no usable critique: {critique.cause}")
            ledger.append(critique.id)
            turns = with_critique(turns, principle, critique.value)
        asked = Revise(_request(config, [*turns, ask_revision(principle)]), config.constrained)
        revision = await asker.answer(asked)
        if isinstance(revision, Unanswered):
            return _failed(start, f"no usable revision: {revision.cause}")
        ledger.append(revision.id)
        response = revision.value
    return Revised(start.prompt, start.initial, start.principles, response, tuple(ledger))


def _failed(start: Revised, cause: str) -> Revised:
    return Revised(start.prompt, start.initial, start.principles, cause=cause)


def _request(config: RevisionConfig, turns: Sequence[Message]) -> Request:
    return Request(
        model=str(config.model),
        conversation=tuple(turns),
        temperature=config.temperature,
        max_tokens=config.max_tokens,
    )
