"""Who gets which pair next, and what they said.

All of it is rebuilt from the ledger at every start, so a killed server loses nothing.

A task is one showing of a pair to one annotator. Its question in the ledger holds the answers in the order shown, so
the verdicts "A" (left), "B" (right), "tie" and "skip" mean what they do in a judge's question.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from data.rows import Text
from stages.core.judge.ledger import Ledger, Verdict, content_key
from stages.label.people.config import PeopleConfig

Choice = Literal["A", "B", "tie", "skip"]
CHOICES: tuple[Choice, ...] = ("A", "B", "tie", "skip")
ANNOTATOR = "annotator:"
_BETWEEN_SHOWINGS = 10  # answers of an annotator between the two showings of a pair, while there are others


@dataclass(frozen=True)
class ShownPair:
    """Two answers to one prompt; `id` stands for their content."""

    id: str
    prompt: Text
    responses: tuple[Text, Text]


@dataclass(frozen=True)
class Task:
    """One showing of a pair to one annotator; `swapped` puts its second answer on the left."""

    pair: ShownPair
    showing: int  # 1, or 2 for a repeat
    swapped: bool

    @property
    def shown(self) -> tuple[Text, Text]:
        """The answers, left and right."""
        first, second = self.pair.responses
        return (second, first) if self.swapped else (first, second)

    @cached_property
    def content(self) -> dict[str, Any]:
        """The question as the ledger keeps it."""
        left, right = self.shown
        shown = {"prompt": self.pair.prompt, "responses": [left, right]}
        return {"asked": "people", "pair": self.pair.id, "showing": self.showing, **shown}

    @cached_property
    def key(self) -> str:
        """The question's key in the ledger."""
        return content_key(self.content)

    def for_first(self, verdict: Verdict) -> float | None:
        """How much a verdict prefers the pair's first answer: 1, 0.5 or 0; None for a skip."""
        if verdict.value == "skip":
            return None
        left = {"A": 1.0, "tie": 0.5, "B": 0.0}[verdict.value]
        return 1 - left if self.swapped else left


@dataclass(frozen=True)
class Answer:
    """A verdict that stands, and what it answered."""

    task: Task
    verdict: Verdict

    @property
    def skipped(self) -> bool:
        """Whether nothing was said about the pair."""
        return self.verdict.value == "skip"


@dataclass(frozen=True)
class Progress:
    """How far one annotator is, and all together; a pair is finished when `overlap` annotators have answered it."""

    answered: int  # tasks of this annotator, repeats with them
    skipped: int
    given: int  # first answers of everybody, as far as they are wanted
    wanted: int  # pairs x overlap
    finished_pairs: int
    pairs: int


@dataclass
class _Place:
    """One annotator's place at the desk."""

    claimed: set[str] = field(default_factory=set[str])  # pairs that were handed out to them, by id
    open: list[Task] = field(default_factory=list[Task])  # handed out and not answered yet
    answers: dict[str, Answer] = field(default_factory=dict[str, Answer])  # by key, in the order given
    undone: list[Task] = field(default_factory=list[Task])  # withdrawn and to be answered again, the last one first


