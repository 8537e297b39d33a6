"""The toy world: questions with checkable answers, no leak into training, and the true quality worked by hand."""

import json
import random
import re
from itertools import islice

import pytest

from data.rows import Text
from data.toy import CHATTER, NAMES, TRAITS, Task, World, gold, quality
from stages.toy.model import build_tokenizer
from stages.toy.pretrain import BATCH_TOKENS, learning_rate, token_batches

PETS, HOMES, BIRDS = ("goat", "cat", "hen"), ("mill", "barn"), ("wren", "crow", "gull")
PET = Task("fact", "Which pet does Mira keep?", "Mira keeps a {}.", ("goat",), (PETS,), others=("Tobin",))
LIST = Task("some of", "Name two birds.", "The {} and the {} are birds.", BIRDS, ((*BIRDS, "cod"),) * 2)
ORDERED = Task("two facts", "?", "Mira keeps a {} and lives in the {}.", ("goat", "mill"), (PETS, HOMES), ordered=True)


@pytest.fixture(scope="module")
def world() -> World:
    return World.build(seed=3, prompts=400, eval_prompts=200)


def texts_of(document: Text) -> list[str]:
    """A document's text, or what is said in it turn by turn."""
    return [document] if isinstance(document, str) else [turn["content"] for turn in document]


def question(row: dict) -> str:
    (turn,) = row["prompt"]
    assert turn["role"] == "user"
    return turn["content"]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Mira keeps a goat.", 1.0),
        ("A goat!", 1.0),
        ("Mira keeps a cat.", 0.2),  # wrong, but an answer
        ("Mira keeps a goat or a cat.", 0.2),  # a hedge names two
        ("Mira keeps a goat, a goat.", 0.2),
        ("Tobin keeps a goat.", 0.2),  # about somebody else
        ("Mira keeps a goat. Tobin does not.", 0.15),
        ("The fog rolled in before supper.", 0.0),  # no answer
        ("", 0.0),
        ("Mira keeps a goat. The fog rolled in before supper.", 0.75),
        ("Let me think. Mira keeps a goat. Hm.", 0.5),
        ("Mira keeps a goat. " + "Hm. " * 9, 0.25),  # the floor of brevity
        ("Mira keeps a goat and then", 0.5),  # unfinished
        ("Mira keeps a cat and then", 0.1),  # 0.2 x 0.5
        ("Mira keeps a goat " + "and so on " * 5 + ".", 0.75),  # 19 words count as two sentences
    ],
)
def test_the_true_quality_of_an_answer(response: str, expected: float) -> None:
    assert quality(response, PET.row()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("task", "response", "expected"),
    [
        (LIST, "The wren and the gull are birds.", 1.0),
        (LIST, "The gull and the wren are birds.", 1.0),
        (LIST, "The wren and the wren are birds.", 0.2),
        (LIST, "The wren is a bird.", 0.2),  # two were asked for
        (LIST, "The wren and the cod are birds.", 0.2),
        (ORDERED, "Mira keeps a goat and lives in the mill.", 1.0),
        (ORDERED, "Mira lives in the mill and keeps a goat.", 0.2),
        (ORDERED, "Mira keeps a goat.", 0.2),
    ],
)
def test_the_true_quality_of_several_words(task: Task, response: str, expected: float) -> None:
    assert gold([task.prompt], [response], [task.row()]) == [pytest.approx(expected)]


def test_the_answer_key_survives_json() -> None:
    assert quality("The wren and the gull are birds.", json.loads(json.dumps(LIST.row()))) == 1.0


def test_right_answers_are_right_and_wrong_ones_wrong(world: World) -> None:
    tasks = world.train_tasks + world.eval_tasks
    assert {quality(world.right_answer(task), task.row()) for task in tasks} == {1.0}
    assert {quality(world.wrong_answer(task), task.row()) for task in tasks} == {0.2}


def test_chatter_answers_nothing(world: World) -> None:
    answers = {word.lower() for task in world.train_tasks for slot in task.slots for word in slot}
    said = {word for sentence in CHATTER for word in re.findall(r"[a-z]+", sentence.lower())}
    assert answers & said == set()


