"""Who gets which pair, twice or not, and that a new start finds everything where it was."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.judge.ledger import Ledger
from stages.label.people.config import PeopleConfig
from stages.label.people.desk import CHOICES, Choice, Desk, ShownPair


def pairs_of(count: int) -> list[ShownPair]:
    return [ShownPair(f"pair {n}", f"prompt {n}", (f"first {n}", f"second {n}")) for n in range(count)]


def new_desk(path: Path, *, pairs: int = 6, seed: int = 0, **fields: object) -> Desk:
    config = PeopleConfig.model_validate({"annotators": ["ada", "bob"], "repeat_share": 0, **fields})
    return Desk(pairs_of(pairs), Ledger(path / "ledger.sqlite"), config, seed=seed)


def say(desk: Desk, name: str, choice: Choice = "A") -> str:
    """Answers the annotator's task; returns the pair's id."""
    task = desk.next_task(name)
    assert task is not None
    assert desk.answer(name, task.key, choice)
    return task.pair.id


def all_of(desk: Desk, name: str) -> list[str]:
    """Answers until nothing is left; the ids of the pairs in the order shown."""
    seen: list[str] = []
    while desk.next_task(name) is not None:
        seen.append(say(desk, name))
    return seen


def test_every_pair_goes_to_one_annotator_unless_more_are_asked_for(tmp_path):
    desk = new_desk(tmp_path)
    by_turns = [say(desk, name) for name in ("ada", "bob", "bob", "ada", "bob", "ada")]
    assert sorted(by_turns) == [f"pair {place}" for place in range(6)]
    assert by_turns != sorted(by_turns)
    assert (desk.next_task("ada"), desk.next_task("bob")) == (None, None)
    assert desk.finished_pairs() == 6


def test_with_overlap_two_of_three_get_each_pair(tmp_path):
    desk = new_desk(tmp_path, annotators=["ada", "bob", "cyd"], overlap=2)
    seen = all_of(desk, "ada")[:4] + all_of(desk, "bob") + all_of(desk, "cyd")
    assert len(desk.answers()["ada"]) == 6
    assert sum(len(answers) for answers in desk.answers().values()) == 12
    assert len(seen) == 10
    assert desk.finished_pairs() == 6


def test_a_task_stays_until_it_is_answered_and_counts_once(tmp_path):
    desk = new_desk(tmp_path)
    task = desk.next_task("ada")
    assert task is not None
    assert desk.next_task("ada") == task
    assert not desk.answer("bob", task.key, "A")
    assert not desk.answer("ada", "no key", "A")
    assert desk.answer("ada", task.key, "B")
    assert desk.answer("ada", task.key, "A")
    assert [answer.verdict.value for answer in desk.answers()["ada"]] == ["B"]
    assert desk.answers()["bob"] == []


def test_a_verdict_means_the_answer_that_stood_there(tmp_path):
    desk = new_desk(tmp_path, pairs=40)
    wanted = {"A": (1.0, 0.0), "B": (0.0, 1.0), "tie": (0.5, 0.5)}
    swapped = 0
    for choice in ("A", "B", "tie") * 10:
        say(desk, "ada", choice)
        answer = desk.answers()["ada"][-1]
        left, right = answer.task.shown
        first, second = answer.task.pair.responses
        assert (left, right) == ((second, first) if answer.task.swapped else (first, second))
        assert answer.task.content["responses"] == [left, right]
        assert answer.task.for_first(answer.verdict) == wanted[choice][answer.task.swapped]
        swapped += answer.task.swapped
    assert 5 < swapped < 25
    say(desk, "ada", "skip")
    last = desk.answers()["ada"][-1]
    assert last.task.for_first(last.verdict) is None


def test_a_skipped_pair_goes_to_somebody_else_and_not_back(tmp_path):
    desk = new_desk(tmp_path, pairs=3)
    skipped = say(desk, "ada", "skip")
    assert sorted([skipped, *all_of(desk, "ada")]) == ["pair 0", "pair 1", "pair 2"]
    assert desk.finished_pairs() == 2
    assert all_of(desk, "bob") == [skipped]
    assert desk.finished_pairs() == 3


def test_undo_goes_back_as_far_as_one_likes(tmp_path):
    desk = new_desk(tmp_path)
    assert not desk.undo("ada")
    first, second = say(desk, "ada", "A"), say(desk, "ada", "skip")
    third = desk.next_task("ada")
    assert third is not None
    assert desk.undo("ada")
    assert desk.undo("ada")
    assert not desk.undo("ada")
    assert desk.finished_pairs() == 0
    assert [say(desk, "ada", "B"), say(desk, "ada", "B"), say(desk, "ada", "B")] == [first, second, third.pair.id]
    assert [answer.verdict.value for answer in desk.answers()["ada"]] == ["B", "B", "B"]


def test_repeats_come_ten_answers_later_and_once(tmp_path):
    desk = new_desk(tmp_path, pairs=30, repeat_share=0.2)
    seen = all_of(desk, "ada")
    twice = {pair for pair in seen if seen.count(pair) == 2}
    assert len(seen) == 36
    assert len(twice) == 6
    for pair in twice:
        first = seen.index(pair)
        again = seen.index(pair, first + 1)
        assert again - first >= 10 or again >= 30  # at the end there is nothing else to show
    assert desk.progress("ada").answered == 36
    assert desk.finished_pairs() == 30


def test_a_skipped_pair_is_not_repeated(tmp_path):
    desk = new_desk(tmp_path, pairs=4, repeat_share=1)
    for _ in range(4):
        say(desk, "ada", "skip")
    assert desk.next_task("ada") is None


def test_what_somebody_who_left_has_answered_stays_and_the_rest_is_free(tmp_path):
    desk = new_desk(tmp_path, pairs=4)
    answered = say(desk, "bob")
    handed = desk.next_task("bob")
    assert handed is not None
    desk = new_desk(tmp_path, pairs=4, annotators=["ada"])
    rest = all_of(desk, "ada")
    assert answered not in rest
    assert handed.pair.id in rest
    assert len(rest) == 3
    assert desk.finished_pairs() == 4


def state(desk: Desk) -> Mapping[str, object]:
    named = {name: [(answer.task, answer.verdict) for answer in answers] for name, answers in desk.answers().items()}
    return {"answers": named, "finished": desk.finished_pairs(), "progress": desk.progress("ada")}


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["ada", "bob", "cyd"]), st.sampled_from([*CHOICES, "undo", "undo"]))),
    overlap=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_a_new_start_finds_everything_where_it_was(tmp_path_factory, steps, overlap, seed):
    """After each step, a desk built afresh from the ledger has the same answers and shows the same tasks."""
    folder = tmp_path_factory.mktemp("desk")
    names = ["ada", "bob", "cyd"]

    def fresh() -> Desk:
        return new_desk(folder, annotators=names, overlap=overlap, seed=seed, repeat_share=0.5)

    desk = fresh()
    for name, action in steps:
        task = desk.next_task(name)
        if action == "undo":
            desk.undo(name)
        elif task is not None:
            assert desk.answer(name, task.key, action)
        again = fresh()
        assert state(again) == state(desk)
        assert [again.next_task(each) for each in names] == [desk.next_task(each) for each in names]
    for answers in desk.answers().values():
        firsts = [answer.task.pair.id for answer in answers if answer.task.showing == 1]
        assert len(firsts) == len(set(firsts))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"annotators": ["ada", "ada"]}, "names somebody twice"),
        ({"annotators": ["ada"], "overlap": 2}, "overlap=2 is more than the 1 in annotators"),
        ({"annotators": ["a/b"]}, "should match pattern"),
        ({"annotators": []}, "at least 1 item"),
    ],
)
def test_a_config_that_cannot_work_is_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        PeopleConfig.model_validate(fields)