class Desk:
    """Hands out tasks and takes verdicts; every change is in the ledger before it is here.

    One process serves a ledger's annotators: the lock on the run folder sees to that.
    """

    def __init__(self, pairs: Sequence[ShownPair], ledger: Ledger, config: PeopleConfig, *, seed: int) -> None:
        self._ledger, self._config, self._seed = ledger, config, seed
        self._pairs = list(pairs)
        random.Random(f"{seed}:order").shuffle(self._pairs)
        repeated = random.Random(f"{seed}:repeats").sample(self._pairs, round(config.repeat_share * len(pairs)))
        self._repeated = {pair.id for pair in repeated}
        self._places = {name: _Place() for name in config.annotators}
        self._holders = dict.fromkeys(
            (pair.id for pair in pairs), 0
        )  # annotators who have the pair and did not skip it
        self._answered = dict.fromkeys(self._holders, 0)  # annotators who have answered it
        self._reload()

    def next_task(self, name: str) -> Task | None:
        """What the annotator is to answer now; the same until it is answered. None when nothing is left for them."""
        place = self._places[name]
        if place.undone or place.open:
            return (place.undone or place.open)[-1]
        return self._due(name, after=_BETWEEN_SHOWINGS) or self._fresh(name) or self._due(name, after=0)

    def answer(self, name: str, key: str, choice: Choice) -> bool:
        """Records a verdict on the task with this key; False where that is not the task that the annotator was shown.

        A verdict that is sent twice counts once: the first one stands.
        """
        place = self._places[name]
        if key in place.answers:
            return True
        task = self.next_task(name)
        if task is None or task.key != key:
            return False
        self._ledger.ask(task.key, task.content)
        verdict = self._ledger.record(task.key, source_of(name), choice)
        place.undone = [undone for undone in place.undone if undone.key != key]
        place.open = [opened for opened in place.open if opened.key != key]
        place.answers[key] = Answer(task, verdict)
        self._count(place.answers[key], 1)
        return True

    def undo(self, name: str) -> bool:
        """Withdraws the annotator's last verdict that stands, and shows its task again; False where there is none."""
        place = self._places[name]
        if not place.answers:
            return False
        _, last = place.answers.popitem()
        self._ledger.withdraw(last.verdict.id)
        self._count(last, -1)
        place.undone.append(last.task)
        return True

    def can_undo(self, name: str) -> bool:
        """Whether the annotator has a verdict to withdraw."""
        return bool(self._places[name].answers)

    @property
    def num_pairs(self) -> int:
        """All pairs, finished or not."""
        return len(self._pairs)

    def answers(self) -> dict[str, list[Answer]]:
        """The verdicts that stand, by annotator, in the order given; those of former annotators too."""
        return {name: list(place.answers.values()) for name, place in self._places.items()}

    def progress(self, name: str) -> Progress:
        """How far the annotator is, and all together."""
        answers = self._places[name].answers.values()
        skipped = sum(answer.skipped for answer in answers)
        overlap = self._config.overlap
        return Progress(
            answered=len(answers) - skipped,
            skipped=skipped,
            given=sum(min(count, overlap) for count in self._answered.values()),
            wanted=overlap * len(self._pairs),
            finished_pairs=self.finished_pairs(),
            pairs=len(self._pairs),
        )

    def finished_pairs(self) -> int:
        """Pairs that as many annotators have answered as the config asks for."""
        return sum(count >= self._config.overlap for count in self._answered.values())

    def _task(self, name: str, pair: ShownPair, showing: int) -> Task:
        digest = hashlib.sha256(f"{self._seed}:{pair.id}:{name}:{showing}".encode()).digest()
        return Task(pair, showing, swapped=bool(digest[0] & 1))

    def _due(self, name: str, *, after: int) -> Task | None:
        """The first repeat whose first showing lies `after` answers back or more; skipped pairs do not come again."""
        place = self._places[name]
        answers = list(place.answers.values())
        for answer in answers[: max(0, len(answers) - after)]:
            if answer.task.pair.id in self._repeated and answer.task.showing == 1 and not answer.skipped:
                repeat = self._task(name, answer.task.pair, 2)
                if repeat.key not in place.answers:
                    return repeat
        return None

    def _fresh(self, name: str) -> Task | None:
        """A pair that is new to the annotator and that fewer than `overlap` others have; from now on it is theirs."""
        place = self._places[name]
        for pair in self._pairs:
            if pair.id not in place.claimed and self._holders[pair.id] < self._config.overlap:
                self._ledger.claim(pair.id, source_of(name))
                place.claimed.add(pair.id)
                self._holders[pair.id] += 1
                place.open.append(self._task(name, pair, 1))
                return place.open[-1]
        return None

    def _count(self, answer: Answer, change: int) -> None:
        """A skip frees the pair for somebody else; a repeat changes nothing."""
        if answer.task.showing == 1 and answer.skipped:
            self._holders[answer.task.pair.id] -= change
        elif answer.task.showing == 1:
            self._answered[answer.task.pair.id] += change

    def _reload(self) -> None:
        """Takes from the ledger what was claimed, answered and withdrawn of these pairs, by former annotators too."""
        pairs = {pair.id: pair for pair in self._pairs}
        verdicts = self._ledger.verdicts(ANNOTATOR)
        former = {verdict.source.removeprefix(ANNOTATOR) for verdict in verdicts} - self._places.keys()
        self._places |= {name: _Place() for name in sorted(former)}
        claims = self._ledger.claims()
        for name, place in self._places.items():
            claimed = [pairs[item] for item, source in claims if source == source_of(name) and item in pairs]
            tasks = {
                task.key: task for pair in claimed for task in (self._task(name, pair, 1), self._task(name, pair, 2))
            }
            place.claimed = {pair.id for pair in claimed}
            for verdict in verdicts:
                if verdict.source == source_of(name) and verdict.key in tasks:
                    place.answers[verdict.key] = Answer(tasks[verdict.key], verdict)
            place.undone = [tasks[key] for key in self._ledger.withdrawn(source_of(name)) if key in tasks]
            waiting = {task.key for task in place.undone} | place.answers.keys()
            place.open = [task for key, task in tasks.items() if task.showing == 1 and key not in waiting]
            self._count_all(place, here=name in self._config.annotators)

    def _count_all(self, place: _Place, *, here: bool) -> None:
        """Counts one annotator in; what somebody who left was handed and never answered is free again."""
        firsts = {answer.task.pair.id for answer in place.answers.values() if answer.task.showing == 1}
        for item in place.claimed if here else firsts:
            self._holders[item] += 1
        for answer in place.answers.values():
            self._count(answer, 1)


def source_of(name: str) -> str:
    """An annotator's name in the ledger and in preferences.jsonl."""
    return f"{ANNOTATOR}{name}"
