"""Puts pairs to people: the page, until the first annotator ends it; then a label for every pair that was answered."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from stages.core.context import Interrupted, StageContext
from stages.core.judge.aggregate import Disagreement, vote
from stages.core.judge.ledger import Ledger
from stages.label.config import LabelConfig
from stages.label.judging import Opinion, Outcome, settled
from stages.label.pairs import Pair
from stages.label.people.config import PeopleConfig
from stages.label.people.desk import Answer, Desk, ShownPair, source_of
from stages.label.people.overview import overview
from stages.label.people.serve import serve_people

LINKS = "links.json"
UNSEEN = "nobody answered it"


def ask_people(
    context: StageContext[LabelConfig], config: PeopleConfig, pairs: Sequence[Pair], ledger: Ledger
) -> tuple[list[Outcome], dict[str, Any]]:
    """The outcome of every pair, and the overview of annotators and their agreement.

    Pairs with a response that is no answer are settled without people. Raises Interrupted where the run is to stop
    before the first annotator has ended the labelling: what was answered is in the ledger.
    """
    # People are not fooled by text that speaks to a judge, so they are shown it.
    rules = context.config.model_copy(update={"addressing": "ask"})
    by_rule = {pair.id: outcome for pair in pairs if (outcome := settled(pair, rules)) is not None}
    shown = [ShownPair(pair.id, pair.prompt, (pair.first, pair.second)) for pair in pairs if pair.id not in by_rule]
    desk = Desk(shown, ledger, config, seed=context.shared.seed)
    ended = serve_people(
        desk,
        config,
        links_file=context.out / LINKS,
        should_stop=context.should_stop,
        say=context.metrics.say,
        progress=_told_in_steps(context, len(shown)),
    )
    if not ended:
        raise Interrupted(f"label: stopped with {desk.finished_pairs()} of {len(shown)} pairs finished")
    return outcomes_of(pairs, by_rule, desk.answers(), config.on_disagreement), overview(desk)


def outcomes_of(
    pairs: Sequence[Pair],
    by_rule: Mapping[str, Outcome],
    answers: Mapping[str, Sequence[Answer]],
    on_disagreement: Disagreement,
) -> list[Outcome]:
    """The outcome of each pair: its rule's, or what the annotators who did not skip it come to, one voice each."""
    said: dict[str, dict[str, list[Answer]]] = defaultdict(lambda: defaultdict(list))
    for name, given in answers.items():
        for answer in given:
            if not answer.skipped:
                said[answer.task.pair.id][name].append(answer)
    return [by_rule.get(pair.id) or _outcome(pair, said[pair.id], on_disagreement) for pair in pairs]


def _outcome(pair: Pair, said: Mapping[str, Sequence[Answer]], on_disagreement: Disagreement) -> Outcome:
    if not said:
        return Outcome(pair, None, "people", UNSEEN)
    opinions = tuple(_opinion(answers, on_disagreement) for answers in said.values())
    label = vote([opinion.label for opinion in opinions], on_disagreement)
    source = "+".join(source_of(name) for name in said)
    return Outcome(pair, label, source, "" if label is not None else "the annotators disagree", opinions)


def _opinion(answers: Sequence[Answer], on_disagreement: Disagreement) -> Opinion:
    """One annotator's label: of a pair shown twice, what both verdicts come to."""
    labels = [answer.task.for_first(answer.verdict) for answer in answers]
    return Opinion(vote(labels, on_disagreement), tuple(answer.verdict.id for answer in answers))


def _told_in_steps(context: StageContext[LabelConfig], total: int) -> Any:
    """Says how far the labelling is, every twentieth of the way and at its end."""
    step = max(1, total // 20)
    told = 0

    def at(finished: int) -> None:
        nonlocal told
        if finished != told and (finished % step == 0 or finished == total):
            told = finished
            context.metrics.say(f"{finished} of {total} pairs labelled")

    return at
