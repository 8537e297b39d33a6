"""Which responses are settled before a judge is asked, case by case."""

import pytest

from stages.core.judge.defences import trivial


@pytest.mark.parametrize(
    ("response", "min_words", "why"),
    [
        ("", 1, "empty"),
        (" \n", 1, "empty"),
        ("?! …", 1, "no words"),
        ("Thought process:", 1, "master key"),
        ("**Solution**", 1, "master key"),
        ("Solution: 42", 1, None),
        ("yes", 1, None),
        ("yes, two words", 4, "fewer than 4 words"),
        ("four words are enough", 4, None),
    ],
)
def test_what_is_no_answer(response: str, min_words: int, why: str | None) -> None:
    assert trivial(response, min_words=min_words) == why
