"""Puts pairs to the judges: what is settled without them, both orders, the vote, and the watch over canaries."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from data.errors import UserError
from stages.core.answering import load_view
from stages.core.bank import BankBuilder
from stages.core.context import StageContext
from stages.core.judge.aggregate import both_orders, by_points, vote
from stages.core.judge.asking import Asker, Unanswered, for_each
from stages.core.judge.config import JudgeConfig
from stages.core.judge.defences import suspicious, trivial
from stages.core.judge.ledger import Ledger, Verdict
from stages.core.judge.local import LocalJudge
from stages.core.judge.opening import identity, open_judge
from stages.core.judge.question import Question, ask, draw_principles
from stages.core.judge.verdict import for_first
from stages.core.models import open_encoder
from stages.label.config import LabelConfig
from stages.label.pairs import Pair

RULE = "rule"  # the source of what is settled without a judge
UNANSWERED = "no usable verdict"
_LEAST_UNANSWERED = 20  # before a share of them can end the run
_PAIRS_PER_CALL = 4  # so many pairs are under way for each call that may be open: some of them wait to try again
_PROGRESS = 20  # lines about it in a run


class Answerer(Protocol):
    """A judge that can be asked."""

    async def answer(self, question: Question) -> Verdict | Unanswered:
        """The verdict, or why there is none."""
        ...


@dataclass(frozen=True)
class Opinion:
    """What one judge said of one pair: `shown_first` holds, for each verdict, how much it preferred what was first."""

    label: float | None
    ledger: tuple[int, ...]
    shown_first: tuple[float, ...] = ()  # pairwise only, in the order of asking


@dataclass(frozen=True)
class Outcome:
    """What became of a pair: its label, or why it has none; and the judges' opinions, in the config's order."""

    pair: Pair
    label: float | None
    source: str
    cause: str = ""
    opinions: tuple[Opinion, ...] = ()

    @property
    def ledger(self) -> list[int]:
        """The ids of the verdicts that it rests on."""
        return [each for opinion in self.opinions for each in opinion.ledger]

    @property
    def abstained(self) -> bool:
        """Whether the judges answered and came to no label."""
        return self.label is None and bool(self.opinions)


def questions_of(judge: JudgeConfig, model: str, pair: Pair, *, seed: int) -> list[Question]:
    """What the judge is asked about a pair. Pairwise: as given and swapped, or one of both; pointwise: each one."""
    first, second = pair.responses
    principles = draw_principles(judge, seed=seed, item=pair.id)
    if judge.mode == "pointwise":
        shown = [(first,), (second,)]
    elif judge.both_orders:
        shown = [(first, second), (second, first)]
    else:
        shown = [(second, first) if pair.swapped(seed) else (first, second)]
    return [ask(judge, model, pair.prompt, responses, principles) for responses in shown]


def opinion_of(judge: JudgeConfig, pair: Pair, verdicts: Sequence[Verdict], *, seed: int) -> Opinion:
    """What the verdicts on a judge's questions come to."""
    ledger = tuple(verdict.id for verdict in verdicts)
    if judge.mode == "pointwise":
        first, second = (float(verdict.value) for verdict in verdicts)
        return Opinion(by_points(first, second), ledger)
    preferences = tuple(for_first(verdict.value) for verdict in verdicts)
    if judge.both_orders:
        as_given, swapped = preferences
        return Opinion(both_orders(as_given, swapped, judge.on_disagreement), ledger, preferences)
    label = 1.0 - preferences[0] if pair.swapped(seed) else preferences[0]
    return Opinion(label, ledger, preferences)


def settled(pair: Pair, config: LabelConfig) -> Outcome | None:
    """The outcome of a pair that no judge should see, or None. Canaries are always asked about."""
    if pair.canary:
        return None
    if pair.first == pair.second:
        return Outcome(pair, None, RULE, "both responses are the same")
    faults = [trivial(response, min_words=config.min_words) for response in pair.responses]
    if all(faults):
        return Outcome(pair, None, RULE, f"no answer in either response ({faults[0]}; {faults[1]})")
    if "" in pair.responses:  # which no row of preferences may be
        return Outcome(pair, None, RULE, "a response is empty")
    if fault := faults[0] or faults[1]:
        return Outcome(pair, 0.0 if faults[0] else 1.0, f"{RULE}:{fault}")
    if config.addressing == "quarantine":
        for name, response in zip(("first", "second"), pair.responses, strict=True):
            if what := suspicious(response):
                return Outcome(pair, None, RULE, f"the {name} response speaks to the judge ({what})")
    return None


