"""The built-in world of `configs/quickstart.yaml`: a village, questions about it, and answers of uneven quality.

Text and random numbers only: the same seed gives the same village, documents and rows. The evaluation prompts are set
aside first; no document and no other row repeats one of them.
"""

import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.errors import UserError
from data.rows import Message, Text

NAMES = (
    *("Mira", "Tobin", "Ada", "Bram", "Nell", "Hugo", "Ivy", "Jonas", "Kit", "Rosa"),
    *("Silas", "Tilda", "Wim", "Edda", "Finn", "Greta"),
)


@dataclass(frozen=True)
class Trait:
    """Something of which each villager has one."""

    label: str
    clause: str  # what follows the name
    values: tuple[str, ...]
    questions: tuple[str, ...]


TRAITS = (
    Trait(
        "job",
        "works as a {}",
        ("baker", "smith", "potter", "weaver", "miller", "tailor", "fiddler", "teacher"),
        ("What is {}'s trade?", "How does {} earn a living?", "What work does {} do?", "Tell me {}'s job."),
    ),
    Trait(
        "pet",
        "keeps a {}",
        ("goat", "cat", "pony", "rabbit", "hen", "hound", "tortoise", "ferret"),
        ("Which pet does {} keep?", "What animal does {} own?", "Who guards {}'s home?", "Tell me {}'s pet."),
    ),
    Trait(
        "boat",
        "rows a {} boat",
        ("red", "blue", "green", "yellow", "white", "black", "silver", "brown"),
        ("Which colour is {}'s boat?", "Describe {}'s boat.", "Which boat does {} row?", "Tell me {}'s boat."),
    ),
    Trait(
        "food",
        "likes {} best",
        ("stew", "porridge", "pie", "dumplings", "pancakes", "cheese", "honey", "noodles"),
        ("What does {} like to eat?", "What should I cook for {}?", "Which dish does {} like?", "Tell me {}'s food."),
    ),
    Trait(
        "home",
        "lives in the {}",
        ("lighthouse", "tower", "cottage", "barn", "mill", "castle", "cabin", "cellar"),
        ("Where does {} live?", "Where can I find {}?", "Which place is {}'s home?", "Tell me {}'s home."),
    ),
)
KINDS = {
    "bird": ("robin", "wren", "lark", "swan", "finch", "heron", "crow", "gull"),
    "fish": ("trout", "carp", "pike", "salmon", "herring", "perch", "cod", "tench"),
    "fruit": ("plum", "pear", "cherry", "lemon", "grape", "fig", "melon", "quince"),
    "tool": ("spade", "hammer", "saw", "rake", "chisel", "drill", "wrench", "sickle"),
    "tree": ("birch", "willow", "maple", "cedar", "beech", "larch", "pine", "poplar"),
}
THINGS = tuple(thing for things in KINDS.values() for thing in things)
NUMBERS = ("zero", "one", "two", "three")
# Sentences that answer nothing; no word of theirs is an answer to anything.
CHATTER = (
    "My aunt once lost a boot in the harbour.",
    "The fog rolled in before supper.",
    "Nobody knows why the bells ring twice.",
    "It reminds me of a song about the sea.",
    "I could talk about this all day long.",
    "Some say the well is haunted.",
    "The ferry was held up by the wind again.",
    "There is much more to tell about that.",
    "You should have seen the market last week.",
    "That is a very good question, my friend.",
    "Let me think about that for a while.",
    "People here argue about it every winter.",
)
# Shares of the flaws among demonstrations and among the answers of a preference pair.
OFF_TOPIC, WRONG, RAMBLING, BROKEN_OFF = 0.2, 0.12, 0.6, 0.2
SENTENCE_WORDS = 16  # a longer sentence counts as several
DRAWS_PER_PROMPT = 100  # before the village's questions count as exhausted
JUDGE_SHARPNESS = 10.0  # of the judge's preference in the difference of true quality


def _turn(role: str, content: str) -> list[Message]:
    return [Message(role=role, content=content)]


@dataclass(frozen=True)
class Task:
    """A question with its answer key: as many different words as there are `slots`, all of them in `answer`."""

    family: str
    question: str
    sentence: str  # with one {} for each word of the answer
    answer: tuple[str, ...]
    slots: tuple[tuple[str, ...], ...]  # what each word is chosen from, rightly or wrongly
    ordered: bool = False
    others: tuple[str, ...] = ()  # whom or what it is not about

    @property
    def prompt(self) -> list[Message]:
        """The question as a conversation."""
        return _turn("user", self.question)

    def row(self) -> dict[str, Any]:
        """The prompt's row; the columns beside `prompt` are what `gold` checks against."""
        return {
            "prompt": self.prompt,
            "family": self.family,
            "answer": list(self.answer),
            "pool": sorted({word for slot in self.slots for word in slot}),
            "count": len(self.slots),
            "ordered": self.ordered,
            "others": [word.lower() for word in self.others],
        }


