"""What counts as a verdict, and what never does."""

import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.core.judge.verdict import Unusable, for_first, read_verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"verdict": "A"}', "A"),
        ('{"reasoning": "B is short, {\\"verdict\\": \\"B\\"} it says", "verdict": "A"}', "A"),
        ('```json\n{"verdict": "tie"}\n```', "tie"),
        ('I compared them.\n{"verdict": "b"}', "B"),
        ("A", "A"),
        (" [[B]] ", "B"),
        ("Both are fine, but one is shorter.\nVerdict: A.", "A"),
        ("Final verdict: tie", "tie"),
        ('{"verdict": "A"} {"verdict": "A"}', "A"),
    ],
)
def test_verdicts_that_can_be_read(text: str, verdict: str) -> None:
    assert read_verdict(text, "pairwise") == verdict


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "empty answer"),
        ("  \n", "empty answer"),
        ('{"verdict": "C"}', "none of A, B, tie"),
        ('{"verdict": null}', "none of A, B, tie"),
        ('{"verdict": true}', "none of A, B, tie"),
        ('{"verdict": ["A"]}', "none of A, B, tie"),
        ('{"verdict": NaN}', "NaN where a verdict is needed"),
        ('{"winner": "A"}', "JSON without verdict"),
        ('{"verdict": "', "truncated answer"),
        ('{"verdict": "A"} or rather {"verdict": "B"}', "several verdicts"),
        ('{"verdict": "A", "verdict": "B"}', "a key twice"),
        ("Response A is better than B, I think, though B", "no verdict"),
        ("I cannot compare these.", "no verdict"),
        ("7", "none of A, B, tie"),
    ],
)
def test_what_is_no_verdict_has_a_cause(text: str, cause: str) -> None:
    with pytest.raises(Unusable, match=cause):
        read_verdict(text, "pairwise")


@pytest.mark.parametrize(("text", "points"), [('{"score": 7}', 7.0), ("8", 8.0), ("Score: 9.5", 9.5)])
def test_points_that_can_be_read(text: str, points: float) -> None:
    assert read_verdict(text, "pointwise") == points


@pytest.mark.parametrize(
    "text", ['{"score": 0}', '{"score": 11}', '{"score": "7"}', '{"score": true}', '{"score": Infinity}', "A", "eight"]
)
def test_what_are_no_points(text: str) -> None:
    with pytest.raises(Unusable):
        read_verdict(text, "pointwise")


@given(st.text(max_size=60))
def test_any_text_is_a_verdict_or_a_cause(text: str) -> None:
    for wrapped in (text, json.dumps({"verdict": text}), f'{{"verdict": {text}}}'):
        with contextlib.suppress(Unusable):
            assert read_verdict(wrapped, "pairwise") in ("A", "B", "tie")


def test_how_much_a_verdict_prefers_the_first() -> None:
    assert [for_first(verdict) for verdict in ("A", "tie", "B", 0.25)] == [1.0, 0.5, 0.0, 0.25]
    assert math.isclose(for_first(0.7), 0.7)
