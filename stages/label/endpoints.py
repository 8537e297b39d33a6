"""Candidates from models behind endpoints: asked within their limits, kept in the ledger like verdicts."""

import asyncio
from collections.abc import Sequence

from data.rows import Message, Prompt
from stages.core.context import StageContext
from stages.core.judge.asking import for_each, open_asker
from stages.core.judge.config import Endpoint
from stages.core.judge.ledger import Ledger, Verdict
from stages.core.judge.question import Request
from stages.label.config import LabelConfig

LEDGER = "ledger.sqlite"


def answers_of(context: StageContext[LabelConfig], prompts: Sequence[Prompt]) -> list[list[str]]:
    """What the endpoints answer to each prompt; an answer that does not come is left out.

    Raises Interrupted, and UserError where an endpoint serves nothing.
    """
    texts: list[list[str]] = [[] for _ in prompts]
    with Ledger(context.out / LEDGER) as ledger:
        for endpoint in context.config.endpoints:
            for own, new in zip(texts, asyncio.run(_answers(context, endpoint, prompts, ledger)), strict=True):
                own += new
            context.metrics.say(f"{endpoint.model} answered {len(prompts)} prompts")
    return texts


async def _answers(
    context: StageContext[LabelConfig], endpoint: Endpoint, prompts: Sequence[Prompt], ledger: Ledger
) -> list[list[str]]:
    candidates = context.config.candidates
    found: dict[tuple[int, int], str] = {}

    async with open_asker(endpoint, f"policy:{endpoint.model}", ledger, say=context.metrics.say) as asker:

        async def work(item: tuple[int, int]) -> None:
            place, sample = item
            prompt = prompts[place].prompt
            turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
            request = Request(
                model=str(endpoint.model),
                conversation=tuple(turns),
                temperature=candidates.temperatures[sample],
                max_tokens=candidates.response_length,
                sample=sample,
            )
            verdict = await asker.answer(request)
            if isinstance(verdict, Verdict):
                found[item] = verdict.value

        items = [(place, sample) for place in range(len(prompts)) for sample in range(candidates.per_prompt)]
        await for_each(items, work, at_a_time=endpoint.max_concurrency, should_stop=context.should_stop)
    return [
        [found[place, sample] for sample in range(candidates.per_prompt) if (place, sample) in found]
        for place in range(len(prompts))
    ]