@dataclass
class Panel:
    """The judges of a run at work on its pairs."""

    context: StageContext[LabelConfig]
    judges: Sequence[JudgeConfig]
    models: Sequence[str]  # what stands for each judge in its questions' keys
    answerers: Sequence[Answerer]
    outcomes: dict[int, Outcome] = field(default_factory=dict[int, Outcome])
    unanswered: int = 0
    canary_points: list[float] = field(default_factory=list[float])

    @property
    def source(self) -> str:
        """Who labels, as preferences.jsonl names them."""
        return "+".join(judge.source for judge in self.judges)

    async def judge(self, pairs: Sequence[Pair]) -> list[Outcome]:
        """The outcome of every pair, in their order.

        Raises UserError where canaries or too many questions fail, Interrupted where the run is to stop.
        """
        step = max(1, len(pairs) // _PROGRESS)

        async def work(item: tuple[int, Pair]) -> None:
            place, pair = item
            self.outcomes[place] = settled(pair, self.context.config) or await self._ask(pair)
            self._watch(self.outcomes[place], len(pairs))
            done = len(self.outcomes)
            if done % step == 0 or done == len(pairs):
                self.context.metrics.say(f"{done} of {len(pairs)} pairs judged{self._account(done / len(pairs))}")

        at_a_time = _PAIRS_PER_CALL * max(judge.max_concurrency for judge in self.judges)
        await for_each(enumerate(pairs), work, at_a_time=at_a_time, should_stop=self.context.should_stop)
        check_canaries(self.canary_points, self.context.config)
        return [self.outcomes[place] for place in range(len(pairs))]

    async def _ask(self, pair: Pair) -> Outcome:
        opinions = await asyncio.gather(*(self._opinion(place, pair) for place in range(len(self.judges))))
        missing = [each for each in opinions if isinstance(each, Unanswered)]
        if missing:
            return Outcome(pair, None, self.source, f"{UNANSWERED}: {missing[0].cause}")
        given = tuple(each for each in opinions if isinstance(each, Opinion))
        label = vote([opinion.label for opinion in given], self.judges[0].on_disagreement)
        cause = "" if label is not None else "the orders or the judges disagree"
        return Outcome(pair, label, self.source, cause, given)

    async def _opinion(self, place: int, pair: Pair) -> Opinion | Unanswered:
        judge, seed = self.judges[place], self.context.shared.seed
        questions = questions_of(judge, self.models[place], pair, seed=seed)
        verdicts = await asyncio.gather(*(self.answerers[place].answer(question) for question in questions))
        missing = next((each for each in verdicts if isinstance(each, Unanswered)), None)
        found = [each for each in verdicts if isinstance(each, Verdict)]
        return missing or opinion_of(judge, pair, found, seed=seed)

    def _watch(self, outcome: Outcome, total: int) -> None:
        if outcome.pair.canary and outcome.opinions:
            self.canary_points.append(canary_points(outcome))
            canaries = self.context.config.canaries
            if canaries is not None and len(self.canary_points) >= canaries.patience:
                check_canaries(self.canary_points, self.context.config)
        self.unanswered += outcome.cause.startswith(UNANSWERED)
        most = self.context.config.max_unanswered
        if self.unanswered >= _LEAST_UNANSWERED and self.unanswered > most * total:
            raise UserError(
                f"label: {self.unanswered} of {total} pairs got no usable verdict, more than max_unanswered={most}; "
                f"mend the endpoint and run again: what was answered is kept{self._account(1.0)}"
            )

    def _account(self, share: float) -> str:
        """Failures and costs so far, in words; `share` of the pairs is done."""
        parts: list[str] = []
        for judge, answerer in zip(self.judges, self.answerers, strict=True):
            if not isinstance(answerer, Asker):
                continue
            if judge.price is not None:
                spent = answerer.limits.spent
                parts.append(f"{judge.name}: {spent:.4f} US dollars, about {spent / share:.4f} in all")
            if answerer.failures:
                what, times = answerer.failures.most_common(1)[0]
                total = answerer.failures.total()
                parts.append(f"{judge.name}: {total} of {answerer.calls} calls failed, most often: {what} ({times}x)")
        return "".join(f"; {part}" for part in parts)


def canary_points(outcome: Outcome) -> float:
    """1 where the label prefers the known side, 0.5 for a tie or no label, else 0."""
    assert outcome.pair.known is not None
    if outcome.label is None or outcome.label == 0.5:
        return 0.5
    return float((outcome.label > 0.5) == (outcome.pair.known > 0.5))


def check_canaries(points: Sequence[float], config: LabelConfig) -> None:
    """Raises UserError where the judge knows too few of the canaries."""
    if config.canaries is None or not points:
        return
    accuracy = sum(points) / len(points)
    if accuracy < config.canaries.min_accuracy:
        raise UserError(
            f"label.canaries.min_accuracy={config.canaries.min_accuracy:g}: the judge is right on {accuracy:.1%} of "
            f"{len(points)} canaries; take a better judge or mend the rubric, or lower it"
        )


def judge_pairs(context: StageContext[LabelConfig], pairs: Sequence[Pair], ledger: Ledger) -> list[Outcome]:
    """The outcome of every pair, canaries among them. Raises UserError, Interrupted."""
    return asyncio.run(_judge_pairs(context, pairs, ledger))


async def _judge_pairs(context: StageContext[LabelConfig], pairs: Sequence[Pair], ledger: Ledger) -> list[Outcome]:
    judges, seed = context.config.judges, context.shared.seed
    sources = [context.inputs.get(f"judge.{place}") for place in range(len(judges))]
    models = [
        identity(judge, run_folder=context.run_folder, local=source)
        for judge, source in zip(judges, sources, strict=True)
    ]
    answerers: list[Answerer] = []
    builder = BankBuilder(context.shared)
    async with contextlib.AsyncExitStack() as stack:
        for place, (judge, source) in enumerate(zip(judges, sources, strict=True)):
            if source is None:
                opened = open_judge(judge, ledger, run_folder=context.run_folder, say=context.metrics.say)
                answerers.append(await stack.enter_async_context(opened))
                continue
            view = load_view(source, f"judge-{place}", builder)
            local = LocalJudge(view, open_encoder(source, context.shared), judge.source, ledger)
            # All at once, so that the model's passes are full.
            local.answer_all(list(_asked(judge, models[place], pairs, context.config, seed)))
            answerers.append(local)
        return await Panel(context, judges, models, answerers).judge(pairs)


def _asked(judge: JudgeConfig, model: str, pairs: Sequence[Pair], config: LabelConfig, seed: int) -> Iterator[Question]:
    for pair in pairs:
        if settled(pair, config) is None:
            yield from questions_of(judge, model, pair, seed=seed)