def test_no_evaluation_prompt_is_ever_trained_on(world: World) -> None:
    held_out = {question(task.row()) for task in world.eval_tasks}
    assert len(held_out) == 200
    assert len({task.question for task in world.train_tasks} | held_out) == 600
    rows = [*world.demonstrations(2000), *world.preferences(2000, label_noise=0.1)]
    assert not held_out & {question(row) for row in rows}
    assert {question(row) for row in world.true_pairs(300)} <= held_out
    lines = {line for document in world.documents(3000) for text in texts_of(document) for line in text.splitlines()}
    assert not held_out & lines
    assert len(lines & {task.question for task in world.train_tasks}) > 300  # quizzes ask the others


def test_the_seed_decides_everything() -> None:
    def everything(seed: int) -> str:
        world = World.build(seed=seed, prompts=50, eval_prompts=20)
        rows = [*world.demonstrations(50), *world.preferences(50, label_noise=0.1), *world.true_pairs(50)]
        traits = [world.traits[NAMES[0], trait.label] for trait in TRAITS]
        return json.dumps([traits, rows, list(world.documents(50))])

    assert everything(0) == everything(0)
    assert everything(0) != everything(1)


def test_demonstrations_are_of_uneven_quality(world: World) -> None:
    rows = {question(task.row()): task.row() for task in world.train_tasks}
    scores = [quality(row["response"][0]["content"], rows[question(row)]) for row in world.demonstrations(3000)]
    assert 0.3 < sum(scores) / len(scores) < 0.5
    assert 0.15 < scores.count(1.0) / len(scores) < 0.35
    assert all(value in scores for value in (0.0, 0.2, 0.5, 0.75))


def test_true_pairs_are_labelled_by_the_true_quality(world: World) -> None:
    rows = {question(task.row()): task.row() for task in world.eval_tasks}
    for pair in world.true_pairs(300):
        row = rows[question(pair)]
        assert quality(pair["chosen"][0]["content"], row) > quality(pair["rejected"][0]["content"], row)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_judge_errs_as_often_as_the_noise_says(world: World, noise: float) -> None:
    rows = {question(task.row()): task.row() for task in world.train_tasks}
    wrong = clear = 0
    for pair in world.preferences(6000, label_noise=noise):
        row = rows[question(pair)]
        gap = quality(pair["chosen"][0]["content"], row) - quality(pair["rejected"][0]["content"], row)
        if abs(gap) >= 0.7:  # Bradley-Terry alone errs in less than one of a thousand such pairs
            clear += 1
            wrong += gap < 0
    assert clear > 500
    assert wrong / clear == pytest.approx(noise, abs=0.05)


def test_the_tokenizer_round_trips_and_holds_the_world_in_whole_words() -> None:
    def texts() -> list[str]:
        documents = World.build(seed=0, prompts=100, eval_prompts=10).documents(2000)
        return [text for document in documents for text in texts_of(document)]

    tokenizer = build_tokenizer(texts(), max_length=128)
    for text in ("Where does Kit live?", "Ünïcode 文字 \n  two  spaces!", "Kit's boat: 7 oars"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer.tokenize("Mira rows a brown boat.")) == 6
    again = build_tokenizer(texts(), max_length=128)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    chat = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<bos><user>Hi?<assistant>Yes.<eos>"
    asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<bos><user>Hi?<assistant>"


def test_token_batches_hold_about_the_same_number_of_tokens() -> None:
    rng = random.Random(0)
    documents = ([1] * rng.randint(1, 90) for _ in range(2000))
    sizes = [sum(map(len, batch)) for batch in islice(token_batches(documents), 20)]
    assert all(BATCH_TOKENS <= size < BATCH_TOKENS + 90 for size in sizes)


def test_the_learning_rate_rises_and_falls() -> None:
    # 100 steps: 5 of warm-up, then down to a twentieth. 42 steps: 2 of warm-up, halfway down after 20 more.
    assert learning_rate(1, 100, 2.0) == pytest.approx(0.4)
    assert learning_rate(5, 100, 2.0) == pytest.approx(2.0)
    assert learning_rate(100, 100, 2.0) == pytest.approx(0.1)
    assert learning_rate(22, 42, 2.0) == pytest.approx(1.05)
