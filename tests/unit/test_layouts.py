"""Preference pairs made from plain text: a text's own rest against the same rest spoiled."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from data.errors import UserError
from data.layouts import spoiled
from data.rows import Demonstration, Preference, RowError
from data.sources import SourceConfig, load_rows

REST = ' was a fox. It ran far!  "Why?" it asked.\n\nNobody knew. It slept.'


def test_shuffled_keeps_the_words_the_spaces_and_the_first_sentence() -> None:
    worse = spoiled(REST, "shuffle")
    assert worse != REST
    assert worse.startswith(" was a fox. ")
    assert sorted(worse.split()) == sorted(REST.split())
    assert len(worse) == len(REST)
    assert worse.count("\n\n") == 1
    assert worse.count("!  ") + worse.count(".  ") + worse.count('"  ') == 1
    assert spoiled(REST, "shuffle") == worse  # the text is the seed


def test_shuffled_pieces_are_whole_sentences() -> None:
    text = " zero. One two. Three four! Five six? Seven eight."
    worse = spoiled(text, "shuffle")
    for sentence in ("One two.", "Three four!", "Five six?", "Seven eight."):
        assert sentence in worse


@pytest.mark.parametrize("text", [" one sentence only.", " a. b.", " a. b. b. b."])
def test_too_few_sentences_are_refused(text: str) -> None:
    with pytest.raises(RowError, match="too few to shuffle"):
        spoiled(text, "shuffle")


def test_cut_is_a_beginning_of_a_fifth_to_four_fifths() -> None:
    counts = set()
    for number in range(50):
        text = "".join(f" w{number}.{place}" for place in range(100))
        worse = spoiled(text, "cut")
        assert text.startswith(worse)
        counts.add(len(worse.split()))
    assert min(counts) >= 20
    assert max(counts) <= 80
    assert len(counts) > 20  # seeded by the text, not one place for all
    with pytest.raises(RowError, match="too few to cut"):
        spoiled(" four words are few", "cut")


def test_every_other_cut_is_at_the_end_of_a_sentence() -> None:
    sentences = [f" the {number}th of many sentences is here." for number in range(20)]
    ends = [spoiled(f" story {seed}." + "".join(sentences), "cut").endswith("here.") for seed in range(200)]
    # Half of them on purpose, and a seventh of the others by chance: 57 %, with a standard deviation of 3.5.
    assert 0.45 < sum(ends) / 200 < 0.70


def test_pairs_from_text_share_prompt_and_chosen_with_the_demonstration(tmp_path: Path) -> None:
    path = tmp_path / "stories.json"
    path.write_text(json.dumps(["Once upon a time there" + REST, "Too short."]))
    source = SourceConfig(path=str(path), layout="text", prompt_words=5, spoil="shuffle")
    pairs = load_rows(Preference, [source], run_folder=tmp_path, seed=0)
    plain = load_rows(Demonstration, [source.model_copy(update={"spoil": None})], run_folder=tmp_path, seed=0)
    (pair,), (whole,) = pairs.rows, plain.rows
    assert (pair.prompt, pair.chosen) == (whole.prompt, whole.response) == ("Once upon a time there", REST)
    assert pair.rejected == spoiled(REST, "shuffle")
    assert [refusal.origin for refusal in pairs.refused] == [f"{path}:1#2"]


def test_spoil_belongs_to_plain_text(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="set layout: text"):
        SourceConfig(path="rows.jsonl", spoil="cut")
    path = tmp_path / "stories.json"
    path.write_text(json.dumps(["Once upon a time there" + REST]))
    with pytest.raises(UserError, match="set spoil: shuffle or cut"):
        load_rows(Preference, [SourceConfig(path=str(path), layout="text")], run_folder=tmp_path, seed=0)