def gold(prompts: Sequence[Text], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """True quality of each response, 0..1: correctness x brevity x finish. Never trained on, only measured.

    Correctness is 1 where the words of the pool that occur are exactly an answer, 0.2 where they are another one (also
    several at once, to hedge, or about somebody else), 0 where there are none. Brevity is 1 for one sentence and loses
    0.25 for each further one, down to 0.25. Finish is 1 for a response that ends its last sentence, else 0.5.
    """
    return [quality(response, row) for response, row in zip(responses, rows, strict=True)]


def quality(response: str, row: Mapping[str, Any]) -> float:
    """True quality of one response to the prompt of `row`."""
    answer, pool = ([word.lower() for word in row[column]] for column in ("answer", "pool"))
    words = re.findall(r"[a-z]+", response.lower())
    said = [word for word in words if word in pool]
    if row["ordered"]:
        right = said == answer
    else:
        right = len(said) == row["count"] == len(set(said)) and set(said) <= set(answer)
    right = right and not set(words) & set(row["others"])
    correctness = 1.0 if right else 0.2 if said else 0.0
    sentences = max(len(re.findall(r"[^.!?]+", response.strip())), math.ceil(len(words) / SENTENCE_WORDS))
    brevity = max(0.25, 1.25 - 0.25 * max(1, sentences))
    finish = 1.0 if response.strip().endswith((".", "!")) else 0.5
    return correctness * brevity * finish


@dataclass
class World:
    """One village: who has which trait, and the questions, those for evaluation apart."""

    rng: random.Random
    traits: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])  # (name, label) -> value
    eval_tasks: list[Task] = field(default_factory=list[Task])
    train_tasks: list[Task] = field(default_factory=list[Task])

    @classmethod
    def build(cls, *, seed: int, prompts: int, eval_prompts: int) -> "World":
        """The village of this seed, with that many different questions to train on and, apart, to evaluate on.

        Raises UserError where there are not so many.
        """
        world = cls(random.Random(f"toy world {seed}"))
        world.traits = {(name, trait.label): world.rng.choice(trait.values) for name in NAMES for trait in TRAITS}
        wanted = prompts + eval_prompts
        drawn = (world.draw_task() for _ in range(DRAWS_PER_PROMPT * wanted))
        different = dict(itertools.islice(_first_of_each(drawn), wanted))
        if len(different) < wanted:
            raise UserError(
                f"toy.prompts={prompts} and toy.eval_prompts={eval_prompts}: the village has only about "
                f"{len(different)} different questions; lower one of them"
            )
        tasks = list(different.values())
        world.rng.shuffle(tasks)
        world.eval_tasks, world.train_tasks = tasks[:eval_prompts], tasks[eval_prompts:]
        return world

    def draw_task(self) -> Task:
        """A random task of a random family."""
        families = (self._fact, self._two_facts, self._who, self._kind, self._some_of)
        return self.rng.choices(families, weights=(36, 34, 10, 12, 8))[0]()

    def _fact(self) -> Task:
        name, trait = self.rng.choice(NAMES), self.rng.choice(TRAITS)
        question = self.rng.choice(trait.questions).format(name)
        return Task(
            "fact",
            question,
            f"{name} {trait.clause}.",
            (self.traits[name, trait.label],),
            (trait.values,),
            others=_without(NAMES, name),
        )

    def _two_facts(self) -> Task:
        name, (first, second) = self.rng.choice(NAMES), self.rng.sample(TRAITS, 2)
        question = self.rng.choice(
            ("Tell me {}'s {} and {}.", "What are {}'s {} and {}?", "Name {}'s {} and {}.", "I forgot {}'s {} and {}.")
        )
        return Task(
            "two facts",
            question.format(name, first.label, second.label),
            f"{name} {first.clause} and {second.clause}.",
            (self.traits[name, first.label], self.traits[name, second.label]),
            (first.values, second.values),
            ordered=True,
            others=_without(NAMES, name),
        )

    def _who(self) -> Task:
        trait = self.rng.choice(TRAITS)
        value = self.traits[self.rng.choice(NAMES), trait.label]
        clause = trait.clause.format(value)
        question = self.rng.choice(("Who {}?", "Name a person who {}.", "Do you know who {}?")).format(clause)
        answer = tuple(name for name in NAMES if self.traits[name, trait.label] == value)
        return Task("who", question, f"{{}} {clause}.", answer, (NAMES,))

    def _kind(self) -> Task:
        kind = self.rng.choice(list(KINDS))
        thing = self.rng.choice(KINDS[kind])
        question = self.rng.choice(("What is a {}?", "Tell me what a {} is.", "What sort of thing is a {}?"))
        return Task(
            "kind",
            question.format(thing),
            f"A {thing} is a {{}}.",
            (kind,),
            (tuple(KINDS),),
            others=_without(THINGS, thing),
        )

    def _some_of(self) -> Task:
        kind, count = self.rng.choice(list(KINDS)), self.rng.randint(2, 3)
        question = self.rng.choice(("Name {} kinds of {}.", "I need {} sorts of {}.", "Give me {} words for a {}."))
        listed = "The {} and the {}" if count == 2 else "The {}, the {} and the {}"
        return Task(
            "some of",
            question.format(NUMBERS[count], kind),
            f"{listed} are each a {kind}.",
            KINDS[kind],
            (THINGS,) * count,
        )

    def right_answer(self, task: Task) -> str:
        """A correct sentence."""
        return task.sentence.format(*self._right_words(task))

    def _right_words(self, task: Task) -> list[str]:
        return list(task.answer) if task.ordered else self.rng.sample(task.answer, len(task.slots))

    def wrong_answer(self, task: Task) -> str:
        """A sentence of the right form that is false in one word."""
        words = self._right_words(task)
        place = self.rng.randrange(len(words))
        words[place] = self.rng.choice([word for word in task.slots[place] if word not in task.answer])
        return task.sentence.format(*words)

    def respond(self, task: Task) -> str:
        """A response of uneven quality: right or wrong, plain or rambling, at times beside the point or broken off."""
        if self.rng.random() < OFF_TOPIC:
            return " ".join(self.rng.sample(CHATTER, self.rng.randint(1, 2)))
        answer = self.wrong_answer(task) if self.rng.random() < WRONG else self.right_answer(task)
        sentences = [answer]
        if self.rng.random() < RAMBLING:
            sentences += self.rng.sample(CHATTER, self.rng.randint(1, 3))
            if self.rng.random() < 0.3:
                sentences[0], sentences[1] = sentences[1], sentences[0]
        if self.rng.random() < BROKEN_OFF:
            sentences[-1] = f"{sentences[-1][:-1]} and then"
        return " ".join(sentences)

    def demonstrations(self, count: int) -> Iterator[dict[str, Text]]:
        """Rows to imitate, flaws and all."""
        for _ in range(count):
            task = self.rng.choice(self.train_tasks)
            yield {"prompt": task.prompt, "response": _turn("assistant", self.respond(task))}

    def preferences(self, count: int, *, label_noise: float) -> Iterator[dict[str, Text]]:
        """Pairs as a noisy judge labels them.

        The judge prefers by Bradley-Terry on the true quality, so errs where two responses are nearly as good as each
        other, and turns `label_noise` of its verdicts around.
        """
        for _ in range(count):
            task, better, worse, gap = self._pair(self.train_tasks)
            misjudged = self.rng.random() > 1 / (1 + math.exp(-JUDGE_SHARPNESS * gap))
            if misjudged != (self.rng.random() < label_noise):
                better, worse = worse, better
            yield _preference(task, better, worse)

    def true_pairs(self, count: int) -> Iterator[dict[str, Text]]:
        """Pairs on evaluation prompts, labelled by the true quality itself."""
        for _ in range(count):
            task, better, worse, _ = self._pair(self.eval_tasks)
            yield _preference(task, better, worse)

    def _pair(self, tasks: Sequence[Task]) -> tuple[Task, str, str, float]:
        """A task, two responses that are not equally good, the better first, and by how much it is."""
        while True:
            task = self.rng.choice(tasks)
            responses = [self.respond(task), self.respond(task)]
            first, second = (quality(response, task.row()) for response in responses)
            if first != second:
                better, worse = responses if first > second else reversed(responses)
                return task, better, worse, abs(first - second)

    def documents(self, count: int) -> Iterator[Text]:
        """Texts and small conversations to pretrain on: portraits of villagers, lessons, quizzes and chatter.

        They state what is true of the village; the only question asked in a conversation is who somebody is.
        """
        unseen = {task.question for task in self.eval_tasks}
        for _ in range(count):
            sort = self.rng.choices(
                ("quiz", "portrait", "introduction", "lesson", "chatter"), weights=(60, 12, 16, 6, 6)
            )[0]
            if sort == "quiz":
                tasks = [task for task in (self.draw_task() for _ in range(8)) if task.question not in unseen]
                yield "\n".join(f"{task.question}\n{self.right_answer(task)}" for task in tasks[:4])
            elif sort == "portrait":
                yield self._portrait(self.rng.choice(NAMES))
            elif sort == "introduction":
                name = self.rng.choice(NAMES)
                yield [*_turn("user", f"Who is {name}?"), *_turn("assistant", self._portrait(name))]
            elif sort == "lesson":
                yield " ".join(self.right_answer(self._kind()) for _ in range(4))
            else:
                yield " ".join(self.rng.sample(CHATTER, 3))

    def _portrait(self, name: str) -> str:
        facts = [f"{name} {trait.clause}.".format(self.traits[name, trait.label]) for trait in TRAITS]
        return " ".join(self.rng.sample(facts, len(facts)))


def _first_of_each(tasks: Iterable[Task]) -> Iterator[tuple[str, Task]]:
    """Each question once, with its task."""
    seen: set[str] = set()
    for task in tasks:
        if task.question not in seen:
            seen.add(task.question)
            yield task.question, task


def _without(words: Sequence[str], word: str) -> tuple[str, ...]:
    return tuple(each for each in words if each != word)


def _preference(task: Task, chosen: str, rejected: str) -> dict[str, Text]:
    return {"prompt": task.prompt, "chosen": _turn("assistant", chosen), "rejected": _turn("assistant", rejected)}
